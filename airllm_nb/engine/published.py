"""A checkpoint that others have quantized, as one of plain weights: they are unpacked as they are read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from airllm_nb.compat import quantization
from airllm_nb.compat.wellformed import faults
from airllm_nb.engine import published_bitsandbytes
from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry, read_config
from airllm_nb.engine.published_forms import APART, AutoAwq, AutoGptq, CompressedTensors, Form, Fp8, GptOss, Read
from airllm_nb.engine.readable import AGAIN
from airllm_nb.engine.reader import Reader
from airllm_nb.errors import CheckpointError, UnsupportedError

FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2"))
WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS: dict[str, Callable[[Mapping[str, Any], Read | None], Form]] = {
    "fp8": Fp8, "mxfp4": GptOss, "compressed-tensors": CompressedTensors, "gptq": AutoGptq, "awq": AutoAwq,
    quantization.BITSANDBYTES: published_bitsandbytes.form,
}  # fmt: skip
"""By the ``quant_method`` of config.json."""


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in which each quantized weight is one tensor; itself if its config.json speaks of none.

    Raises
    ------
    UnsupportedError
        If its weights are quantized in a way that is not read.
    CheckpointError
        If a tensor that belongs to a quantized weight is missing, or is not what it should be.
    """
    raw = read_config(checkpoint.folder)
    if any(faults(raw)) or (config := quantization.config_of(raw)) is None:
        _refuse_bare(checkpoint.values())
        return checkpoint  # what is wrong with a config.json is told by who loads it
    method = quantization.method_of(config)
    with contextlib.closing(Reader(checkpoint)) as reader:
        read = functools.partial(_bytes_of, reader) if checkpoint.states else None
        entries = list(_entries(checkpoint, FORMS[method](config, read)))
    _refuse_bare(entries)
    if not any(entry.unpack for entry in entries):
        raise UnsupportedError(
            f"The weights of this checkpoint are quantized ({method}), says config.json, and none of its tensors is.",
            "If they are plain, remove quantization_config from config.json; else fetch the checkpoint again.",
        )
    whole = checkpoint.holding(entries)
    if len(whole) < len(entries):
        name = next(entry.name for entry in entries if entry is not whole[entry.name])
        raise CheckpointError(f"{name} is there twice, plain and quantized.", APART)
    return whole


def _bytes_of(reader: Reader, entry: TensorEntry) -> torch.Tensor:
    found = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
    reader.read(entry.file, entry.offset, memoryview(found.numpy()), keep_cached=True)  # type: ignore[arg-type]  # a buffer
    return found


def meaningful(checkpoint: Checkpoint, unused: Iterable[str]) -> list[str]:
    """Return which tensors that a model has no place for it cannot do without: all but biases of zeros.

    Earlier versions of AutoGPTQ gave a bias to every layer that it quantized, and many published checkpoints have them
    (https://github.com/AutoGPTQ/AutoGPTQ/issues/555). From headers alone, they are taken for zeros.
    """
    if not (names := list(unused)):
        return []
    with contextlib.closing(Reader(checkpoint)) as reader:
        return [name for name in names if not _adds_nothing(checkpoint, name, reader)]


def _adds_nothing(checkpoint: Checkpoint, name: str, reader: Reader) -> bool:
    weight, bias = checkpoint.get(f"{name.removesuffix('.bias')}.weight"), checkpoint[name]
    if not name.endswith(".bias") or weight is None or weight.unpack is None:
        return False
    if bias.shape != weight.shape[:1] or bias.dtype not in WEIGHTS:
        return False
    return not (checkpoint.states and _bytes_of(reader, bias).view(bias.dtype).any())


def _refuse_bare(entries: Iterable[TensorEntry]) -> None:
    """Refuse numbers of 8 bits that nobody has told how to unpack, and factors that nobody has taken."""
    for entry in entries:
        if entry.unpack is None and (entry.dtype in FLOAT8 or entry.name.endswith("_scale_inv")):
            dtype = str(entry.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"{entry.name} ({dtype}) belongs to a weight that is quantized in a way that is not read.",
                "Use the checkpoint with bfloat16, float16 or float32 weights.",
            )


def _entries(checkpoint: Checkpoint, form: Form) -> Iterator[TensorEntry]:
    """Yield the plain tensors and the unpacked ones, in the order of the files."""
    groups: dict[str, dict[str, TensorEntry]] = {}
    endings = (form.numbers, *form.needed, *form.optional, *form.dropped)
    ending_of = {name: max((end for end in endings if name.endswith(end)), key=len, default=None) for name in checkpoint}
    for name, ending in ending_of.items():
        if ending is not None:
            groups.setdefault(name.removesuffix(ending), {})[ending] = checkpoint[name]
    for name, entry in checkpoint.items():
        ending = ending_of[name]
        if ending is None:
            yield entry
            continue
        stem = name.removesuffix(ending)
        group = groups[stem]
        if len(group) == 1 and ending == form.numbers and (entry.dtype in WEIGHTS or entry.dtype not in form.dtypes):
            yield entry  # a norm, or a layer that was left as it is
            continue
        _require_whole(stem, group, form)
        if ending == form.numbers:
            _require_meant(stem, form)
            yield form.weight(stem + form.becomes, entry, group)


def _require_whole(stem: str, group: Mapping[str, TensorEntry], form: Form) -> None:
    """Refuse a weight that is not all there, and what belongs to a weight that is not quantized."""
    for ending in (form.numbers, *form.needed):
        if ending not in group:
            other = next(iter(group.values())).name
            raise CheckpointError(f"{stem}{ending} is missing, which belongs to {other}.", AGAIN)
    numbers = group[form.numbers]
    if numbers.dtype not in form.dtypes:
        dtype = str(numbers.dtype).removeprefix("torch.")
        beside = next(entry for ending, entry in group.items() if ending != form.numbers)
        raise CheckpointError(f"{numbers.name} is {dtype}, not quantized, and {beside.name} belongs to it.", APART)


def _require_meant(stem: str, form: Form) -> None:
    """Refuse a quantized weight of a module that config.json says is plain."""
    lists = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
    for name in (name for key in lists for name in form.config.get(key) or ()):
        if stem == name or stem.startswith(f"{name}.") or stem.endswith(f".{name}"):
            raise CheckpointError(f"{stem} is quantized, and config.json says that it is not (with {name!r}).", APART)
