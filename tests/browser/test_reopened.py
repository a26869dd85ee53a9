"""What a run leaves in a notebook that is opened again: it is not trusted, and nothing is run."""

from pathlib import Path

import nbformat
import pages
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("theme", pages.THEMES)
def test_a_reopened_notebook_shows_the_results(lab, theme):
    quickstart = NOTEBOOKS / "01_quickstart.ipynb"
    results = sum("%%airllm" in cell.source for cell in nbformat.read(quickstart, as_version=4).cells)
    assert results > 1
    notebook = lab(quickstart, theme, keep_outputs=True)
    index = notebook.index("-o frugal")
    cell = notebook.cells.nth(index)
    cell.scroll_into_view_if_needed()
    output = cell.locator(".jp-RenderedHTMLCommon")
    for words in ("The capital of France is Paris.", "7 resident, 23 streamed", "waiting for weights", "meanwhile reading"):
        assert words in notebook.output(index)

    picture = output.locator("> div > img")
    assert picture.get_attribute("alt").startswith("Time per layer: computing")
    width, height = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert width > height > 0
    assert picture.is_visible()

    lanes = output.locator("details img")
    assert not lanes.first.is_visible()
    output.locator("summary").click()
    assert lanes.count() == 8  # one for the prompt, one for each other token
    assert all(lanes.nth(row).is_visible() for row in range(lanes.count()))
    assert lanes.first.bounding_box()["x"] == lanes.nth(1).bounding_box()["x"]  # it is a table
    notebook.screenshot(f"result-{theme.lower()}", index)
    assert notebook.page.locator(".airllm-result").count() >= results
    assert notebook.page.locator(".jp-OutputArea script").count() == 0
    assert "[*]" not in notebook.page.locator(".jp-Notebook").inner_text()
