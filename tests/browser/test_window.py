"""What happens to notebooks: the kernel restarts, another one runs beside, the window is narrow, the page is zoomed."""

import frontends
import pytest

from airllm_nb.demo import demo_path

CELLS = (
    "%load_ext airllm_nb",
    "%airllm load demo --device cpu --dtype float32",
    "%%airllm --max-new-tokens 16\nWhat is the capital of France?",
)


@pytest.fixture
def two(lab, tmp_path):
    """Two notebooks at once in one JupyterLab, each with a model of its own."""
    demo_path()
    here, beside = (frontends.write_notebook(tmp_path / name, *CELLS) for name in ("here.ipynb", "beside.ipynb"))
    first = lab(here, "Light", beside)
    return first, first.beside("beside.ipynb")


def test_a_notebook_among_others(two):
    for index in range(2):
        for lab in two:
            lab.start(index)
        for lab in two:
            lab.wait(index)
    for lab in two:
        lab.record(2)
        lab.start(2)
    for lab in two:
        lab.wait(2)
        assert len(lab.pictures(2)) > 2, "a strip does not move"
    assert all("The capital of France is Paris." in lab.output(2) for lab in two)

    lab, other = two
    lab.resize(800)
    assert not lab.cut_off(1)
    assert not lab.cut_off(2)
    lab.screenshot("narrow", 2)
    lab.zoom(2)
    assert not lab.cut_off(2)
    lab.screenshot("zoomed", 2)
    lab.zoom(1 / 2)

    lab.restart()
    assert "UsageError" in lab.run(1)  # nothing is loaded in the new kernel, not even the extension
    for index in range(3):
        lab.run(index)
    assert "The capital of France is Paris." in lab.output(2)
    assert set(lab.states(2)) == {"done"}
    assert "30 layers" in other.run(1), "the other notebook has lost its kernel"

    lab.save()
    lab.reopen()
    assert "The capital of France is Paris." in lab.output(2)
    assert not lab.strangers
