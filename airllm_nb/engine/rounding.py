"""Rounding weights to few bits: the codes and scales that come nearest."""

from __future__ import annotations

from typing import NamedTuple

import torch

from airllm_nb.engine.packed import PIECE, SCALES, Int4, Packing

LEVELS = 16
SHRINK = (1.0, 0.92, 0.84)
"""Shares of a group's range that are tried: what lies outside is rounded to its ends, and all else is rounded finer."""


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
    total, size, products = weighted.sum(dim=-1), counts.sum(), torch.empty_like(numbers)

    def sums(codes: torch.Tensor) -> _Sums:
        squares = torch.mul(codes, codes, out=products) @ counts
        return _Sums(size, total, codes @ counts, squares, torch.mul(codes, weighted, out=products).sum(dim=-1))

    codes = _codes(numbers, scales, zeros)
    found = sums(codes)
    least = found.error(scales, zeros.float() - middle)
    for share in SHRINK:
        if share < 1:
            trial = inverse((high - low) * (share / (LEVELS - 1)))
            found = sums(torch.mul(centred, trial.unsqueeze(-1), out=codes).sub_(0.5).round_().clamp_(-8, 7))
        scale, shift = found.fit()
        zero = (shift + middle).to(SCALES)
        error = found.error(scale, zero.float() - middle)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return _codes(numbers, scales, zeros).add_(LEVELS // 2), scales, zeros


def _codes(numbers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes, from -8 to 7."""
    steps = inverse(scales.float()).unsqueeze(-1)
    return torch.sub(numbers, zeros.float().unsqueeze(-1)).mul_(steps).round_().clamp_(-LEVELS // 2, LEVELS // 2 - 1)


class _Sums(NamedTuple):
    """Sums over each group, from which least squares of ``numbers = codes * scale + shift`` follow in closed form.

    Of what each number counts, of the numbers, the codes, their squares, and the products of numbers and codes.
    """

    size: torch.Tensor
    numbers: torch.Tensor
    codes: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor

    def fit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best scale, as it is stored, and the best shift that goes with that."""
        spread = self.squares - self.codes * self.codes / self.size
        slope = (self.products - self.numbers * self.codes / self.size) / spread
        scale = torch.where(spread > 0, slope, 0.0).to(SCALES)
        return scale, (self.numbers - scale.float() * self.codes) / self.size

    def error(self, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Return the squared error but for the squares of the numbers, which all have in common."""
        slope = scale.float()
        mixed = slope * (slope * self.squares + 2 * shift * self.codes - 2 * self.products)
        return mixed + shift * (shift * self.size - 2 * self.numbers)


def _round8(piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes from -127 to 127 for whole rows, shape (rows, 1, inputs), and their scales; zeros are 0."""
    scales = torch.maximum(piece.amax(dim=-1), -piece.amin(dim=-1)).div_(127).to(SCALES)
    codes = piece.mul_(inverse(scales.float()).unsqueeze(-1)).round_().clamp_(-127, 127)
    return codes, scales, torch.zeros_like(scales)


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """Return what to multiply by instead of dividing by scales: all numbers of a group may be equal."""
    return torch.where(scales == 0, 0.0, 1 / scales)
