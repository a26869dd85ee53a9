"""Blocks of GGUF files that we unpack ourselves: the bits of the package ``gguf``, whatever the bytes."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from airllm_nb.engine import gguf_blocks

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)


@pytest.mark.parametrize("kind", gguf_blocks.BYTES)
def test_the_same_bits_as_the_package(kind):
    number = gguf.GGMLQuantizationType[kind]
    numbers, nbytes = gguf.GGML_QUANT_SIZES[number]
    assert gguf_blocks.BYTES[kind] == nbytes
    raw = np.random.default_rng(0).integers(0, 256, (len(EVERY_HALF), nbytes), np.uint8)
    raw[:, slice(-2, None) if kind == "Q6_K" else slice(0, 2)] = EVERY_HALF  # every scale that there is, also those that are none
    with np.errstate(all="ignore"):
        found, expected = gguf_blocks.unpack(raw, kind), dequantize(raw, number).reshape(-1)
    assert found.dtype == np.float32
    assert found.shape == (len(raw) * numbers,)
    none = np.isnan(expected)
    assert np.array_equal(np.isnan(found), none)
    assert np.array_equal(found[~none].view(np.uint32), expected[~none].view(np.uint32))


@pytest.mark.parametrize("kind", gguf_blocks.BYTES)
def test_bytes_are_not_changed(kind):
    raw = np.random.default_rng(1).integers(0, 100, (3, gguf_blocks.BYTES[kind]), np.uint8)
    before = raw.copy()
    gguf_blocks.unpack(raw, kind)
    assert np.array_equal(raw, before)
