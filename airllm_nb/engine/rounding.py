"""Rounding weights to few bits: the codes and scales that come nearest."""

from __future__ import annotations

import torch

from airllm_nb.engine.packed import PIECE, SCALES, Int4, Packing

LEVELS = 16
SHRINK = (1.0, 0.92, 0.84)
"""Shares of a group's range that are tried: what lies outside is rounded to the end, and all else is rounded finer."""


def nearest(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Pack a weight, each number rounded to the nearest that its scale allows.

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
    round_piece = round4 if isinstance(packing, Int4) else _round8
    for begin in range(0, outputs, step):
        piece = weight[begin : begin + step].to(torch.float32, copy=True).view(-1, groups, inputs // groups)
        part = slice(begin, begin + step)
        rounded, scales[part], zeros[part] = round_piece(piece)
        codes[part].view(piece.shape).copy_(rounded)
    if not (scales.isfinite().all() and zeros.isfinite().all()):
        raise ValueError("a weight is not finite")
    return packing.pack(codes, scales if groups > 1 or isinstance(packing, Int4) else scales[:, 0], zeros)


def round4(numbers: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups of numbers to 16 levels each, with scales and zeros of (nearly) the least squared error.

    Several shares of the range are tried. With the codes that each gives, scale and zero follow by least squares, in closed
    form, and so does their error; with the best of them codes are chosen anew. Never worse than the plain grid from the least
    number to the greatest, which is kept where nothing is better: numbers that lie on such a grid stay there.

    Parameters
    ----------
    numbers : torch.Tensor
        Shape (rows, groups, group), float32.
    importance : torch.Tensor, optional
        What a squared error of each number of a group counts, shape (group,), float32, all positive. All the same if not given.

    Returns
    -------
    codes : torch.Tensor
        From 0 to 15, as float32, of the shape of `numbers`.
    scales, zeros : torch.Tensor
        In the dtype that they are stored in, shape (rows, groups).
    """
    counts = torch.ones(numbers.shape[-1]) if importance is None else importance
    low, high = numbers.amin(dim=-1), numbers.amax(dim=-1)
    scales = ((high - low) / (LEVELS - 1)).to(SCALES)
    zeros = (low + LEVELS // 2 * scales.float()).to(SCALES)
    # About the middle of the range, where sums of squares lose the least.
    middle = (low + high) / 2
    centred = numbers - middle.unsqueeze(-1)
    weighted = centred if importance is None else centred * counts
    moments = _Moments(counts.sum(), weighted.sum(dim=-1))
    best, least = (scales, zeros), torch.full_like(low, torch.inf)
    codes, products = torch.empty_like(numbers), torch.empty_like(numbers)
    for share in SHRINK:
        trial = (high - low) * (share / (LEVELS - 1))
        torch.mul(centred, inverse(trial).unsqueeze(-1), out=codes).sub_(0.5).round_().clamp_(-8, 7)
        codes_sum = codes @ counts
        squares = torch.mul(codes, codes, out=products) @ counts
        mixed = torch.mul(codes, weighted, out=products).sum(dim=-1)
        scale, zero, error = moments.fit(codes_sum, squares, mixed, middle)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
    plain, found = _error(numbers, scales, zeros, counts, codes), _error(numbers, *best, counts, products)
    better = found < plain
    codes = torch.where(better.unsqueeze(-1), products, codes)
    return codes.add_(LEVELS // 2), torch.where(better, best[0], scales), torch.where(better, best[1], zeros)


class _Moments:
    """Least squares of ``numbers = codes * scale + zero`` for each group, from sums over the group."""

    def __init__(self, count: torch.Tensor, total: torch.Tensor) -> None:
        self.count, self.total = count, total

    def fit(
        self, codes: torch.Tensor, squares: torch.Tensor, mixed: torch.Tensor, middle: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scale and zero as they are stored, and their error but for what does not depend on them.

        Given the sums of codes, of their squares, and of their products with the numbers less `middle`.
        """
        spread = squares - codes * codes / self.count
        scale = torch.where(spread > 0, (mixed - self.total * codes / self.count) / spread.clamp_min(1e-30), 0.0).to(SCALES)
        shift = (self.total - scale.float() * codes) / self.count
        zero = (shift + middle).to(SCALES)
        slope, shift = scale.float(), zero.float() - middle
        error = slope * (slope * squares + 2 * shift * codes - 2 * mixed) + shift * (shift * self.count - 2 * self.total)
        return scale, zero, error


def _error(
    numbers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, counts: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Fill `codes` with the nearest ones, from -8 to 7; returns the squared error of each group."""
    zero, scale = zeros.float().unsqueeze(-1), scales.float().unsqueeze(-1)
    off = torch.sub(numbers, zero)
    torch.mul(off, inverse(scale), out=codes).round_().clamp_(-LEVELS // 2, LEVELS // 2 - 1)
    off.sub_(codes * scale)
    return off.mul_(off) @ counts


def _round8(piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes from -127 to 127 for whole rows, shape (rows, 1, inputs), and their scales; zeros are 0."""
    scales = torch.maximum(piece.amax(dim=-1), -piece.amin(dim=-1)).div_(127).to(SCALES)
    codes = piece.mul_(inverse(scales.float()).unsqueeze(-1)).round_().clamp_(-127, 127)
    return codes, scales, torch.zeros_like(scales)


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """Return what to multiply by instead of dividing by scales: all numbers of a group may be equal."""
    return torch.where(scales == 0, 0.0, 1 / scales)
