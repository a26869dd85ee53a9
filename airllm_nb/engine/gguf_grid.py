"""Tensors of GGUF files that lie on a grid of 16 steps for each 32 weights already: packed as they are, without rounding anew."""

from __future__ import annotations

from typing import Any

import torch

from airllm_nb.engine.packed import PIECE, SCALES, Int4, Packing

GROUP = 32
"""Weights that share a scale in each of these quantizations."""
CENTRE = 8
"""The code that means zero and nothing else: see `Int4`."""
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144}
"""Of a block of 32 or 256 weights; their layout: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h."""


def lies_on(kind: Any, packing: Packing) -> bool:
    """Tell whether weights that a file has as `kind` need no rounding to be packed so."""
    return kind.name in BYTES and packing == Int4(GROUP)


def repack(raw: torch.Tensor, kind: Any, shape: tuple[int, ...], order: torch.Tensor | None = None) -> torch.Tensor:
    """Pack a tensor of a file with its own codes; only its scales are rounded, to those of `Int4`.

    Parameters
    ----------
    raw : torch.Tensor
        Its bytes, uint8 and flat.
    kind : gguf.GGMLQuantizationType
        How they are quantized: `lies_on` tells which.
    shape : tuple of int
        Outputs and inputs.
    order : torch.Tensor, optional
        For each row which row of the file it is.

    Returns
    -------
    torch.Tensor
        The packed weight, uint8, flat.

    Raises
    ------
    ValueError
        If a scale is not finite.
    """
    outputs, inputs = shape
    codes = torch.empty(shape, dtype=torch.uint8)
    scales = torch.empty((outputs, inputs // GROUP), dtype=SCALES)
    zeros = torch.empty_like(scales)
    rows = raw.view(outputs, -1)
    step = max(1, PIECE // inputs)
    take = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}[kind.name]
    for part in (slice(begin, begin + step) for begin in range(0, outputs, step)):
        chosen = rows[part] if order is None else rows[order[part]]
        found, scale, zero = take(chosen.reshape(-1, BYTES[kind.name]))
        codes[part] = found.view(-1, inputs)
        scales[part], zeros[part] = scale.view(-1, inputs // GROUP), zero.view(-1, inputs // GROUP)
    if not (scales.isfinite().all() and zeros.isfinite().all()):
        raise ValueError("a weight is not finite")
    return Int4(GROUP).pack(codes, scales, zeros)


Grid = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""For blocks: codes from 0 to 15, uint8, and for each 32 of them in float32 the scale and what code 8 means."""


def _q4_0(blocks: torch.Tensor) -> Grid:
    scale = _halves(blocks[:, :2])
    return _nibbles(blocks[:, 2:]), scale, torch.zeros_like(scale)


def _q4_1(blocks: torch.Tensor) -> Grid:
    both = _halves(blocks[:, :4])
    scale, least = both[:, :1], both[:, 1:]
    return _nibbles(blocks[:, 4:]), scale, least + CENTRE * scale


def _q4_k(blocks: torch.Tensor) -> Grid:
    """Blocks of 8 groups, whose scales and minima have 6 bits: the upper two of the last four lie beside the first four."""
    both = _halves(blocks[:, :4])
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low & 63, rest & 15 | low >> 2 & 48], dim=1) * both[:, :1]
    below = torch.cat([high & 63, rest >> 4 | high >> 2 & 48], dim=1) * both[:, 1:]
    return _nibbles(blocks[:, 16:].reshape(-1, GROUP)), scale, CENTRE * scale - below


def _nibbles(pairs: torch.Tensor) -> torch.Tensor:
    """Return what the lower halves of bytes say, and after them the upper ones."""
    return torch.cat([pairs & 15, pairs >> 4], dim=1)


def _halves(raw: torch.Tensor) -> torch.Tensor:
    return raw.contiguous().view(torch.float16).float()
