"""Packed weights: what they mean, and that kernels multiply by just that."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear

from airllm_nb.engine import packed as packed_module
from airllm_nb.engine.packed import Int4, Int8, multiply
from airllm_nb.engine.packed_weight import Meant, packed_weight
from airllm_nb.engine.rounding import nearest
from airllm_nb.errors import UnsupportedError

PACKINGS = [Int8(), Int4(32), Int4(64), Int4(128)]
SHAPES = [(16, 128), (64, 128), (80, 256), (192, 128)]  # rows that fill whole blocks of the kernel, or not


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_numbers_are_the_nearest_of_their_grid(packing, shape):
    weight = random(*shape) * 0.02
    packed = nearest(weight, packing)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packing.nbytes(shape)
    dense = packing.dense(packed, shape, torch.float32)
    if isinstance(packing, Int4):
        scales, zeros = packing._scales(packed, shape).float().permute(2, 1, 0).unsqueeze(-1)
        levels = torch.arange(-8, 8) * scales + zeros
    else:
        levels = torch.arange(-127, 128) * packing.parts(packed, shape)[1].float()[:, None, None]
    numbers = weight.view(*levels.shape[:2], -1)
    least = (numbers.unsqueeze(-1) - levels.unsqueeze(-2)).abs().amin(dim=-1)
    assert ((dense.view_as(numbers) - numbers).abs() - least).abs().max() < 1e-7


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_grid_is_kept(packing):
    """What lies on the grid already comes out as it went in: packing again changes nothing."""
    shape = (64, 256)
    once = packing.dense(nearest(random(*shape), packing), shape, torch.float32)
    twice = packing.dense(nearest(once, packing), shape, torch.float32)
    assert (once - twice).abs().max() <= once.abs().max() / 256


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_kernels_multiply_by_what_is_meant(packing, shape, rows):
    packed = nearest(random(*shape), packing)
    given, bias = random(2, rows, shape[1], seed=1).bfloat16(), random(shape[0], seed=2).bfloat16()
    expected = linear(given.float(), packing.dense(packed, shape, torch.float32), bias.float())
    with torch.no_grad():
        found = multiply(packing, given, packed, shape, bias)
    assert found.shape == expected.shape
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_rows_that_do_not_lie_one_after_the_other(packing):
    packed = nearest(random(64, 128), packing)
    for given in (random(128, 5).bfloat16().T, random(3, 256).bfloat16()[:, :128]):
        with torch.no_grad():
            expected = multiply(packing, given.contiguous(), packed, (64, 128))
            assert torch.equal(multiply(packing, given, packed, (64, 128)), expected)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_processors(capability):
    """Kernels of other processors want weights in another order."""
    code = """
import sys, torch
from airllm_nb.engine.packed import Int4, layout, multiply
from airllm_nb.engine.rounding import nearest
torch.manual_seed(0)
for outputs in (16, 48, 64, 80, 96, 128):
    weight, rows, shape = torch.randn(outputs, 128), torch.randn(3, 128).bfloat16(), (outputs, 128)
    packed = nearest(weight, Int4())
    dense = Int4().dense(packed, shape, torch.float32)
    assert (dense - weight).norm() < 0.15 * weight.norm(), outputs
    with torch.no_grad():
        product = multiply(Int4(), rows, packed, shape).float()
    assert (product - rows.float() @ dense.T).norm() < 0.02 * product.norm(), outputs
print(layout())
"""
    environ = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_many_rows_take_the_unpacked_weight(packing):
    shape = (64, 128)
    packed = nearest(random(*shape), packing)
    given = random(packing.most_rows + 1, shape[1])
    expected = linear(given, packing.dense(packed, shape, torch.float32))
    assert torch.equal(multiply(packing, given, packed, shape), expected)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_weights_are_unpacked_in_parts(packing, shape, monkeypatch):
    packed = nearest(random(*shape), packing)
    given, bias = random(packing.most_rows + 1, shape[1]), random(shape[0])
    expected = linear(given, packing.dense(packed, shape, torch.float32), bias)
    monkeypatch.setattr(packed_module, "UNPACKED", 1)
    found = multiply(packing, given, packed, shape, bias)
    assert (found - expected).abs().max() < 1e-4


def test_shapes_that_no_kernel_takes_are_refused():
    assert Int4(64).refusal((64, 96)) == "64 x 96 are no multiples of 16 x 64"
    assert Int4(256).refusal((64, 128)) == "64 x 128 are no multiples of 16 x 256"
    assert Int8().refusal((50, 70)) == "50 x 70 are no multiples of 16 x 64"  # the kernel of PyTorch 2.13 crashes there
    assert Int8().refusal((4, 64, 64)) == "it is no matrix"
    assert Int4(32).refusal((16, 64)) is None


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_equal_numbers_and_zeros(packing):
    weight = torch.zeros(16, 128)
    weight[1] = 3.0
    before = weight.clone()
    dense = packing.dense(nearest(weight, packing), (16, 128), torch.float32)
    assert (dense - weight).abs().max() <= 3.0 / 256  # what a scale loses in bfloat16
    assert torch.equal(dense[0], weight[0])
    assert torch.equal(weight, before)  # and what was given is left as it was


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_what_is_no_number_is_not_packed(packing, number):
    weight = random(32, 128)
    weight[5, 17] = number
    with pytest.raises(ValueError, match="not finite"):
        nearest(weight, packing)


CHANGES = [
    lambda weight: weight.mul_(2),
    lambda weight: weight.data.zero_(),
    lambda weight: weight.data.__setitem__(slice(None), 0),
    lambda weight: weight.__setitem__(0, 0),
    lambda weight: weight.detach().zero_(),
    lambda weight: weight.view(-1).zero_(),
    lambda weight: weight[3].zero_(),
    lambda weight: weight.T.zero_(),
    lambda weight: torch.mul(torch.ones(64, 128), 2, out=weight),
    lambda weight: weight.__imul__(2),
]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_packed_parameter_answers_as_what_it_means(packing):
    shape = (64, 128)
    memory = nearest(random(*shape), packing)
    weight = packed_weight("layer.weight", memory, Meant(packing, shape, torch.float32))
    dense = packing.dense(memory, shape, torch.float32)
    assert (weight.shape, weight.dtype, weight.device) == (shape, torch.float32, torch.device("cpu"))
    assert torch.equal(weight.T @ weight, dense.T @ dense)
    assert torch.equal(torch.cat([weight, dense]), torch.cat([dense, dense]))
    assert torch.equal(weight[3], dense[3])
    for change in CHANGES:
        with pytest.raises(UnsupportedError, match=r"in a way that a quantized weight cannot follow.*without quantize"):
            change(weight)
    twin = copy.deepcopy(weight)
    assert torch.equal(twin.T, dense.T)
    assert twin.memory.data_ptr() != memory.data_ptr()
    assert torch.equal(pickle.loads(pickle.dumps(weight)) + 0, dense)
