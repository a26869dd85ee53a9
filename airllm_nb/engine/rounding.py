"""Rounding weights to few bits: the codes and scales that come nearest."""

from __future__ import annotations

import torch

from airllm_nb.engine.packed import PIECE, SCALES, Int4, Packing


def nearest(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Pack a weight, each number rounded to the nearest that its scale allows.

    Scales are rounded before the numbers are, so that these make up for it.

    Parameters
    ----------
    weight : torch.Tensor
        Shape (outputs, inputs), any floating dtype.
    packing : Int4 or Int8
        Must take that shape.

    Returns
    -------
    torch.Tensor
        The packed weight, uint8, flat.

    Raises
    ------
    ValueError
        If a number is none, or infinite.
    """
    outputs, inputs = weight.shape
    groups = inputs // packing.group if isinstance(packing, Int4) else 1
    codes = torch.empty((outputs, inputs), dtype=torch.uint8 if isinstance(packing, Int4) else torch.int8)
    scales, zeros = torch.empty((outputs, groups), dtype=SCALES), torch.empty((outputs, groups), dtype=SCALES)
    step = max(1, PIECE // inputs)
    round_piece = _round4 if isinstance(packing, Int4) else _round8
    for begin in range(0, outputs, step):
        piece = weight[begin : begin + step].to(torch.float32, copy=True).view(-1, groups, inputs // groups)
        part = slice(begin, begin + step)
        codes[part].view(piece.shape).copy_(round_piece(piece, scales[part], zeros[part]))
    if not (scales.isfinite().all() and zeros.isfinite().all()):
        raise ValueError("a weight is not finite")
    return packing.pack(codes, scales if groups > 1 or isinstance(packing, Int4) else scales[:, 0], zeros)


def _round4(piece: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return codes from 0 to 15 for groups of weights, shape (rows, groups, group); fills in scales and zeros."""
    low, high = piece.aminmax(dim=-1)
    scales.copy_((high - low) / 15)
    zeros.copy_(low + 8 * scales.float())
    return piece.sub_(zeros.float().unsqueeze(-1)).div_(_not_zero(scales).unsqueeze(-1)).round_().add_(8).clamp_(0, 15)


def _round8(piece: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return codes from -127 to 127 for whole rows, shape (rows, 1, inputs); fills in the scales."""
    low, high = piece.aminmax(dim=-1)
    scales.copy_(torch.maximum(high, -low) / 127)
    zeros.zero_()
    return piece.div_(_not_zero(scales).unsqueeze(-1)).round_().clamp_(-127, 127)


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    """Return scales to divide by: all numbers of a group may be equal."""
    scale = scales.float()
    return scale.masked_fill_(scale == 0, 1.0)
