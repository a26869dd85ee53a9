"""The Stop button of ``%%airllm`` in a real JupyterLab."""

import time

import nbformat

from airllm_nb.demo import demo_path

ASK = "%%airllm --max-new-tokens 1500 -o answer\nTell me everything about the sea."
CELLS = (
    "%load_ext airllm_nb\n%airllm load demo --device cpu --dtype float32 --memory 250MB",
    ASK,
    "print(answer.stopped, len(answer.token_ids))",
    "%%airllm --max-new-tokens 3\nHello",
)


def test_stop(lab, tmp_path):
    demo_path()
    path = tmp_path / "stop.ipynb"
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    notebook = lab(path)
    notebook.start(0)
    notebook.wait(0)
    button = notebook.cells.nth(0).locator("button", has_text="Stop")
    assert button.count() == 0  # the load is over
    notebook.start(1)
    button = notebook.cells.nth(1).locator("button", has_text="Stop")
    button.wait_for()
    assert button.is_enabled()
    headline = notebook.cells.nth(1).locator(".airllm-top b")
    notebook.page.wait_for_function(
        "document.querySelectorAll('.jp-CodeCell')[1].querySelector('.airllm-top b').textContent.startsWith('token')"
    )
    notebook.screenshot("stop-button", 1)
    button.click()
    clicked = time.monotonic()
    notebook.wait(1, seconds=10)
    assert time.monotonic() - clicked < 2  # the promise: a button that seems dead would be pressed again
    assert "Interrupted: stopped after" in notebook.output(1)
    assert headline.inner_text().startswith("interrupted")
    assert button.count() == 0
    for index in (2, 3):
        notebook.start(index)
        notebook.wait(index)
    assert notebook.output(2).startswith("interrupted ")
    assert "Interrupted" not in notebook.output(3)
    assert notebook.cells.nth(3).locator(".airllm-top b").inner_text().startswith("3 tokens")
