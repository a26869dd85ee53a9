"""Error-compensated rounding (GPTQ): each column of a weight is rounded so as to make up for what rounding the others has cost.

What is made small is ``||X W^T - X Q^T||``, the error of a linear layer's outputs for inputs that it has seen, instead of that of
its weights: the sum over the rows ``e`` of ``W - Q`` of ``e G e^T``, with the Gram matrix ``G = X^T X`` of the inputs (half of
GPTQ's Hessian). The method is that of Frantar et al. 2022 (arXiv:2210.17323), in the form of Chee et al. 2023 (arXiv:2307.13304,
theorem 6: the same numbers), which needs no inverse: with ``G = L D L^T``, L lower triangular with ones on its diagonal, the sum
is that of the squares of ``e L``, weighted by D. Column k of ``e L`` is the error of column k and what those after it have left,
so from the last column to the first, each is rounded to what makes it least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from airllm_nb.engine.conversion import SERIAL
from airllm_nb.engine.packed import SCALES, Int4
from airllm_nb.engine.rounding import inverse, round4

DAMPING = 0.01
"""Share of the mean of G's diagonal that is added to it, as in GPTQ: few tokens do not reach all directions of the inputs."""
TRIES = 4  # each with ten times the damping, where rounding errors make G indefinite
ROWS = 1024
"""Inputs that are converted to float32 at once."""


class Factor(NamedTuple):
    """What is needed of a Gram matrix ``L D L^T`` of n inputs.

    Attributes
    ----------
    lower : torch.Tensor
        L, shape (n, n), float32.
    variances : torch.Tensor
        The diagonal of D, shape (n,), float32, all positive.
    """

    lower: torch.Tensor
    variances: torch.Tensor


def factor(inputs: torch.Tensor) -> Factor | None:
    """Factorise the Gram matrix of inputs to a linear layer, of shape (tokens, n).

    Two matrices of n x n float32 are in memory meanwhile, and one of them afterwards. None if an input is not finite.
    """
    gram = torch.zeros((inputs.shape[1], inputs.shape[1]))
    for rows in torch.split(inputs, ROWS):
        gram.addmm_(rows.float().T, rows.float())
    diagonal = gram.diagonal()
    if not diagonal.isfinite().all():
        return None
    damping = max(DAMPING * float(diagonal.mean()), 1e-20)
    for _ in range(TRIES):
        diagonal += damping
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            roots = lower.diagonal().clone()
            return Factor(lower.div_(roots), roots.square_())
        damping *= 10
    return None


def compensated(weight: torch.Tensor, packing: Int4, factor: Factor) -> torch.Tensor:
    """Pack a weight with little error for the inputs that `factor` is of.

    Parameters
    ----------
    weight : torch.Tensor
        Shape (outputs, inputs), any floating dtype.
    packing : Int4
        Must take that shape. A group gets its scale when the columns after it are rounded: with what it makes up for.
    factor : Factor
        See there.

    Returns
    -------
    torch.Tensor
        The packed weight, uint8, flat.

    Raises
    ------
    ValueError
        If a number is none, or infinite.
    """
    if not weight.isfinite().all():
        raise ValueError("a weight is not finite")
    outputs, inputs = weight.shape
    codes = torch.empty((inputs, outputs), dtype=torch.uint8)
    scales, zeros = (torch.empty((outputs, inputs // packing.group), dtype=SCALES) for _ in range(2))
    importance = factor.variances / factor.variances.mean()
    for part in (slice(begin, begin + SERIAL // packing.group) for begin in range(0, outputs, SERIAL // packing.group)):
        _compensate(weight[part], factor.lower, importance, codes[:, part], scales[part], zeros[part])
    return packing.pack(codes.T.contiguous(), scales, zeros)


def _compensate(
    weight: torch.Tensor,
    lower: torch.Tensor,
    importance: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> None:
    """Fill in codes (inputs, outputs), scales and zeros (outputs, groups) of some outputs, which do not depend on the others."""
    inputs, groups = weight.shape[1], scales.shape[1]
    wanted = weight.T.to(torch.float32).contiguous()  # a row for each input: they are taken one after the other
    errors = torch.empty_like(wanted)
    for number in range(groups - 1, -1, -1):
        begin, end = number * inputs // groups, (number + 1) * inputs // groups
        aims = torch.addmm(wanted[begin:end], lower[end:, begin:end].T, errors[end:])
        _, scale, zero = round4(aims.T.contiguous().unsqueeze(1), importance[begin:end])
        scales[:, number], zeros[:, number] = scale[:, 0], zero[:, 0]
        step, middle = scale[:, 0].float(), zero[:, 0].float()
        steps = inverse(step)
        for column in range(end - 1, begin - 1, -1):
            code = torch.sub(aims[column - begin], middle).mul_(steps).round_().clamp_(-8, 7)
            torch.sub(wanted[column], (code * step).add_(middle), out=errors[column])
            codes[column] = code.add_(8)
            aims[: column - begin].addr_(lower[column, begin:column], errors[column])
