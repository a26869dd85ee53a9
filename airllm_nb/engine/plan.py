"""What loading a model would mean here: sizes, what stays, what is read for every token. Needs no weights, only headers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from airllm_nb.compat import experts as compat_experts
from airllm_nb.compat.config import field, text_config
from airllm_nb.compat.versions import require_supported
from airllm_nb.engine import expert_stacks, hub, memory
from airllm_nb.engine import kernels as one_row
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.devices import select_device, select_dtype
from airllm_nb.engine.memory import format_size
from airllm_nb.engine.prediction import Prediction, Work, predict, work_of
from airllm_nb.engine.residency import decide_with_experts, least_budget
from airllm_nb.engine.sharing import Shared, require_shareable, shareable
from airllm_nb.engine.skeleton import Skeleton, build
from airllm_nb.engine.threads import Threads, compute_threads
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
        What is in memory all the time: final norm and head, and the embedding unless it is read by rows.
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
    by_rows : bool
        Whether the embedding stays on disk, and only the rows that are looked up are read.
    shared_nbytes : int or None
        How much of what stays is mapped from the files, one copy for all processes; None if sharing was not asked for. It
        counts in the budget as if it were owned: pages that do not fit would be read again for every token.
    threads : Threads
        How many threads compute on the CPU, and why.
    work : Work
        What one token reads and computes, for `predict`.
    kernels : str
        Which kernels multiply one row and what they gain, if they were measured.
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
    threads: Threads
    work: Work = dataclasses.field(repr=False)
    shared_nbytes: int | None = None
    by_rows: bool = False
    kernels: str = ""
    experts: ExpertsPlan | None = None

    def predict(self) -> Prediction | None:
        """Predict the seconds per token from a probe of this machine: two seconds the first time, nothing after that.

        Returns
        -------
        Prediction or None
            None for anything but the CPU: what is not measured is not guessed.
        """
        return predict(self.work, self.dtype) if self.device.type == "cpu" else None

    @property
    def used_nbytes(self) -> int:
        """What weights and read-ahead buffers occupy."""
        layers = sum(layer.nbytes for layer in self.layers if layer.resident)
        return self.always_nbytes + layers + sum(self.window) + (self.experts.used_nbytes if self.experts else 0)

    def __str__(self) -> str:
        resident = [layer for layer in self.layers if layer.resident]
        streamed = len(self.layers) - len(resident)
        stay = f"all {len(resident)} layers stay" if not streamed else f"{len(resident)} layers stay, {streamed} stream"
        parts, rows = ("norm and head", ", embedding read by rows") if self.by_rows else ("embedding, norm and head", "")
        dtype = str(self.dtype).removeprefix("torch.")
        device, number, budget = self.reasons
        read = format_size(self.streamed_nbytes) if streamed else "nothing"
        used, allowed, least = map(format_size, (self.used_nbytes, self.budget, self.least))
        return "\n".join((
            f"model     {self.name}",
            f"device    {self.device}  ({device})",
            f"dtype     {dtype}  ({number})",
            *([f"threads   {self.threads.number}  ({self.threads.reason})"] if self.device.type == "cpu" else []),
            f"memory    {used} of {allowed}  ({budget}); at least {least}",
            *([f"shared    {self.sharing}"] if self.sharing else ()),
            f"weights   {format_size(self.total_nbytes)} in {dtype}, {format_size(self.checkpoint_nbytes)} on disk",
            f"layers    {stay}; {format_size(self.always_nbytes)} of {parts} stay too{rows}",
            *([f"experts   {self.experts}"] if self.experts else ()),
            f"per token {read} read from disk{', and experts' if self.experts else ''}",
            *([f"kernels   {self.kernels}"] if self.kernels else []),
        ))  # fmt: skip

    @property
    def sharing(self) -> str:
        """What is shared with other processes and what is not, in words; empty if sharing was not asked for."""
        if self.shared_nbytes is None:
            return ""
        own = f"{format_size(self.used_nbytes - self.shared_nbytes)} own"
        if not self.shared_nbytes:
            return f"nothing, because no weight that stays lies in the files as it computes; {own}"
        return f"{format_size(self.shared_nbytes)} mapped from the files (page cache: one copy for all, counted above), {own}"


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
    progress: Listener | None = None,
) -> Plan:
    """Tell what loading a model would mean, from its headers alone: no weight is downloaded or read.

    Parameters
    ----------
    model, device, dtype, memory, kernels, revision, token, trust_remote_code, shared, progress
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
    chosen, number, reasons = choose(checkpoint, device, dtype, shared)
    one_row.require_mode(kernels, chosen)
    skeleton = build(folder, checkpoint, number, chosen, trust_remote_code=trust_remote_code)
    decided = make_plan(name, skeleton, checkpoint, chosen, number, memory, reasons, shared=shared)
    return dataclasses.replace(decided, kernels=one_row.use(skeleton.model, kernels, decided.budget))


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


def make_plan(
    name: str,
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    budget: str | float,
    reasons: tuple[str, str],
    *,
    shared: Shared = False,
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
    embedding = skeleton.embedding.nbytes if skeleton.embedding else 0
    if str(budget).strip().lower() == "auto":
        free, limit = memory.available(device, mapped=bool(shared))
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
    decision = decide_with_experts(always, sizes, without, few, allowed, embedding)
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
    own = [skeleton.always, *([skeleton.embedding] if skeleton.embedding and not decision.by_rows else ())]
    stay = [*own, *(layer.group for layer, info in zip(skeleton.layers, layers, strict=True) if info.resident)]
    mapped = sum(entry.nbytes for group in stay for entry in shareable(group, checkpoint).values()) if shared else None
    return Plan(
        name=name, device=device, dtype=dtype, layers=layers, budget=allowed, least=decision.least,
        always_nbytes=always if decision.by_rows else always + embedding, total_nbytes=always + embedding + sum(sizes),
        checkpoint_nbytes=checkpoint.nbytes, streamed_nbytes=streamed, window=decision.window, reasons=(*reasons, reason),
        threads=compute_threads(), work=work_of(skeleton, checkpoint, decision), shared_nbytes=mapped, by_rows=decision.by_rows,
        experts=experts,
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
