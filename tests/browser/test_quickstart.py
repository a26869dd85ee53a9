"""The quickstart as a person sees it: in a real JupyterLab, in a real browser."""

from pathlib import Path

import pages
import pytest

from airllm_nb.demo import demo_path

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "01_quickstart.ipynb"
STATES = (
    "Array.from(document.querySelectorAll('.jp-CodeCell')[%d].querySelectorAll('.airllm-strip i'), cell => cell.classList[0])"
)


def watch(lab, index):
    """Start a cell and collect what its strip and its first line show while it runs."""
    strips, lines = [], []
    lab.start(index)
    while lab.running(index):
        strip = tuple(lab.page.evaluate(STATES % index))
        if strip and strip not in strips:
            strips.append(strip)
        line = lab.page.evaluate(
            f"document.querySelectorAll('.jp-CodeCell')[{index}].querySelector('.airllm-top b')?.textContent ?? ''"
        )
        if line and line not in lines:
            lines.append(line)
        lab.page.wait_for_timeout(10)
    return strips, lines


@pytest.mark.parametrize("theme", pages.THEMES)
def test_quickstart(lab, theme):
    demo_path()  # the download is not what is tested here
    notebook = lab(QUICKSTART, theme)
    for index in range(notebook.index("%airllm load")):
        notebook.start(index)
        notebook.wait(index)

    index = notebook.index("%airllm load demo --device cpu --dtype float32")
    strips, _ = watch(notebook, index)
    assert len(strips) > 1, "the strip does not move while the model loads"
    assert set(notebook.page.evaluate(STATES % index)) == {"resident"}
    assert "30 layers, all resident" in notebook.output(index)

    index = notebook.index("-o answer")
    strips, lines = watch(notebook, index)
    assert all(len(strip) == 30 for strip in strips)
    assert len(strips) > 2, "the strip does not move while the model writes"
    assert any("computing" in strip for strip in strips)
    assert any("token" in line and "layer" in line and "model.layers." in line for line in lines), lines
    assert "The capital of France is Paris." in notebook.output(index)
    notebook.screenshot(f"quickstart-{theme.lower()}", index)

    index = notebook.index("%airllm load demo --device cpu --dtype float32 --memory 250MB")
    notebook.start(index)
    notebook.wait(index)
    assert set(notebook.page.evaluate(STATES % index)) == {"resident", "waiting"}

    index = notebook.index("-o frugal")
    strips, _ = watch(notebook, index)
    seen = {state for strip in strips for state in strip}
    assert {"computing", "resident"} <= seen
    assert seen & {"reading", "ready", "waiting"}, seen  # which ones depends on how fast the disk is
    assert "The capital of France is Paris." in notebook.output(index)
    notebook.screenshot(f"quickstart-streaming-{theme.lower()}", index)
