"""What is converted beside reading is what PyTorch itself converts, and nothing is handed out before it is complete."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from airllm_nb.engine import conversion, weights
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.weights import GroupReader
from airllm_nb.errors import AirLLMError


class Groups(GroupReader):
    """Reads tensors as the reading thread reads layers, or as any other thread does."""

    converter = None

    def read(self, entries, into, *, keep_cached):
        if self.converter is None:
            return super().read(entries, into, keep_cached=keep_cached)
        with self.converter.converting():
            return self._read(entries, into, self.converter, keep_cached=keep_cached)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return a function that gives a reader of a checkpoint, in pieces of 4 kB."""
    monkeypatch.setattr(conversion, "BUFFER", 4096)
    monkeypatch.setattr(weights, "SMALL", 512)

    def get(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = Checkpoint(tmp_path)
        return Groups(checkpoint, Reader(checkpoint)), list(checkpoint.values())

    return get


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("into", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("beside", [True, False])
def test_as_pytorch_converts(groups, source, into, beside):
    whole = torch.randn(40_003, generator=torch.Generator().manual_seed(0)).to(source)
    whole[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40])
    small = torch.randn(7, generator=torch.Generator().manual_seed(1)).to(source)
    reader, entries = groups({"a": whole, "b": small})
    out = torch.empty(40_010, dtype=into)
    reader.converter = conversion.Converter() if beside else None
    before = threading.active_count()
    reader.read(entries, out, keep_cached=True)
    assert threading.active_count() == before
    assert torch.equal(out.view(torch.uint8), torch.cat([whole, small]).to(into).view(torch.uint8))


def test_what_is_read_waits_for_a_slow_conversion(groups, monkeypatch):
    convert, gate, order = conversion.convert, threading.Event(), []

    def slow(*args):
        assert gate.wait(20)
        convert(*args)
        order.append("converted")

    monkeypatch.setattr(conversion, "convert", slow)
    reader, entries = groups({"a": torch.ones(5000, dtype=torch.bfloat16)})
    reader.converter = conversion.Converter()
    out = torch.zeros(5000)
    threading.Timer(0.05, gate.set).start()
    reader.read(entries, out, keep_cached=True)
    order.append("returned")
    assert order == ["converted"] * 3 + ["returned"]
    assert (out == 1).all()


@pytest.mark.parametrize("size", [2000, 4000, 5000, 9000])  # one piece, two, and more
def test_an_error_is_raised_and_the_next_read_is_right(groups, monkeypatch, size):
    reader, entries = groups({"a": torch.ones(size, dtype=torch.bfloat16)})
    reader.converter = conversion.Converter()
    out = torch.zeros(size)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reader.read(entries, out, keep_cached=True)
    reader._reader.stopped = True
    with pytest.raises(AirLLMError, match="unloaded"):
        reader.read(entries, out, keep_cached=True)
    reader._reader.stopped = False
    reader.read(entries, out, keep_cached=True)
    assert (out == 1).all()
