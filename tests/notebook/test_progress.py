"""The state that events add up to, and when and how it is drawn."""

import io
import sys
import threading
import time

import pytest

from airllm_nb.events import (
    ComputeBegin,
    ComputeEnd,
    LayerInfo,
    LayerRead,
    LayerReady,
    LoadBegin,
    LoadEnd,
    MemoryShort,
    PassBegin,
    PassEnd,
)
from airllm_nb.notebook import strip
from airllm_nb.notebook.progress import Progress
from airllm_nb.notebook.renderers import SilentRenderer, TextRenderer, WidgetRenderer
from airllm_nb.notebook.run_state import RunState

MB = 1_000_000
LAYERS = tuple(LayerInfo(index, f"model.layers.{index}", 10 * MB, resident=index % 2 == 0) for index in range(4))


def read(state, index, seconds=0.5, source="disk"):
    info = LAYERS[index]
    state.apply(LayerRead(index, info.name, info.nbytes))
    state.apply(LayerReady(index, info.name, info.nbytes, seconds, source))


def compute(state, index, waited=0.0):
    info = LAYERS[index]
    source = "resident" if info.resident else "disk"
    state.apply(ComputeBegin(index, info.name, info.nbytes, source, waited))
    state.apply(ComputeEnd(index, info.name, info.nbytes, 0.25, source))


def phases(state):
    return [layer.phase for layer in state.layers]


def test_a_load():
    state = RunState("org/name")
    assert strip.headline(state) == "opening"
    state.apply(LoadBegin("name", "cpu", "float32", LAYERS))
    assert phases(state) == ["waiting"] * 4
    state.apply(LayerRead(0, "model.layers.0", 10 * MB))
    assert phases(state) == ["reading", "waiting", "waiting", "waiting"]
    read(state, 0)
    read(state, 1)  # the read-ahead begins while the others load; it does not count
    assert phases(state) == ["resident", "ready", "waiting", "waiting"]
    assert state.fraction == 0.5
    assert strip.headline(state) == "loading · layer 1/2 · 10.0 MB"
    read(state, 2)
    state.apply(LoadEnd(1.25, completed=True))
    state.end("done")
    assert phases(state) == ["resident", "waiting", "resident", "waiting"]
    assert strip.headline(state) == "2 layers in memory · 20.0 MB · 1.2 s"


def test_a_run():
    state = RunState("name", LAYERS, tokens_wanted=4)
    assert phases(state) == ["resident", "waiting", "resident", "waiting"]
    assert strip.headline(state) == "starting"
    state.apply(PassBegin(7, 5, "prefill", at=10.0))
    compute(state, 0)
    assert strip.headline(state) == "prompt of 5 tokens · waiting for layer 2/4 · model.layers.1"
    read(state, 1)
    assert strip.headline(state) == "prompt of 5 tokens · layer 1/4 · model.layers.0"
    compute(state, 1, waited=0.75)
    assert phases(state) == ["done", "done", "resident", "waiting"]
    assert state.fraction == 0.5 / 4
    read(state, 3)
    compute(state, 2)
    state.apply(LayerRead(1, "model.layers.1", 10 * MB))  # ahead, for the next pass
    assert phases(state) == ["done", "reading", "done", "ready"]
    compute(state, 3)
    state.apply(PassEnd(7, 5, 2.0, completed=True, at=12.0))
    assert state.fraction == 1 / 4
    state.apply(PassBegin(8, 1, "decode", at=12.0))
    assert phases(state) == ["resident", "reading", "resident", "waiting"]
    state.apply(ComputeBegin(0, "model.layers.0", 10 * MB, "resident", 0.0))
    assert phases(state)[0] == "computing"
    assert strip.headline(state) == "token 2/4 · layer 1/4 · model.layers.0"
    state.apply(PassEnd(8, 1, 0.5, completed=True, at=12.5))
    state.apply(PassBegin(9, 1, "decode", at=12.5))
    assert strip.headline(state) == "token 3/4 · layer 1/4 · model.layers.0 · 2.0 tok/s"
    state.apply(PassEnd(9, 1, 0.5, completed=False, at=13.0))
    state.end("interrupted")
    assert strip.headline(state) == "interrupted · 2 tokens · 3.0 s · 0.7 tok/s"
    totals = state.layers[1].totals()
    assert (totals.passes, totals.disk_nbytes, totals.cache_nbytes) == (1, 10 * MB, 0)
    assert (totals.read_seconds, totals.waited_seconds, totals.compute_seconds) == (0.5, 0.75, 0.25)


def short(state, text="Memory is <short>."):
    layers = tuple(LayerInfo(info.index, info.name, info.nbytes, resident=info.index == 0) for info in LAYERS)
    state.apply(MemoryShort(layers, text))


def test_layers_that_stream_from_now_on():
    state = RunState("name", LAYERS, tokens_wanted=4)
    assert "airllm-note" not in strip.render(state)
    read(state, 1)
    short(state)
    assert phases(state) == ["resident", "ready", "waiting", "waiting"]
    html = strip.render(state)
    assert "Memory is &lt;short&gt;." in html
    assert html.count("streams") == 2 * 3  # a class and a hover text each
    state.apply(PassBegin(0, 5, "prefill"))
    read(state, 2)
    assert phases(state)[2] == "ready"
    state.end("done")
    assert phases(state) == ["resident", "waiting", "waiting", "waiting"]
    assert [layer.totals().resident for layer in state.layers] == [True, False, False, False]


