"""Runs that never happened: the engine's events with times as wished, and the answer that they leave."""

from airllm_nb.events import ComputeBegin, ComputeEnd, LayerInfo, LayerRead, LayerReady, PassBegin, PassEnd
from airllm_nb.notebook.run_state import RunState
from airllm_nb.notebook.summary import Answer, Settings

MB = 1_000_000


class Written(list):
    """Pieces of text, and what they make together."""

    @property
    def text(self):
        return "".join(self)


class Run:
    """One run: `go` makes passes; then there are its `timeline` and its `answer`."""

    def __init__(self, layers, streamed=()):
        infos = tuple(LayerInfo(index, f"model.layers.{index}", MB, index not in streamed) for index in range(layers))
        self.state = RunState("name", infos, 10**6)
        self.now = 1000.0
        self.index = 0

    def begin(self):
        self.state.apply(PassBegin(self.index, 1, "decode", at=self.now))

    def end(self, completed=True):
        self.state.apply(PassEnd(self.index, 1, 0.0, completed, at=self.now))
        self.index += 1

    def compute(self, index, read=0.0, waited=0.0, computed=0.0):
        info = self.state.layers[index].info
        source = "resident" if info.resident else "disk"
        waits = 0.0 if info.resident else waited
        self.now += waits
        if not info.resident:
            self.state.apply(LayerRead(index, info.name, MB, at=self.now - read))
            self.state.apply(LayerReady(index, info.name, MB, read, "disk", at=self.now))
        self.state.apply(ComputeBegin(index, info.name, MB, source, waits, at=self.now))
        self.now += computed
        self.state.apply(ComputeEnd(index, info.name, MB, computed, source, at=self.now))

    def go(self, passes, *, other=0.0, **times):
        for _ in range(passes):
            self.begin()
            for index in range(len(self.state.layers)):
                self.compute(index, **times)
            self.now += other
            self.end()
        return self

    @property
    def timeline(self):
        return self.state.recorder.timeline()

    def answer(self, text="text", stopped="end", **settings):
        layers = tuple(layer.totals() for layer in self.state.layers)
        resident = sum(layer.resident for layer in layers)
        made_with = {
            "model": "name", "device": "cpu", "dtype": "float32", "used_nbytes": 100 * MB, "budget_nbytes": 250 * MB,
            "resident": resident, "streamed": len(layers) - resident, "max_new_tokens": 10, "temperature": 0.0,
            "top_p": None, "seed": None, "stop": (), "system": None,
        }  # fmt: skip
        return Answer(
            text, tuple(range(self.index)), 5, self.now - 1000, stopped, layers, Settings(**made_with | settings), self.timeline
        )
