"""What loading a model would mean here: sizes, what stays, what is read for every token. Needs no weights, only headers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from airllm_nb.compat import experts as compat_experts
from airllm_nb.compat.config import field, text_config
from airllm_nb.compat.versions import require_supported
from airllm_nb.engine import expert_stacks, hub, memory
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.devices import select_device, select_dtype
from airllm_nb.engine.memory import format_size
from airllm_nb.engine.residency import decide_with_experts, least_budget
from airllm_nb.engine.skeleton import Skeleton, build
from airllm_nb.errors import MemoryBudgetError, UnsupportedError
from airllm_nb.events import Fetching, LayerInfo, Listener

ACTIVATIONS = 200_000_000
"""Bytes kept free for activations and what else Python needs; the KV cache is estimated apart from it."""
CACHED_TOKENS = 2048
"""The length of a conversation that the estimate of the KV cache assumes, if the model's context is not shorter."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertsPlan:
    """How the experts of a model are read that are read only when they are hit.

    Attributes
    ----------
    per_layer : int
        How many experts a layer has.
    per_token : int or None
        How many of them one token hits, if the config says.
    nbytes : int
        Bytes of one expert in the dtype that it computes in.
    total_nbytes : int
        Bytes of all of them.
    slots : dict of int to int
        How many matrices of each size in bytes may be in memory.
    """

    per_layer: int
    per_token: int | None
    nbytes: int
    total_nbytes: int
    slots: dict[int, int]

    @property
    def used_nbytes(self) -> int:
        """Bytes that experts may occupy."""
        return expert_stacks.occupied(self.slots)

    def __str__(self) -> str:
        hit = f"{self.per_token} of {self.per_layer}" if self.per_token else f"some of {self.per_layer}"
        share = min(1.0, self.used_nbytes / self.total_nbytes)
        return f"{format_size(self.nbytes)} each, read when hit: {hit} in a layer per token; {share:.0%} of all stay"