def test_a_terminal_is_told_when_the_text_is_over(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    state = RunState("name", LAYERS, 4)
    progress = Progress(state, TextRenderer())
    short(state, "Memory is short.")
    progress.before_text()
    assert sys.stderr.getvalue() == ""
    progress.finish("done")
    assert sys.stderr.getvalue() == "Memory is short.\n"


class Recorder(SilentRenderer):
    def __init__(self):
        self.drawn = []

    def draw(self, state):
        self.drawn.append((time.perf_counter(), threading.get_ident(), state.tokens))


def test_some_pictures_a_second_and_always_the_last_one():
    recorder = Recorder()
    state = RunState("name", LAYERS, 10**6)
    progress = Progress(state, recorder)
    begin, passes = time.perf_counter(), 0
    while time.perf_counter() < begin + 1.6:
        progress(PassBegin(passes, 1, "decode"))
        progress(PassEnd(passes, 1, 0.0, completed=True))
        passes += 1
    progress.finish("done")
    times = [at for at, *_ in recorder.drawn[:-1]]
    assert all(sum(start <= at < start + 1 for at in times) <= 7 for start in times)
    assert len(times) >= 7
    assert recorder.drawn[-1][2] == passes


def test_a_slow_run_is_drawn_at_every_step():
    recorder = Recorder()
    state = RunState("name", LAYERS, 1)
    progress = Progress(state, recorder)
    progress(PassBegin(0, 1, "prefill"))
    progress(ComputeBegin(0, "model.layers.0", 10 * MB, "resident", 0.0))
    before = len(recorder.drawn)
    progress(ComputeEnd(0, "model.layers.0", 10 * MB, 0.1, "resident"))  # and layer 1 is still on disk
    assert len(recorder.drawn) == before + 1


def test_events_of_other_threads_count_but_are_not_drawn_there():
    recorder = Recorder()
    progress = Progress(RunState("name", LAYERS, 1), recorder)

    def reading():
        for _ in range(2000):
            progress(LayerReady(1, "model.layers.1", 1, 1.0, "cache"))

    threads = [threading.Thread(target=reading) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        progress(LayerReady(1, "model.layers.1", 1, 1.0, "disk"))
    for thread in threads:
        thread.join()
    totals = progress.totals()[1]
    assert (totals.disk_nbytes, totals.cache_nbytes, totals.read_seconds) == (2000, 8000, 10000.0)
    assert {thread for _, thread, _ in recorder.drawn} == {threading.get_ident()}


def test_names_are_escaped():
    evil = '"><script>alert(1)</script>'
    state = RunState(evil, (LayerInfo(0, evil, 1, resident=True),), 4)
    state.apply(PassBegin(0, 1, "prefill"))
    html = strip.render(state)
    assert "<script" not in html
    assert html.count("&lt;script") == 3  # the model's name, the line, the hover text


@pytest.mark.parametrize(
    ("layers", "columns"),
    [(0, (24, 16, 10)), (4, (24, 16, 10)), (30, (30, 16, 15)), (32, (32, 16, 11)), (80, (27, 20, 14)), (126, (32, 21, 14))],
)
def test_rows_are_equally_long(layers, columns):
    infos = tuple(LayerInfo(index, "name", 1, resident=True) for index in range(layers))
    html = strip.render(RunState("name", infos, 1))
    assert "--wide: {}; --middle: {}; --narrow: {}".format(*columns) in html
    assert html.count("<i ") - html.split("airllm-key")[-1].count("<i ") == layers


def test_the_widget_has_a_short_constant_text(capsys):
    renderer = WidgetRenderer()
    renderer.draw(RunState("name", LAYERS, 1))
    assert capsys.readouterr().out == "\n"
    renderer.draw(RunState("name", LAYERS, 1))
    renderer.close()
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_in_a_terminal_goes_away_before_text(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    state = RunState("name", LAYERS, 4)
    progress = Progress(state, TextRenderer())
    progress(PassBegin(0, 5, "prefill"))
    compute(progress.state, 0)
    progress(ComputeBegin(1, "model.layers.1", 10 * MB, "disk", 0.0))
    assert "prompt of 5 tokens · layer 2/4 · model.layers.1 |" in sys.stderr.getvalue()
    progress.before_text()
    shown = sys.stderr.getvalue()
    assert shown.rsplit("\r", 2)[1].strip() == ""  # the line is wiped, and the text begins at its left edge
    assert shown.endswith("\r")
    progress(ComputeEnd(1, "model.layers.1", 10 * MB, 0.1, "disk"))
    progress.finish("done")
    assert sys.stderr.getvalue() == shown


def test_no_bar_in_a_pipe(capfd):
    progress = Progress(RunState("name", LAYERS, 4), TextRenderer())
    progress(PassBegin(0, 5, "prefill"))
    progress.finish("done")
    assert capfd.readouterr() == ("", "")
