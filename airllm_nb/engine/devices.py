"""Which devices there are, for each one that cannot be used the reason, and which dtype to compute in."""

from __future__ import annotations

import functools
import math
import time
import warnings
from dataclasses import dataclass

import torch

from airllm_nb.engine import threads
from airllm_nb.errors import DeviceError

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class DeviceInfo:
    """One device: its `name` for ``device=``, a `label` for people, and why it is not `usable`."""

    name: str
    label: str
    usable: bool
    reason: str


def devices() -> tuple[DeviceInfo, ...]:
    """Return the CPU and every kind of accelerator that PyTorch knows, usable or not."""
    number = threads.compute_threads().number
    return (
        DeviceInfo("cpu", f"CPU ({number} thread{'' if number == 1 else 's'})", usable=True, reason="always there"),
        *_cuda(),
        _mps(),
        _xpu(),
    )


def _cuda() -> list[DeviceInfo]:
    reason = _cuda_reason()
    if reason:
        return [DeviceInfo("cuda", "CUDA", usable=False, reason=reason)]
    return [
        DeviceInfo(f"cuda:{index}", torch.cuda.get_device_name(index), usable=True, reason="ready")
        for index in range(torch.cuda.device_count())
    ]


def _cuda_reason() -> str:
    """Return why CUDA cannot be used, in words, or an empty string."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without CUDA"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the exception too
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.get_device_properties(0)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().split(". ")[0].split("\n")[0].rstrip(".")
        return first[:1].lower() + first[1:] if first.startswith(("Found", "The", "No ")) else first
    return ""


def _mps() -> DeviceInfo:
    if not torch.backends.mps.is_built():
        return DeviceInfo("mps", "Apple GPU", usable=False, reason="this PyTorch is built without MPS")
    usable = torch.backends.mps.is_available()
    return DeviceInfo("mps", "Apple GPU", usable=usable, reason="ready" if usable else "no Apple GPU, or macOS older than 12.3")


def _xpu() -> DeviceInfo:
    if not hasattr(torch, "xpu") or not torch.xpu._is_compiled():  # noqa: SLF001  # has no public form
        return DeviceInfo("xpu", "Intel GPU", usable=False, reason="this PyTorch is built without XPU")
    usable = torch.xpu.is_available()
    return DeviceInfo("xpu", "Intel GPU", usable=usable, reason="ready" if usable else "no Intel GPU driver found")


def select_device(wanted: str | torch.device) -> tuple[torch.device, str]:
    """Turn what the user asks for into a device, and say why it was chosen.

    Parameters
    ----------
    wanted : str or torch.device
        ``"auto"`` takes the first CUDA device, else the CPU; anything else is taken at its word.

    Raises
    ------
    DeviceError
        If there is no such device or it cannot be used here: there is no silent fallback.
    """
    name = str(wanted).strip().lower()
    if name in ("cpu", "cpu:0"):  # touches nothing but the CPU, not even to look
        return torch.device("cpu"), "as asked"
    cuda = _cuda()
    if name == "auto":
        if cuda[0].usable:
            return torch.device(cuda[0].name), f"auto: {cuda[0].label} is ready"
        return torch.device("cpu"), f"auto: {cuda[0].reason}"
    known = (*cuda, _mps(), _xpu())
    kind, _, number = name.partition(":")
    matching = [info for info in known if info.name.partition(":")[0] == kind]
    if not matching or (number and not number.isdigit()):
        raise DeviceError(f"There is no device {name!r}.", 'Use "auto", "cpu", "cuda", "cuda:0", "mps" or "xpu".')
    if not matching[0].usable:
        raise DeviceError(f"{kind.upper()} cannot be used here: {matching[0].reason}.", 'Use device="cpu", or "auto".')
    index = int(number or 0)
    if index >= len(matching):
        names = ", ".join(info.name for info in matching)
        raise DeviceError(f"There is no device {name!r}: this machine has {names}.", "Use one of these.")
    return torch.device(matching[index].name), "as asked"


def select_dtype(wanted: str | torch.dtype, published: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """Turn what the user asks for into the dtype to compute in, and say why.

    Parameters
    ----------
    wanted : str or torch.dtype
        ``"auto"`` chooses between the checkpoint's own dtype and float32, never a third one: float16 overflows where its
        authors did not plan for it.
    published : torch.dtype
        The dtype of the checkpoint.
    device : torch.device
        Where it will compute.

    Raises
    ------
    DeviceError
        If it is no floating dtype that models compute in.
    """
    if isinstance(wanted, torch.dtype) or wanted != "auto":
        dtype = wanted if isinstance(wanted, torch.dtype) else DTYPES.get(str(wanted).strip().lower().removeprefix("torch."))
        if dtype not in DTYPES.values():
            raise DeviceError(f"There is no dtype {wanted!r} to compute in.", 'Use "auto", "float32", "bfloat16" or "float16".')
        assert dtype is not None
        return dtype, "as asked"
    own = str(published).removeprefix("torch.")
    if published not in (torch.bfloat16, torch.float16):
        return torch.float32, f"auto: the checkpoint is {own}"
    if device.type == "cuda" and published == torch.bfloat16 and not _computes_bfloat16(device):
        return torch.float32, "auto: this GPU does not compute bfloat16"
    if device.type != "cpu":
        return published, f"auto: the checkpoint is {own}"
    ratio = _linear_ratio(published)
    if ratio <= 1:
        return published, f"auto: the checkpoint is {own}, which takes {ratio:.2f} of float32's time on this CPU"
    return torch.float32, f"auto: the checkpoint is {own}, which takes {ratio:.1f} times float32's time on this CPU"


def _computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a GPU has bfloat16; PyTorch's own answer counts those that only emulate it, slowly (a T4, for one)."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8  # noqa: PLR2004  # Ampere


@functools.cache
def _linear_ratio(dtype: torch.dtype, width: int = 2048, rounds: int = 9) -> float:
    """Measure, once, how long linear layers take on this CPU in a dtype over float32: for 1 row (decoding) and 32 (a prompt).

    In turn, and the least of each counts: a busy neighbour, which may make any of them ten times slower, decides nothing as long
    as it rests now and then. The weight (8 or 16 MB) is larger than a core's cache, as in a model.
    """
    cases = [(kind, rows) for rows in (1, 32) for kind in (dtype, torch.float32)]
    seconds = dict.fromkeys(cases, math.inf)
    with threads.applied():
        weights = {kind: torch.ones(width, width, dtype=kind, device="cpu") for kind in (dtype, torch.float32)}
        for _ in range(rounds):  # the first one also prepares the kernels
            for kind, rows in cases:
                inputs = torch.ones(rows, width, dtype=kind, device="cpu")
                begin = time.perf_counter()
                torch.nn.functional.linear(inputs, weights[kind])
                seconds[kind, rows] = min(seconds[kind, rows], time.perf_counter() - begin)
    return sum(seconds[dtype, rows] for rows in (1, 32)) / sum(seconds[torch.float32, rows] for rows in (1, 32))