@dataclass(frozen=True)
class Plan:
    """How a model would be (or is) loaded. All sizes are bytes.

    Attributes
    ----------
    name : str
        Short name of the model.
    device, dtype : torch.device, torch.dtype
        Where and in what it computes.
    layers : tuple of LayerInfo
        The decoder layers, and which of them stay.
    budget, least : int
        What weights and read-ahead buffers may use, and the least that works.
    always_nbytes : int
        Embedding, final norm and head: in memory all the time.
    total_nbytes : int
        All weights in `dtype`.
    checkpoint_nbytes : int
        All weights as published, on disk.
    streamed_nbytes : int
        What each forward pass reads from disk, as published.
    window : tuple of int
        Sizes of the buffers that streamed layers are read into.
    reasons : tuple of str
        Why this device, dtype and budget.
    experts : ExpertsPlan or None
        How experts are read that are read only when they are hit; the layers are then meant without them.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    layers: tuple[LayerInfo, ...]
    budget: int
    least: int
    always_nbytes: int
    total_nbytes: int
    checkpoint_nbytes: int
    streamed_nbytes: int
    window: tuple[int, ...]
    reasons: tuple[str, ...]
    experts: ExpertsPlan | None = None

    @property
    def used_nbytes(self) -> int:
        """What weights and read-ahead buffers occupy."""
        layers = sum(layer.nbytes for layer in self.layers if layer.resident)
        return self.always_nbytes + layers + sum(self.window) + (self.experts.used_nbytes if self.experts else 0)

    def __str__(self) -> str:
        resident = [layer for layer in self.layers if layer.resident]
        streamed = len(self.layers) - len(resident)
        stay = f"all {len(resident)} layers stay" if not streamed else f"{len(resident)} layers stay, {streamed} stream"
        dtype = str(self.dtype).removeprefix("torch.")
        device, number, budget = self.reasons
        read = format_size(self.streamed_nbytes) if streamed else "nothing"
        used, allowed, least = map(format_size, (self.used_nbytes, self.budget, self.least))
        return "\n".join((
            f"model     {self.name}",
            f"device    {self.device}  ({device})",
            f"dtype     {dtype}  ({number})",
            f"memory    {used} of {allowed}  ({budget}); at least {least}",
            f"weights   {format_size(self.total_nbytes)} in {dtype}, {format_size(self.checkpoint_nbytes)} on disk",
            f"layers    {stay}; {format_size(self.always_nbytes)} of embedding, norm and head stay too",
            *([f"experts   {self.experts}"] if self.experts else ()),
            f"per token {read} read from disk{', and experts' if self.experts else ''}",
        ))  # fmt: skip


def plan(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory: str | float = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    progress: Listener | None = None,
) -> Plan:
    """Tell what loading a model would mean, from its headers alone: no weight is downloaded or read.

    Parameters
    ----------
    model, device, dtype, memory, revision, token, trust_remote_code, progress
        As for `LayeredModel.from_pretrained`.

    Raises
    ------
    AirLLMError
        Whatever loading would raise, as far as headers can tell.
    """
    require_supported()
    name, model = named(model, progress)
    folder, headers = hub.locate_headers(model, revision=revision, token=token)
    checkpoint = Checkpoint(folder, headers)
    chosen, number, reasons = choose(checkpoint, device, dtype)
    skeleton = build(folder, checkpoint, number, chosen, trust_remote_code=trust_remote_code)
    return make_plan(name, skeleton, checkpoint, chosen, number, memory, reasons)


def choose(
    checkpoint: Checkpoint, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[torch.device, torch.dtype, tuple[str, str]]:
    """Choose device and dtype for a checkpoint; returns them with the two reasons."""
    published = checkpoint.dtype
    if published not in FLOATS:
        raise UnsupportedError(
            f"The weights of this checkpoint are {str(published).removeprefix('torch.')}, which this engine does not compute in.",
            "Use the checkpoint with bfloat16, float16 or float32 weights.",
        )
    chosen, device_reason = select_device(device)
    number, dtype_reason = select_dtype(dtype, published, chosen)
    return chosen, number, (device_reason, dtype_reason)


def make_plan(
    name: str,
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    budget: str | float,
    reasons: tuple[str, str],
) -> Plan:
    """Decide what stays and what streams within a budget.

    Raises
    ------
    MemoryBudgetError
        If the budget is below the least that works; says which limit an automatic one comes from.
    """
    sizes = [layer.group.nbytes for layer in skeleton.layers]
    lean, stacks = expert_stacks.split(skeleton, checkpoint) if device.type == "cpu" else (skeleton, ())
    without, few = ([layer.group.nbytes for layer in lean.layers], expert_stacks.least(stacks)) if stacks else ([], 0)
    always = skeleton.always.nbytes
    if str(budget).strip().lower() == "auto":
        free, limit = memory.available(device)
        reserve = ACTIVATIONS + cache_nbytes(skeleton.model.config, len(sizes), dtype)
        allowed = max(free - reserve, 0)
        reason = f"auto: {limit} less {format_size(reserve)} for the KV cache and activations"
        if allowed < (least := least_budget(always, sizes, without, few)):
            raise MemoryBudgetError(
                f"This model needs at least {format_size(least)}. The {limit} leaves {format_size(free)}, of which "
                f"{format_size(reserve)} are kept for the KV cache and activations.",
                f'Free memory or choose a smaller model; memory="{-(-least // 10**6)}MB" insists, at your own risk.',
            )
    else:
        allowed, reason = memory.parse_size(budget), "as asked"
    decision = decide_with_experts(always, sizes, without, few, allowed)
    experts = _plan_experts(stacks, decision.experts, skeleton.model.config) if decision.experts else None
    skeleton = lean if experts else skeleton
    layers = tuple(
        LayerInfo(index, layer.group.name, layer.group.nbytes, resident)
        for index, (layer, resident) in enumerate(zip(skeleton.layers, decision.resident, strict=True))
    )
    streamed = sum(
        checkpoint[source].nbytes
        for layer, resident in zip(skeleton.layers, decision.resident, strict=True)
        if not resident
        for recipe in layer.group.recipes
        for source in recipe.sources
    )
    return Plan(
        name=name, device=device, dtype=dtype, layers=layers, budget=allowed, least=decision.least, always_nbytes=always,
        total_nbytes=always + sum(sizes), checkpoint_nbytes=checkpoint.nbytes, streamed_nbytes=streamed,
        window=decision.window, reasons=(*reasons, reason), experts=experts,
    )  # fmt: skip


def _plan_experts(stacks: Sequence[expert_stacks.ExpertStack], budget: int, config: Any) -> ExpertsPlan:
    first = next(number for number, stack in enumerate(stacks, 1) if stack.partner is None)
    return ExpertsPlan(
        per_layer=len(stacks[0].sources),
        per_token=compat_experts.per_token(config),
        nbytes=sum(stack.nbytes for stack in stacks[:first]),
        total_nbytes=sum(stack.nbytes * len(stack.sources) for stack in stacks),
        slots=expert_stacks.slots(stacks, budget),
    )


def cache_nbytes(config: Any, layers: int, dtype: torch.dtype) -> int:
    """Estimate the KV cache of one conversation: keys and values of each layer, KV head and token."""
    text = text_config(config)
    heads = field(text, "num_attention_heads") or 1
    kv_heads = field(text, "num_key_value_heads") or heads
    width = field(text, "head_dim") or (field(text, "hidden_size") or 4096) // heads
    tokens = min(field(text, "max_position_embeddings") or CACHED_TOKENS, CACHED_TOKENS)
    return 2 * layers * kv_heads * width * tokens * dtype.itemsize


def named(model: str | os.PathLike[str], progress: Listener | None = None) -> tuple[str, str | os.PathLike[str]]:
    """Return a model's short name, and where it is: ``"demo"`` stands for a folder that is fetched when first needed."""
    if model == "demo":
        from airllm_nb import demo

        def say(text: str) -> None:
            if progress is not None:
                progress(Fetching(text))

        return short_name(demo.DEMO), demo.demo_path(on_status=say)
    return short_name(model), model


def short_name(model: str | os.PathLike[str]) -> str:
    """Return the last part of a hub id or folder; of a hub's snapshot folder, the model's own name."""
    path = os.fspath(model).rstrip("/\\")
    for part in reversed(path.replace("\\", "/").split("/")):
        if part.startswith("models--"):
            return part.rpartition("--")[2]
    return path.replace("\\", "/").rpartition("/")[2]
