"""How a linear layer computes one row on the CPU: as transformers does, or by the kernel that is measured to be fastest.

Decoding multiplies one row with every weight. PyTorch has several kernels for that, all correct; they add up in different orders,
and which of them reads memory fastest depends on the CPU and the shape. Some of them are never taken by ``linear``.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from airllm_nb.engine import threads
from airllm_nb.errors import AirLLMError, DeviceError

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Of input (..., in) that is one row, weight (out, in), bias (out) or None: the output (..., out). Copies no weight."""

MODES = ("exact", "measured")
SAMPLE = 64 << 20
"""Bytes of weight that are measured; a higher one is measured by its first rows."""
POOL = 192 << 20
"""Bytes that the measured weights are taken from in turn: they shall come from memory, as a model's do, and not from a cache."""
ROUNDS = 15
INPUTS = 4
NOISE = 1.01
"""Two errors that differ by less are the same: that of bfloat16 is nearly all rounding of the output."""
WORTH = 0.9
"""A kernel is taken if it needs less than this share of the time of ``linear``."""


class Shape(NamedTuple):
    """What a kernel is chosen by: rows and columns of the weight, its dtype, whether there is a bias."""

    outputs: int
    inputs: int
    dtype: torch.dtype
    bias: bool


@dataclass(frozen=True)
class Choice:
    """The kernel for a shape.

    Attributes
    ----------
    shape : Shape
    count : int
        How many modules have it.
    kernel : str
        Name in `kernels()`.
    ratio : float
        Its time over that of ``linear``; 1 for ``linear`` itself.
    """

    shape: Shape
    count: int
    kernel: str
    ratio: float

    def __str__(self) -> str:
        gain = f" in {self.ratio:.2f} of linear's time" if self.kernel != "linear" else ""
        return f"{self.shape.outputs}x{self.shape.inputs} by {self.kernel}{gain}"


class Measured(NamedTuple):
    """One candidate: its time over that of ``linear``, and its relative error (root mean square, against float64)."""

    ratio: float
    error: float


