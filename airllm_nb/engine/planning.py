"""Decides how to load a model: device, dtype, what stays and what streams. Needs no weights, only headers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from airllm_nb.compat import experts as compat_experts
from airllm_nb.compat.config import field, text_config
from airllm_nb.compat.versions import require_supported
from airllm_nb.engine import expert_stacks, hub
from airllm_nb.engine import kernels as one_row
from airllm_nb.engine import memory as room
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.devices import select_device, select_dtype
from airllm_nb.engine.expert_stacks import ExpertStack
from airllm_nb.engine.gguf_checkpoint import open_checkpoint
from airllm_nb.engine.memory import ACTIVATIONS, format_size
from airllm_nb.engine.packed_cache import PackedCache
from airllm_nb.engine.plan import ExpertsPlan, Plan
from airllm_nb.engine.prediction import work_of
from airllm_nb.engine.quantize import asked, quantized
from airllm_nb.engine.repack import hint
from airllm_nb.engine.residency import decide_with_experts, least_budget
from airllm_nb.engine.sharing import Shared, require_shareable, shareable
from airllm_nb.engine.skeleton import Skeleton, build
from airllm_nb.engine.threads import compute_threads
from airllm_nb.errors import AirLLMError, MemoryBudgetError, UnsupportedError
from airllm_nb.events import LayerInfo, Listener

CACHED_TOKENS = 2048
"""The length of a conversation that the estimate of the KV cache assumes, if the model's context is not shorter."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plan(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory: str | float = "auto",
    kernels: str = "exact",
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    shared: Shared = False,
    quantize: str | None = None,
    progress: Listener | None = None,
) -> Plan:
    """Tell what loading a model would mean, from its headers alone: no weight is downloaded or read.

    Parameters
    ----------
    model, device, dtype, memory, kernels, revision, token, trust_remote_code, shared, quantize, progress
        As for `LayeredModel.from_pretrained`.

    Raises
    ------
    AirLLMError
        Whatever loading would raise, as far as headers can tell.
    """
    require_supported()
    name, model = named(model, progress)
    folder, headers = hub.locate_headers(model, revision=revision, token=token)
    return prepare(
        name, open_checkpoint(folder, headers), device=device, dtype=dtype, memory=memory, kernels=kernels, shared=shared,
        trust_remote_code=trust_remote_code, quantize=quantize,
    ).plan  # fmt: skip


class Prepared(NamedTuple):
    """A model that only lacks its weights: its layers, the plan for them, and the experts that are read when they are hit."""

    skeleton: Skeleton
    plan: Plan
    stacks: tuple[ExpertStack, ...]
    packed: PackedCache | None


def prepare(
    name: str,
    checkpoint: Checkpoint,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    memory: str | float,
    kernels: str,
    shared: Shared,
    trust_remote_code: bool,
    quantize: str | None,
) -> Prepared:
    """Build a model without weights, and decide what stays and what streams within a budget.

    Raises
    ------
    MemoryBudgetError
        If the budget is below the least that works; says which limit an automatic one comes from.
    AirLLMError
        Of other kinds, if something is asked for that cannot be.
    """
    chosen, number, reasons = choose(checkpoint, device, dtype, shared)
    one_row.require_mode(kernels, chosen)
    packing, head = (None, False) if quantize is None else asked(quantize)
    if packing and kernels != "exact":
        raise AirLLMError("Quantized layers have kernels of their own.", f"Leave out kernels={kernels!r}, or quantize.")
    skeleton = build(checkpoint.folder, checkpoint, number, chosen, trust_remote_code=trust_remote_code)
    published, packed = checkpoint.nbytes, None
    if packing is not None:
        small = quantized(skeleton, packing, head=head)
        if small.head and any(checkpoint[name].companions for recipe in small.head.recipes for name in recipe.sources):
            raise UnsupportedError(  # it would be read some rows at a time
                "The head of this model cannot be quantized: it is published in few bits itself.", "Leave out +head."
            )
        packed = PackedCache(small, checkpoint, name, trust_remote_code=trust_remote_code)
        packed.require_shareable(shared)
        skeleton, checkpoint = packed.skeleton, packed.joined()
        require_shareable(checkpoint, chosen, shared)
    lean, stacks = expert_stacks.split(skeleton, checkpoint) if chosen.type == "cpu" else (skeleton, ())
    sizes = [layer.group.nbytes for layer in skeleton.layers]
    without, few = ([layer.group.nbytes for layer in lean.layers], expert_stacks.least(stacks)) if stacks else ([], 0)
    always, embedding = skeleton.always.nbytes, skeleton.embedding.nbytes if skeleton.embedding else 0
    total = always + embedding + sum(sizes)
    least = least_budget(always, sizes, without, few)
    reserve = ACTIVATIONS + cache_nbytes(skeleton.model.config, len(sizes), number)
    budget, reason = _budget(memory, chosen, reserve, least, mapped=bool(shared))
    decision = decide_with_experts(always, sizes, without, few, budget, embedding)
    whole = skeleton
    skeleton, stacks = (lean, stacks) if decision.experts else (skeleton, ())
    experts = _plan_experts(stacks, decision.experts, skeleton.model.config) if stacks else None
    layers = tuple(
        LayerInfo(index, layer.group.name, layer.group.nbytes, resident)
        for index, (layer, resident) in enumerate(zip(skeleton.layers, decision.resident, strict=True))
    )
    plan = Plan(
        name=name, device=chosen, dtype=number, layers=layers, budget=budget, least=decision.least,
        always_nbytes=always if decision.by_rows else always + embedding, total_nbytes=total,
        checkpoint_nbytes=published, streamed_nbytes=_streamed(skeleton, layers, checkpoint), window=decision.window,
        reasons=(*reasons, reason), threads=compute_threads(),
        work=work_of(whole, skeleton, checkpoint, decision, experts.share if experts else 1.0),
        shared_nbytes=_mapped(skeleton, layers, checkpoint, by_rows=decision.by_rows) if shared else None,
        by_rows=decision.by_rows, kernels=one_row.use(skeleton.model, kernels, budget),
        experts=experts, quantized=str(packed or ""),
        hint=hint(checkpoint) if packing is None and not all(decision.resident) else "",
    )  # fmt: skip
    return Prepared(skeleton, plan, stacks, packed)


