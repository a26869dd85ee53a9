"""The quickstart's main cells in Notebook 7."""

from pathlib import Path

import pages
import pytest

from airllm_nb.demo import demo_path

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "01_quickstart.ipynb"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"  # an image of the notebook's own
LOAD = "%airllm load demo --device cpu --dtype float32"


@pytest.mark.parametrize("theme", pages.THEMES)
def test_quickstart(notebook7, theme):
    demo_path()
    notebook = notebook7(QUICKSTART, theme)
    notebook.run(notebook.index("%load_ext"))
    index = notebook.index(f"{LOAD} --memory 250MB")
    assert len(notebook.watch(index)) > 1, "the strip does not move while the model loads"
    assert set(notebook.states(index)) == {"resident", "waiting"}

    index = notebook.index("-o frugal")
    pictures = notebook.watch(index)
    assert len(pictures) > 2, "the strip does not move while the model writes"
    assert any("computing" in picture for picture in pictures)
    assert "The capital of France is Paris." in notebook.output(index)
    notebook.screenshot(f"notebook7-{theme.lower()}", index)
    assert set(notebook.strangers) <= {BADGE}, "something is fetched from elsewhere"