class MeasuredLinear(nn.Linear):
    """A linear layer that has a kernel of its own for one row; for more rows it is the usual one."""

    kernel: Kernel

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as nn.Linear names it
        """Multiply. One row is told by its size: in decoding it has shape (1, 1, in). Not every kernel has a gradient."""
        one = input.numel() == self.in_features and input.shape[-1:] == (self.in_features,)
        if one and input.dtype == self.weight.dtype and not torch.is_grad_enabled():
            return self.kernel(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def _mv(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    flat = row.reshape(-1)
    out = torch.mv(weight, flat) if bias is None else torch.addmv(bias, weight, flat)
    return out.view(*row.shape[:-1], -1)


def _bmm(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    batch, columns = row.reshape(1, 1, -1), weight.t().unsqueeze(0)
    out = torch.bmm(batch, columns) if bias is None else torch.baddbmm(bias, batch, columns)
    return out.view(*row.shape[:-1], -1)


def _mm(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    column = row.reshape(-1, 1)
    out = torch.mm(weight, column) if bias is None else torch.addmm(bias.unsqueeze(1), weight, column)
    return out.view(*row.shape[:-1], -1)


def _onednn(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(row, weight, bias, "none", [], "")  # noqa: SLF001  # has no public form
    return out


def kernels() -> dict[str, Kernel]:
    """Return the kernels that PyTorch may have; one that this CPU lacks for a dtype raises RuntimeError."""
    found: dict[str, Kernel] = {"linear": linear, "mv": _mv, "bmm": _bmm, "mm": _mm}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["onednn"] = _onednn
    return found


def require_mode(mode: str, device: torch.device) -> None:
    """Refuse a mode that there is not, or not on this device.

    Raises
    ------
    AirLLMError
        If there is no such mode.
    DeviceError
        If kernels should be measured on anything but the CPU.
    """
    if mode not in MODES:
        raise AirLLMError(f"There are no {mode!r} kernels.", 'Use kernels="exact" (as transformers computes) or "measured".')
    if mode == "measured" and device.type != "cpu":
        raise DeviceError(
            f"Kernels are measured on the CPU only, and this model computes on {device}.", 'Use kernels="exact", or device="cpu".'
        )


def shapes(model: nn.Module) -> Counter[Shape]:
    """Return the shapes of a model's plain linear layers, and how often each occurs. Modules that only inherit do not count."""
    return Counter(_shape(module) for module in model.modules() if _is_plain(module))


def choose(found: Mapping[Shape, int], room: int) -> tuple[Choice, ...]:
    """Measure the kernels for each shape on this CPU, with the threads that compute; takes about a second a shape.

    Parameters
    ----------
    found : mapping of Shape to int
        As from `shapes`.
    room : int
        Bytes that measuring may use, about: the model's own, before its weights are read.
    """
    if not found:
        return ()
    with threads.applied() as (number, _):
        if any((shape, number) not in _known for shape in found):
            pool = torch.empty(min(POOL, room // 2, _nbytes(found)), dtype=torch.uint8, device="cpu")
            for shape in found:
                if (shape, number) not in _known:
                    _known[shape, number] = best(measure(shape, pool))
    by_size = sorted(found.items(), key=lambda item: -_nbytes(dict([item])))
    return tuple(Choice(shape, count, *_known[shape, number]) for shape, count in by_size)


_known: dict[tuple[Shape, int], tuple[str, float]] = {}
"""What was measured in this process, by shape and number of threads: loading again does not choose again."""


def best(measured: Mapping[str, Measured]) -> tuple[str, float]:
    """Return the fastest kernel whose error is no larger than that of ``linear``, and its time over linear's."""
    bound = measured["linear"].error * NOISE
    allowed = {name: ratio for name, (ratio, error) in measured.items() if error <= bound and ratio < WORTH}
    name = min(allowed, key=allowed.__getitem__, default="linear")
    return name, allowed.get(name, 1.0)


def measure(shape: Shape, pool: torch.Tensor) -> dict[str, Measured]:
    """Measure every kernel that can compute a shape, side by side; one that this CPU lacks is left out.

    Parameters
    ----------
    shape : Shape
    pool : torch.Tensor
        Flat uint8 memory on the CPU that the weights are put into.
    """
    weights, bias, inputs = _sample(shape, pool)
    with torch.no_grad():
        errors = _errors(weights[0], bias, inputs)
        seconds: dict[str, list[float]] = {name: [] for name in errors}
        turn = 0
        for _ in range(ROUNDS):
            for name in errors:  # one after the other, so that whatever disturbs the machine disturbs all of them
                turn += 1
                begin = time.perf_counter()
                kernels()[name](inputs[0], weights[turn % len(weights)], bias)
                seconds[name].append(time.perf_counter() - begin)
    # The least: whatever else the machine does can only add to a time.
    return {name: Measured(min(times) / min(seconds["linear"]), errors[name]) for name, times in seconds.items()}


def use(model: nn.Module, mode: str, room: int) -> str:
    """Let a model without weights compute by the kernels of a mode.

    Parameters
    ----------
    model : nn.Module
        Its parameters may be on meta.
    mode : str
        One that `require_mode` has let pass. ``"exact"`` touches nothing.
    room : int
        See `choose`.

    Returns
    -------
    str
        What was chosen, for people.
    """
    if mode == "exact":
        return ""
    choices = choose(shapes(model), room)
    attach(model, choices)
    return describe(choices)


def attach(model: nn.Module, choices: tuple[Choice, ...]) -> None:
    """Let a model's plain linear layers compute one row by the kernels that were chosen; those of ``linear`` stay as they are."""
    available = kernels()
    chosen = {choice.shape: available[choice.kernel] for choice in choices if choice.kernel != "linear"}
    for module in model.modules():
        if _is_plain(module) and (kernel := chosen.get(_shape(module))) is not None:
            module.__class__ = MeasuredLinear
            vars(module)["kernel"] = kernel


def describe(choices: tuple[Choice, ...]) -> str:
    """Say what was chosen, and what it gains over all linear layers: ``measured: 8192x3072 by mv in 0.70 of linear's time``."""
    if all(choice.kernel == "linear" for choice in choices):
        return "measured: linear is the fastest here for every shape, as in exact"
    sizes = [choice.count * choice.shape.outputs * choice.shape.inputs for choice in choices]
    share = sum(size * choice.ratio for size, choice in zip(sizes, choices, strict=True)) / sum(sizes)
    return f"measured: one row in {share:.2f} of linear's time: {', '.join(map(str, choices))}"


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)


def _nbytes(found: Mapping[Shape, int]) -> int:
    return sum(count * shape.outputs * shape.inputs * shape.dtype.itemsize for shape, count in found.items())


def _shape(module: nn.Module) -> Shape:
    assert isinstance(module, nn.Linear)
    return Shape(module.out_features, module.in_features, module.weight.dtype, module.bias is not None)


def _sample(shape: Shape, pool: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor]]:
    """Return weights that lie one after the other in `pool`, a bias, and inputs, each random and of the scale of a model's."""
    generator = torch.Generator().manual_seed(0)
    row = shape.inputs * shape.dtype.itemsize
    rows = max(1, min(shape.outputs, SAMPLE // row, pool.numel() // row))
    size = rows * row
    block = (torch.randn(min(rows * shape.inputs, 1 << 20), generator=generator) * 0.02).to(shape.dtype)
    weights: list[torch.Tensor] = []
    for number in range(max(1, pool.numel() // size)):
        flat = pool[number * size : (number + 1) * size].view(shape.dtype)
        for begin in range(0, flat.numel(), block.numel()):
            flat[begin : begin + block.numel()] = block[: flat.numel() - begin]
        # As from_pretrained makes them: `linear` chooses its way by it.
        weights.append(nn.Parameter(flat.view(rows, shape.inputs)))
    bias = torch.randn(rows, generator=generator).to(shape.dtype) if shape.bias else None
    inputs = [torch.randn(1, 1, shape.inputs, generator=generator).to(shape.dtype) for _ in range(INPUTS)]
    return weights, bias, inputs


def _errors(weight: torch.Tensor, bias: torch.Tensor | None, inputs: list[torch.Tensor]) -> dict[str, float]:
    """Return the relative error of each kernel that computes at all; in pieces, as float64 takes up to four times the memory."""
    outputs: dict[str, torch.Tensor] = {}
    for name, kernel in kernels().items():
        with contextlib.suppress(RuntimeError):  # oneDNN has no bfloat16 on older CPUs, for one
            outputs[name] = torch.stack([kernel(row, weight, bias).flatten() for row in inputs])
    rows = torch.cat([row.view(1, -1) for row in inputs]).double()
    exact = torch.cat([rows @ part.double().T for part in torch.split(weight, 1024)], dim=1)
    if bias is not None:
        exact += bias.double()
    return {name: float((output.double() - exact).norm() / exact.norm()) for name, output in outputs.items()}