def choose(
    checkpoint: Checkpoint, device: str | torch.device, dtype: str | torch.dtype, shared: Shared = False
) -> tuple[torch.device, torch.dtype, tuple[str, str]]:
    """Choose device and dtype for a checkpoint; returns them with the two reasons."""
    published = checkpoint.dtype
    if published not in FLOATS:
        raise UnsupportedError(
            f"The weights of this checkpoint are {str(published).removeprefix('torch.')}, which this engine does not compute in.",
            "Use the checkpoint with bfloat16, float16 or float32 weights.",
        )
    chosen, device_reason = select_device(device)
    require_shareable(checkpoint, chosen, shared)
    if shared and dtype == "auto" and published != torch.float64:
        return chosen, published, (device_reason, "auto: the checkpoint's own, so that its weights can be shared")
    number, dtype_reason = select_dtype(dtype, published, chosen)
    return chosen, number, (device_reason, dtype_reason)


def _budget(asked: str | float, device: torch.device, reserve: int, least: int, *, mapped: bool) -> tuple[int, str]:
    """Return the bytes that weights may use, and why."""
    if str(asked).strip().lower() != "auto":
        return room.parse_size(asked), "as asked"
    free, limit = room.available(device, mapped=mapped)
    allowed = max(free - reserve, 0)
    if allowed < least:
        raise MemoryBudgetError(
            f"This model needs at least {format_size(least)}. {'' if limit[0].isupper() else 'The '}{limit} leaves "
            f"{format_size(free)}, of which "
            f"{format_size(reserve)} are kept for the KV cache and activations.",
            f'Free memory or choose a smaller model; memory="{-(-least // 10**6)}MB" insists, at your own risk.',
        )
    return allowed, f"auto: {limit} less {format_size(reserve)} for the KV cache and activations"


def _streamed(skeleton: Skeleton, layers: Sequence[LayerInfo], checkpoint: Checkpoint) -> int:
    """Return the bytes on disk of the layers that stream."""
    return sum(
        part.nbytes
        for layer, info in zip(skeleton.layers, layers, strict=True)
        if not info.resident
        for recipe in layer.group.recipes
        for source in recipe.sources
        for part in checkpoint[source].stored
    )


def _mapped(skeleton: Skeleton, layers: Sequence[LayerInfo], checkpoint: Checkpoint, *, by_rows: bool) -> int:
    """Return the bytes of what stays that can be mapped from the files."""
    own = [skeleton.always, *([skeleton.embedding] if skeleton.embedding and not by_rows else ())]
    stay = [*own, *(layer.group for layer, info in zip(skeleton.layers, layers, strict=True) if info.resident)]
    return sum(entry.nbytes for group in stay for entry in shareable(group, checkpoint).values())


def _plan_experts(stacks: Sequence[expert_stacks.ExpertStack], budget: int, config: Any) -> ExpertsPlan:
    first = next(number for number, stack in enumerate(stacks, 1) if stack.partner is None)
    return ExpertsPlan(
        per_layer=len(stacks[0].sources),
        per_token=compat_experts.per_token(config),
        nbytes=sum(stack.nbytes for stack in stacks[:first]),
        total_nbytes=sum(stack.nbytes * len(stack.sources) for stack in stacks),
        slots=expert_stacks.slots(stacks, budget),
    )


def cache_nbytes(config: Any, layers: int, dtype: torch.dtype, tokens: int | None = None) -> int:
    """Estimate a KV cache: keys and values of each layer, KV head and token; of a conversation, if `tokens` are not given."""
    text = text_config(config)
    heads = field(text, "num_attention_heads") or 1
    kv_heads = field(text, "num_key_value_heads") or heads
    width = field(text, "head_dim") or (field(text, "hidden_size") or 4096) // heads
    tokens = tokens or min(field(text, "max_position_embeddings") or CACHED_TOKENS, CACHED_TOKENS)
    return 2 * layers * kv_heads * width * tokens * dtype.itemsize


def named(model: str | os.PathLike[str], progress: Listener | None = None) -> tuple[str, str | os.PathLike[str]]:
    """Return a model's short name, and where it is: ``"demo"`` stands for a folder that is fetched when first needed."""
    if model == "demo":
        from airllm_nb import demo

        return short_name(demo.DEMO), demo.demo_path(progress=progress)
    return short_name(model), model


def short_name(model: str | os.PathLike[str]) -> str:
    """Return the last part of a hub id or folder; of a hub's snapshot folder, the model's own name."""
    path = os.fspath(model).rstrip("/\\")
    for part in reversed(path.replace("\\", "/").split("/")):
        if part.startswith("models--"):
            return part.rpartition("--")[2]
    return path.replace("\\", "/").rpartition("/")[2]
