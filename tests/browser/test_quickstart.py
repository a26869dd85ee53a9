"""The quickstart as a person sees it: in a real JupyterLab, in a real browser."""

from pathlib import Path

import pages
import pytest

from airllm_nb.demo import demo_path

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "01_quickstart.ipynb"


@pytest.mark.parametrize("theme", pages.THEMES)
def test_quickstart(lab, theme):
    demo_path()  # the download is not what is tested here
    notebook = lab(QUICKSTART, theme)
    for index in range(notebook.index("%airllm load")):
        notebook.start(index)
        notebook.wait(index)

    index = notebook.index("%airllm load demo --device cpu --dtype float32")
    strips = notebook.watch(index)
    assert len(strips) > 1, "the strip does not move while the model loads"
    assert set(notebook.states(index)) == {"resident"}
    assert "30 layers, all resident" in notebook.output(index)

    index = notebook.index("-o answer")
    strips, lines = notebook.watch(index), notebook.lines(index)
    assert all(len(strip) == 30 for strip in strips)
    assert len(strips) > 2, "the strip does not move while the model writes"
    assert any("computing" in strip for strip in strips)
    assert any("token" in line and "layer" in line and "model.layers." in line for line in lines), lines
    assert "The capital of France is Paris." in notebook.output(index)
    notebook.screenshot(f"quickstart-{theme.lower()}", index)

    index = notebook.index("%airllm load demo --device cpu --dtype float32 --memory 250MB")
    notebook.start(index)
    notebook.wait(index)
    assert set(notebook.states(index)) == {"resident", "waiting"}

    index = notebook.index("-o frugal")
    strips = notebook.watch(index)
    seen = {state for strip in strips for state in strip}
    assert {"computing", "resident"} <= seen
    assert seen & {"reading", "ready", "waiting"}, seen  # which ones depends on how fast the disk is
    assert "The capital of France is Paris." in notebook.output(index)
    notebook.screenshot(f"quickstart-streaming-{theme.lower()}", index)
