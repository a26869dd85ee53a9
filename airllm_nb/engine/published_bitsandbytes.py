"""How bitsandbytes stores quantized weights: forms as those of ``published_forms.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from airllm_nb.compat import bitsandbytes
from airllm_nb.engine.checkpoint import TensorEntry
from airllm_nb.engine.codebook import TABLES, Codebook, Rows
from airllm_nb.engine.published_forms import APART, Form, Read, made, require, require_matrix
from airllm_nb.engine.quant_state import MOST, NESTED
from airllm_nb.engine.readable import AGAIN
from airllm_nb.errors import CheckpointError

BYTES = 256
"""What a byte may be."""


class FourBits(Form):
    """nf4 and fp4, their factors quantized again or not.

    The numbers lie in one column, as whatever dtype. What their shape is stands in a tensor beside them, ``quant_state``.
    """

    def __init__(self, config: Mapping[str, Any], read: Read | None) -> None:
        super().__init__(config, read)
        self._kind, self._nested = config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]
        self.dtypes = (getattr(torch, config.get("bnb_4bit_quant_storage") or "uint8"),)
        self._state = f".weight.quant_state.bitsandbytes__{self._kind}"
        nested = (".weight.nested_quant_map", ".weight.nested_absmax")
        self.needed = (self._state, ".weight.quant_map", ".weight.absmax", *(nested if self._nested else ()))
        self.optional = () if self._nested else nested  # which then are refused

    def weight(self, name: str, numbers: TensorEntry, beside: Mapping[str, TensorEntry]) -> TensorEntry:
        """See `Form.weight`."""
        if extra := [beside[ending].name for ending in self.optional if ending in beside]:
            raise CheckpointError(f"{extra[0]} is there, and config.json says that factors are not quantized.", APART)
        said, table, factors, *nested = (beside[ending] for ending in self.needed)
        require(table, (torch.float32,), (len(TABLES[self._kind]),))
        require(said, (torch.uint8,), (said.nbytes,))
        if said.nbytes > MOST:
            raise CheckpointError(f"{said.name} has {said.nbytes} bytes, more than there is to say.", AGAIN)
        unpack = Codebook(name, self._kind, nested=self._nested)
        state = unpack.state(self.read(said)) if self.read else None
        number = -(-math.prod(state.shape) // (2 * numbers.dtype.itemsize)) if state else math.prod(numbers.shape)
        require(numbers, self.dtypes, (number, 1), by=said.name)
        blocks = state.blocks if state else math.prod(factors.shape)
        require(factors, (torch.uint8 if nested else torch.float32,), (blocks,), by=said.name)
        for entry, length in zip(nested, (BYTES, -(-blocks // NESTED)), strict=False):
            require(entry, (torch.float32,), (length,), by=said.name)
        entry = made(name, state.shape if state else (2 * numbers.nbytes, 1), numbers, unpack, said, table, factors, *nested)
        return replace(entry, shapeless=state is None)


class EightBits(Form):
    """LLM.int8(): whole numbers, and the largest magnitude of each row."""

    needed = (".SCB",)
    optional = (".weight_format",)
    dtypes = (torch.int8,)

    def weight(self, name: str, numbers: TensorEntry, beside: Mapping[str, TensorEntry]) -> TensorEntry:
        """See `Form.weight`."""
        rows, columns = require_matrix(numbers)
        require(beside[".SCB"], (torch.float32,), (rows,))
        order = [beside[ending] for ending in self.optional if ending in beside]
        for entry in order:
            require(entry, (torch.uint8,), ())
        return made(name, (rows, columns), numbers, Rows(name), beside[".SCB"], *order)


def form(config: Mapping[str, Any], read: Read | None) -> Form:
    """Return the form that a config speaks of."""
    return (EightBits if bitsandbytes.bits(config) == bitsandbytes.EIGHT else FourBits)(config, read)
