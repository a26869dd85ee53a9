"""What the times of a run say in words."""

import pytest

from airllm_nb.events import (
    ComputeBegin,
    ComputeEnd,
    Fetching,
    LayerInfo,
    LayerReady,
    LoadBegin,
    LoadEnd,
    PassBegin,
    PassEnd,
)
from airllm_nb.notebook import strip
from airllm_nb.notebook.run_state import RunState
from airllm_nb.notebook.verdict import memory_left, time_left, verdict

MB = 1_000_000


class Run:
    """Events of passes whose layers take such times; `at` is the clock."""

    def __init__(self, layers=4, stay=0, tokens_wanted=10, memory_left=10_000 * MB, source="disk"):
        infos = tuple(LayerInfo(index, f"model.layers.{index}", 100 * MB, resident=index < stay) for index in range(layers))
        self.state = RunState("name", infos, tokens_wanted, memory_left)
        self.at = 100.0
        self.source = source

    def begin(self, between=0.0):
        self.at += between
        self.state.apply(PassBegin(0, 5, "decode", at=self.at))

    def layer(self, index, *, read=1.0, waited=0.9, compute=0.1):
        info = self.state.layers[index].info
        if info.resident:
            waited = 0.0
        else:
            self.state.apply(LayerReady(index, info.name, info.nbytes, read, self.source, at=self.at))
        self.at += waited
        self.state.apply(ComputeBegin(index, info.name, info.nbytes, self.source, waited, at=self.at))
        self.at += compute
        self.state.apply(ComputeEnd(index, info.name, info.nbytes, compute, self.source, at=self.at))

    def passes(self, number, between=0.0, **times):
        for _ in range(number):
            self.begin(between)
            for layer in self.state.layers:
                self.layer(layer.info.index, **times)
            self.state.apply(PassEnd(0, 1, 0.0, completed=True, at=self.at))
        return self.state


def test_what_it_waits_for_and_what_would_help():
    # A pass of 4.0 s waits for 3.6 of them; all four layers in memory would save those.
    assert verdict(Run().passes(3)) == "90% disk · 10% compute — 400 MB more memory would make it 10.0x faster"
    # Of the memory that is left, two more layers can be kept: 2.0 of 4.0 s are saved.
    assert verdict(Run(memory_left=299 * MB).passes(3)).endswith("— 200 MB more memory would make it 2.0x faster")
    # Where reading is nearly hidden behind computing, the first layer that stays saves all waiting, and more would not help.
    slow = Run().passes(3, read=1.0, waited=0.2, compute=0.8)
    assert verdict(slow) == "20% disk · 80% compute — 100 MB more memory would make it 1.2x faster"


def test_nothing_is_advised_that_cannot_be_had_or_does_not_help():
    assert verdict(Run(memory_left=0).passes(3)) == "90% disk · 10% compute"
    assert verdict(Run(memory_left=99 * MB).passes(3)) == "90% disk · 10% compute"
    assert verdict(Run().passes(3, waited=0.05, compute=0.95)) == "5% disk · 95% compute"
    assert verdict(Run().passes(1)) == "90% disk · 10% compute"  # a prompt's pass says nothing about those that follow


def test_the_rest_is_choosing_tokens():
    run = Run(stay=4)
    run.passes(5, between=0.1)
    assert verdict(run.state) == "all in memory · 84% compute · 16% choosing tokens"  # the last pass has none after it yet
    assert verdict(Run(stay=4).passes(3)) == "all in memory · 100% compute"


def test_the_page_cache_is_not_the_disk():
    assert verdict(Run(source="cache", memory_left=0).passes(3)) == "90% reading from the page cache · 10% compute"


def test_it_is_of_the_last_passes():
    run = Run(memory_left=0)
    run.passes(1, waited=1.9)  # the prompt's
    assert verdict(run.state) == "95% disk · 5% compute"
    run.passes(1)
    assert verdict(run.state) == "90% disk · 10% compute"
    run.passes(16, waited=0.4)
    assert verdict(run.state) == "80% disk · 20% compute"


def test_the_first_pass_speaks_while_it_goes_on():
    run = Run(layers=4, stay=1)
    assert verdict(run.state) == ""
    run.begin()
    run.layer(0)
    assert verdict(run.state) == ""  # nothing could have waited yet
    run.layer(1)
    assert verdict(run.state) == "82% disk · 18% compute"


def test_what_cannot_be_told_is_not():
    assert verdict(Run(memory_left=None).passes(3)) == ""
    loading = RunState("name", memory_left=0)
    loading.apply(LoadBegin("name", "cpu", "float32", Run().state.layers and tuple(x.info for x in Run().state.layers)))
    assert verdict(loading) == ""


