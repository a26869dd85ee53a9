"""Tensors of GGUF files that lie on a grid of 16 steps for each 32 weights already: packed as they are, without rounding anew."""

from __future__ import annotations

from typing import Any

import torch

from airllm_nb.engine.gguf_blocks import parts
from airllm_nb.engine.packed import PIECE, SCALES, Int4, Packing

GROUP = 32
"""Weights that share a scale in each of these quantizations."""
CENTRE = 8
"""The code that `Int4` takes for zero."""
KINDS = ("Q4_0", "Q4_1", "Q4_K")


def lies_on(kind: Any, packing: Packing) -> bool:
    """Tell whether weights that a file has as `kind`, a ``gguf.GGMLQuantizationType``, need no rounding to be packed so."""
    return kind.name in KINDS and isinstance(packing, Int4) and packing.group == GROUP


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
    for part in (slice(begin, begin + step) for begin in range(0, outputs, step)):
        chosen = rows[part] if order is None else rows[order[part]]
        found = parts(chosen.numpy(), kind.name)
        scale = torch.from_numpy(found.scales).view(-1, inputs // GROUP)
        codes[part] = torch.from_numpy(found.codes).view(-1, inputs)
        scales[part] = scale
        zeros[part] = (CENTRE - found.centre) * scale
        if found.least is not None:
            zeros[part] = (CENTRE - found.centre) * scale + torch.from_numpy(found.least).view(scale.shape)
    if not (scales.isfinite().all() and zeros.isfinite().all()):
        raise ValueError("a weight is not finite")
    return Int4(GROUP).pack(codes, scales, zeros)
