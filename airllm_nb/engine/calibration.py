"""One pass of a short text through a model, in which each layer is quantized just before it computes: see `gptq`.

So a layer is rounded for the hidden states that the quantized layers before it give, and within it each linear layer for what
those before it give. Masks, positions and whatever else passes between layers are the model's own.

Text: the first of the Adventures of Sherlock Holmes (Arthur Conan Doyle, 1892; its second page on) and An Introduction to
Mathematics (Alfred North Whitehead, 1911; the beginnings of its first two chapters), both in the public domain.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from airllm_nb.compat import cache, initialize, routing
from airllm_nb.compat.config import first_line
from airllm_nb.compat.keys import Tensors
from airllm_nb.compat.tokenizer import TOKENIZER_FILES, load_tokenizer
from airllm_nb.engine import context
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.gptq import Factor, compensated, factor
from airllm_nb.engine.packed import Int4
from airllm_nb.engine.packed_weight import packed_weight
from airllm_nb.engine.quantize import Quantized, stored_weights
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.weights import GroupReader, Weight
from airllm_nb.errors import AirLLMError

TEXT = Path(__file__).with_name("calibration.txt")
TOKENS = 4096
LENGTH = 512
"""Tokens of each sequence. They share one pass: what passes between layers is small, and each layer is read once."""
WITHOUT = "Leave out -gptq: then nothing has to be computed."


def token_ids(folder: Path, model: Any, *, trust_remote_code: bool) -> torch.Tensor:
    """Return the text in tokens of a checkpoint, shape (sequences, tokens), each sequence with the token that texts begin with.

    Raises
    ------
    AirLLMError
        If there is no tokenizer, or it makes next to nothing of the text.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise AirLLMError(f"{folder.name} has no tokenizer files, and gptq needs a text in tokens.", WITHOUT)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = list(tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"])
    first = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    step = min(LENGTH, context.length(model.config) or LENGTH) - len(first)
    begins = range(len(first), min(len(ids), TOKENS) - step + 1, step) if step > 0 else ()
    if not begins:
        raise AirLLMError(f"The tokenizer makes {len(ids)} tokens of the text that gptq needs.", WITHOUT)
    return torch.tensor([first + ids[begin : begin + step] for begin in begins])


class Calibration:
    """Quantizes the layers of a model in one pass, on the CPU.

    In memory are, at most: what always stays, one layer as it is published and the same one packed, the activations of `TOKENS`
    tokens in that layer, and for its widest linear layer, of n inputs, ``8 n n`` bytes.

    Parameters
    ----------
    quantized : Quantized
        The model, whose 4-bit layers are to be packed.
    joined : callable()
        Returns the checkpoint with the packed layers that are there.
    missing : set of int
        Which are not. A layer leaves it when it is written; one that the pass does not reach stays in it.
    begin : callable(index)
        Called before a layer is quantized.
    write : callable(index, views, packed)
        Writes a layer from its published weights, and those that are packed already, by name. Any other is to be rounded to the
        nearest: no token has come to it (an expert's), or it is not called as a linear layer.
    """

    def __init__(
        self,
        quantized: Quantized,
        joined: Callable[[], Checkpoint],
        missing: set[int],
        begin: Callable[[int], None],
        write: Callable[[int, Tensors, Tensors], None],
    ) -> None:
        self._quantized = quantized
        self._joined = joined
        self._missing = missing
        self._begin, self._write = begin, write
        layers = zip(quantized.original.layers, quantized.skeleton.layers, strict=True)
        self._published, self._small = (
            torch.empty(max(sizes), dtype=torch.uint8, device="cpu")
            for sizes in zip(*((original.group.nbytes, own.group.nbytes) for original, own in layers), strict=True)
        )
        self._seen: tuple[torch.Tensor, Factor | None] | None = None

    def run(self, ids: torch.Tensor) -> None:
        """Let token ids, shape (sequences, tokens), pass through the model until no layer is missing.

        Raises
        ------
        AirLLMError
            If the model cannot compute with them.
        """
        skeleton = self._quantized.original  # whose head is there, whether it is to be packed or not
        grad = torch.is_grad_enabled()
        handles = []
        try:
            with self._reading() as groups:
                groups.load(skeleton.always, torch.device("cpu"))
                self._look_up(groups, ids)
            initialize.rewrite_buffers(skeleton.model)
            routing.refuse_negative_bias(skeleton.model)
            for index, layer in enumerate(skeleton.layers):
                before = functools.partial(self._before, index)
                handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(layer.module.register_forward_hook(functools.partial(self._after, index)))
            with torch.inference_mode(mode=False), torch.no_grad(), contextlib.suppress(_Done):
                skeleton.model(input_ids=ids, use_cache=False)
        except (AirLLMError, MemoryError, OSError):
            raise
        except Exception as error:  # whatever the model's own code says
            raise AirLLMError(f"The text that gptq needs cannot pass through this model: {first_line(error)}", WITHOUT) from error
        finally:
            torch.set_grad_enabled(grad)  # an interrupt within no_grad's own exit would leave it off
            for handle in handles:
                handle.remove()
            for group in (skeleton.always, *filter(None, (skeleton.embedding,)), *(layer.group for layer in skeleton.layers)):
                group.detach()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[GroupReader]:
        checkpoint = self._joined()
        with contextlib.closing(Reader(checkpoint)) as reader:
            yield GroupReader(checkpoint, reader)

    def _look_up(self, groups: GroupReader, ids: torch.Tensor) -> None:
        """Let the embedding have the rows of these tokens. Its other pages, which nobody touches, take no memory."""
        embedding = self._quantized.original.embedding
        if embedding is None:
            return
        buffer = torch.empty(embedding.nbytes, dtype=torch.uint8, device="cpu")
        (matrix,) = embedding.views(buffer).values()
        for token in sorted(set(ids.flatten().tolist())):
            if token < len(matrix):
                groups.fill_rows(embedding, token, matrix[token : token + 1])
        embedding.attach(buffer)

    def _before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index in self._missing:
            self._quantize(index, module, args, kwargs)
        own = self._quantized.skeleton.layers[index].group
        with self._reading() as groups:  # as it is read when this is resumed: to the last bit the same
            groups.fill(own, self._small, keep_cached=True)
        own.attach(self._small)

    def _after(self, index: int, *_: Any) -> None:
        self._quantized.skeleton.layers[index].group.detach()
        if not self._missing:
            raise _Done

    def _quantize(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let a layer compute once, and round the weight of each of its linear layers when that is called."""
        self._begin(index)
        if cache.within(args, kwargs):
            raise AirLLMError("The layers of this model keep what they compute, and gptq lets them compute twice.", WITHOUT)
        original, own = (part.layers[index].group for part in (self._quantized.original, self._quantized.skeleton))
        with self._reading() as groups:
            groups.fill(original, self._published, keep_cached=False)
        original.attach(self._published)
        views = original.views(self._published)
        packed: dict[str, torch.Tensor] = {}
        modules = {id(part._parameters): part for part in module.modules()}  # noqa: SLF001
        handles = []
        try:
            for weight in stored_weights(own, self._quantized.packing):
                linear = modules.get(id(weight.places[0].table))
                if weight.meant and isinstance(linear, nn.Linear):  # and no stack of experts
                    compensate = functools.partial(self._compensate, weight, views[weight.name], packed)
                    handles.append(linear.register_forward_pre_hook(compensate, with_kwargs=True))
            module.forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})
        finally:
            self._seen = None
            for handle in handles:
                handle.remove()
        original.detach()
        self._write(index, views, packed)
        self._missing.discard(index)

    def _compensate(
        self, weight: Weight, view: torch.Tensor, packed: dict[str, torch.Tensor], _: nn.Module, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        """Round the weight of a linear layer that is about to be called, and let it compute with what comes out."""
        inputs = args[0] if args else kwargs["input"]
        if weight.name in packed or inputs.numel() == 0:
            return
        if self._seen is None or self._seen[0] is not inputs:  # queries, keys and values have the same
            self._seen = None
            self._seen = inputs, factor(inputs.reshape(-1, inputs.shape[-1]))
        if (found := self._seen[1]) is None:
            return
        assert weight.meant is not None
        assert isinstance(weight.meant.packing, Int4)
        with contextlib.suppress(ValueError):  # the nearest refuses it, too, and by name
            packed[weight.name] = compensated(view, weight.meant.packing, found)
            weight.places[0].table["weight"] = packed_weight(weight.name, packed[weight.name], weight.meant)


class _Done(Exception):  # noqa: N818  # no error
    """No layer is missing: what comes after the last one need not be computed."""


def _own(value: Any) -> Any:
    """Return a copy of a tensor: a layer may change in place what it is given."""
    return value.clone() if isinstance(value, torch.Tensor) else value
