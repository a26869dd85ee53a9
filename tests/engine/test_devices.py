import pytest
import torch

from airllm_nb.engine import devices
from airllm_nb.errors import DeviceError

CPU = torch.device("cpu")


def test_every_device_that_cannot_be_used_says_why():
    found = {info.name: info for info in devices.devices()}
    assert found["cpu"].usable
    assert {"mps", "xpu"} <= set(found)
    for info in found.values():
        assert info.reason
        if torch.version.cuda is None and info.name == "cuda":
            assert (info.usable, info.reason) == (False, "this PyTorch is built without CUDA")


def test_auto_tells_what_it_chose():
    device, reason = devices.select_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert reason.startswith("auto: ")


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda", "cuda:0"])
def test_never_a_silent_fallback(name):
    usable = [info.name for info in devices.devices() if info.usable]
    if any(info.startswith(name) for info in usable):
        assert devices.select_device(name)[0].type == name.partition(":")[0]
    else:
        with pytest.raises(DeviceError, match=r"cannot be used here: .+\. Use device="):
            devices.select_device(name)


def test_auto_dtype_is_the_published_one_or_float32_and_says_why():
    for published in (torch.bfloat16, torch.float16, torch.float32):
        dtype, reason = devices.select_dtype("auto", published, CPU)
        assert dtype in (published, torch.float32)
        assert str(published).removeprefix("torch.") in reason


def test_a_busy_neighbour_does_not_choose_the_dtype(monkeypatch):
    """Most measurements are ten times too long, whichever they hit: the choice is that of a quiet machine."""
    moments = iter(range(10**6))
    clock = [0.0]

    def linear(inputs, _weight):
        disturbed = next(moments) % 7
        clock[0] += (1.0 if inputs.dtype == torch.float32 else 0.5) * (10 if disturbed else 1)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    assert devices._linear_ratio.__wrapped__(torch.bfloat16, width=8) == 0.5


@pytest.mark.parametrize("faster", [True, False])
def test_auto_dtype_follows_the_measurement(monkeypatch, faster):
    monkeypatch.setattr(devices, "_linear_ratio", lambda _dtype: 0.5 if faster else 3.0)
    dtype, reason = devices.select_dtype("auto", torch.bfloat16, CPU)
    assert dtype == (torch.bfloat16 if faster else torch.float32)
    assert ("0.50" if faster else "3.0 times") in reason


def test_dtype_by_any_of_its_names():
    for name in ("bfloat16", "bf16", "torch.bfloat16", torch.bfloat16):
        assert devices.select_dtype(name, torch.float32, CPU) == (torch.bfloat16, "as asked")