def test_memory_left_is_of_this_machine(chat, monkeypatch):
    from airllm_nb import LayeredModel
    from airllm_nb.engine import memory, planning

    monkeypatch.setattr(memory, "limits", lambda **_: {"available memory": 1000 * MB, "container limit": 900 * MB})
    with LayeredModel.from_pretrained(chat, device="cpu", dtype="float32", memory="1GB") as model:
        assert memory_left(model) == 900 * MB - memory.ACTIVATIONS - planning.cache_nbytes(model.config, 4, model.dtype)
        monkeypatch.setattr(memory, "limits", lambda **_: {"available memory": 10 * MB})
        assert memory_left(model) == 0


def test_time_left_of_a_run():
    run = Run(tokens_wanted=11)
    run.passes(1, waited=9.9)
    assert time_left(run.state) == ""  # decoding has not been measured
    run.passes(1)
    assert time_left(run.state) == "about 35 s left at most"  # 9 more of 4.0 s, to the next 5
    run.begin()
    for index in range(3):
        run.layer(index)
    run.layer(3, waited=20.0)
    assert time_left(run.state) == "about 30 s left at most"  # 32: a pass that takes longer is not held against the others
    run.state.end("done")
    assert time_left(run.state) == ""


def test_time_left_of_a_prompt():
    run = Run()
    run.begin()
    run.layer(0, waited=0.9)
    assert time_left(run.state) == ""  # too early
    run.layer(1, waited=2.9)
    assert time_left(run.state) == "about 4 s to the first token"


def test_time_left_of_a_load_and_a_download():
    state = RunState("name")
    for at, done in ((10.0, 0), (40.0, 3_000)):
        state.apply(Fetching("Downloading", "a.safetensors", done, 3_000, at=at))
        state.apply(Fetching("Downloading", "b.safetensors", done // 3, 9_000, at=at))
    assert state.fraction == pytest.approx(1 / 3)
    assert time_left(state) == "about 60 s left"
    assert strip.headline(state) == "downloading · file 2/2 · 4.00 kB of 12.0 kB"
    html = strip.render(state)
    assert [words in html for words in ("a.safetensors", "b.safetensors", "3.00 kB of 3.00 kB", "1.00 kB of 9.00 kB")] == [
        True
    ] * 4
    infos = tuple(LayerInfo(index, "name", MB, resident=True) for index in range(10))
    state.apply(LoadBegin("name", "cpu", "float32", infos, at=100.0))
    state.apply(LayerReady(0, "name", MB, 1.0, "disk", at=200.0))
    assert time_left(state) == "about 15 min left"
    state.apply(LoadEnd(1.0, completed=True))
    state.end("done")
    assert time_left(state) == ""


def test_a_conversion_after_a_download_is_counted_by_itself():
    state = RunState("name")
    state.apply(Fetching("Downloading", "wheel", 93, 93, at=10.0))
    state.apply(Fetching("Converting the model", at=40.0))
    assert strip.headline(state) == "Converting the model"
    state.apply(Fetching("Converting the model", "weights", 1_000, 4_000, at=50.0))
    assert strip.headline(state) == "converting · file 1/1 · 1.00 kB of 4.00 kB"
    assert time_left(state) == "about 30 s left"
    assert "wheel" not in strip.render(state)


def test_many_files_show_those_that_are_under_way():
    state = RunState("name")
    for index, done in enumerate([100] * 5 + [50, 20] + [0] * 4):
        state.apply(Fetching("Downloading", f"part-{index}", done, 100))
    html = strip.render(state)
    assert [index for index in range(11) if f"part-{index}<" in html] == [5, 6]
    assert strip.headline(state) == "downloading · file 6/11 · 570 B of 1.10 kB"


def test_prompt_and_answer_have_a_bar_each():
    run = Run(tokens_wanted=4)
    run.begin()
    run.layer(0)
    assert '<label class="prompt now">prompt <progress max="100" value="25.0">' in strip.render(run.state)
    run.passes(1)
    run.begin()
    html = strip.render(run.state)
    assert '<label class="prompt">prompt <progress max="100" value="100.0">' in html
    assert '<label class="answer now">answer <progress' in html


def test_the_layers_of_a_plan():
    infos = tuple(LayerInfo(index, f"<{index}>", MB, resident=index < 3) for index in range(4))
    html = strip.render_layers(infos)
    assert html.count('class="resident"') == 3 + 1  # and one in the key
    assert "3 layers in memory" in html
    assert "1 layer streamed from disk" in html
    assert "&lt;0&gt;" in html
    assert "streamed" not in strip.render_layers(infos[:3])
