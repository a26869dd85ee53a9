"""The Stop button: enabled where a click arrives while the cell runs, gone when the run is over."""

import threading
from types import SimpleNamespace

import pytest

from airllm_nb.events import Fetching, LayerInfo
from airllm_nb.notebook import stop_button
from airllm_nb.notebook.progress import Progress
from airllm_nb.notebook.renderers import SilentRenderer, WidgetRenderer
from airllm_nb.notebook.run_state import RunState

LAYERS = (LayerInfo(0, "model.layers.0", 1, resident=True),)


@pytest.fixture
def kernel(monkeypatch):
    kernel = SimpleNamespace(_supports_kernel_subshells=True)
    monkeypatch.setattr(stop_button, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.delenv("VSCODE_PID", raising=False)
    return kernel


@pytest.mark.usefixtures("kernel")
def test_a_click_stops():
    clicks = []
    button = stop_button.StopButton(lambda: clicks.append(1)).button
    assert not button.disabled
    button.click()
    assert clicks == [1]


@pytest.mark.parametrize("where", ["ipykernel 6", "VS Code", "no kernel"])
def test_where_no_click_arrives_it_says_what_to_do(kernel, monkeypatch, where):
    if where == "ipykernel 6":
        del kernel._supports_kernel_subshells
    elif where == "VS Code":
        monkeypatch.setenv("VSCODE_PID", "1")
    else:
        monkeypatch.setattr(stop_button, "get_ipython", lambda: None)
    button, words = stop_button.StopButton(lambda: None).children
    assert button.disabled
    assert "use the interrupt button" in words.value


def test_replies_are_handled_where_the_page_sends_them():
    """As ipykernel 7.4 asks: by its own rule, the click would go to the shell that is busy."""
    comm = SimpleNamespace(_reply_subshell_for=lambda _data, _default: None)
    stop_button.keep_subshell_route(comm)
    assert comm._reply_subshell_for({}, "a subshell") == "a subshell"


@pytest.mark.usefixtures("kernel")
def test_it_goes_when_the_run_is_over():
    renderer = WidgetRenderer(lambda: None)
    state = RunState("name", LAYERS, 1)
    renderer.draw(state)
    box = renderer._box.children[-1]
    assert box.button.description == "Stop"
    state.end("done")
    renderer.draw(state)
    renderer.draw(state)
    assert box not in renderer._box.children
    assert box.button.comm is None  # closed: a click that comes late meets nothing
    assert len(WidgetRenderer()._box.children) == 2


def test_a_download_can_be_stopped():
    stop = threading.Event()
    progress = Progress(RunState("name"), SilentRenderer(), stop)
    progress(Fetching("Downloading", "file", 1, 2))
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        progress(Fetching("Downloading"))
