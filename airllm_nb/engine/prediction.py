"""How many seconds a token will take here: what a plan reads and computes, at the speeds that a probe measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from airllm_nb.compat import experts as compat_experts
from airllm_nb.compat.keys import Recipe
from airllm_nb.engine import memory, probe, sample
from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry
from airllm_nb.engine.memory import format_size
from airllm_nb.engine.packed import Packing
from airllm_nb.engine.residency import Residency
from airllm_nb.engine.sample import LITTLE, Unmeasurable
from airllm_nb.engine.skeleton import Skeleton
from airllm_nb.engine.weights import Weight


@dataclass(frozen=True)
class Work:
    """What one token asks of the machine. All sizes are bytes.

    Attributes
    ----------
    shapes : tuple of (int, int)
        The weight matrices that a decoder layer multiplies one row by.
    computed : tuple of int
        For each layer, the weights that compute for one token in the dtype they compute in: of experts, those that are chosen.
    read : tuple of int
        For each layer, what is read ahead, as published; 0 for one that stays.
    missing : tuple of int
        For each layer, what is read when it is hit, as published: of the experts that are chosen, those that no slot may hold.
    rest : int
        The weights that compute after the last layer: the head.
    streamed : tuple of TensorEntry
        The tensors that are read, ahead or when they are hit.
    slots : int
        Buffers that they are read into.
    room : int
        What memory has left for the page cache beside the weights.
    checkpoint : Checkpoint
        Where they lie.
    packing : Packing or None
        How the weights of `shapes` are packed, if they are quantized.
    head : Packing or None
        How the head is.
    """

    shapes: tuple[tuple[int, int], ...]
    computed: tuple[int, ...]
    read: tuple[int, ...]
    missing: tuple[int, ...]
    rest: int
    streamed: tuple[TensorEntry, ...]
    slots: int
    room: int
    checkpoint: Checkpoint
    packing: Packing | None = None
    head: Packing | None = None


def work_of(whole: Skeleton, skeleton: Skeleton, checkpoint: Checkpoint, decision: Residency, held: float = 1.0) -> Work:
    """Find out from headers alone what one token asks for.

    Parameters
    ----------
    whole, skeleton : Skeleton
        The model, and the same one as it is loaded: its layers may lack experts, which are then read when they are hit.
    checkpoint : Checkpoint
        Where the weights lie.
    decision : Residency
        What stays.
    held : float
        The share of all experts that may be in memory. Those that are hit most often are, so a token misses fewer than the rest.
    """
    sources = [
        () if stays else _entries(layer.group.recipes, checkpoint)
        for layer, stays in zip(skeleton.layers, decision.resident, strict=True)
    ]
    chosen = compat_experts.chosen_share(whole.model.config)
    computed = [
        sum(weight.nbytes * (chosen if _is_expert(weight) else 1) for weight in layer.group.weights.values())
        for layer in whole.layers
    ]
    experts = [
        _entries([recipe for recipe in full.group.recipes if recipe.targets.keys() - lean.group.weights.keys()], checkpoint)
        for full, lean in zip(whole.layers, skeleton.layers, strict=True)
    ]
    streamed = [entry for ahead, hit in zip(sources, experts, strict=True) for entry in (*ahead, *hit)]
    # Most layers are like the middle one; the first may have other matrices (no experts, for one).
    middle = whole.layers[len(whole.layers) // 2].group.weights.values()
    packing = next((weight.meant.packing for weight in middle if weight.meant), None)
    shapes = [weight.meant.shape if weight.meant else weight.shape for weight in middle if weight.meant or packing is None]
    head = skeleton.model.get_output_embeddings()
    packed_head = next((weight for weight in skeleton.always.weights.values() if weight.meant), None)
    plain = 0 if head is None else head.weight.numel() * head.weight.dtype.itemsize
    rest = packed_head.nbytes if packed_head else plain
    kept = [layer.group.nbytes for layer, stays in zip(skeleton.layers, decision.resident, strict=True) if stays]
    left = memory.available(torch.device("cpu"))[0] - skeleton.always.nbytes - sum(kept) - sum(decision.window) - decision.experts
    return Work(
        tuple((shape[-2], shape[-1]) for shape in shapes if len(shape) > 1), tuple(map(int, computed)),
        tuple(map(_nbytes, sources)), tuple(int(_nbytes(entries) * chosen * (1 - held)) for entries in experts), rest,
        tuple(streamed), len(decision.window), max(left, 0), checkpoint, packing,
        packed_head.meant.packing if packed_head and packed_head.meant else None,
    )  # fmt: skip


def _entries(recipes: Sequence[Recipe], checkpoint: Checkpoint) -> tuple[TensorEntry, ...]:
    return tuple(part for recipe in recipes for source in recipe.sources for part in checkpoint[source].stored)


def _nbytes(entries: Sequence[TensorEntry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _is_expert(weight: Weight) -> bool:
    return ".experts." in weight.name and len((weight.meant or weight).shape) > 1


@dataclass(frozen=True)
class Prediction:
    """Seconds per token when one conversation decodes token by token, and the speeds that it comes from.

    Attributes
    ----------
    seconds : float or None
        None if something cannot be measured; `note` says what.
    compute : float or None
        Bytes of weights per second.
    reading : float or None
        Bytes of the files per second, conversion included; None if nothing is read.
    source : str
        What they are read from: ``"disk"``, ``"page cache"``, or ``"memory"`` for a file system that lies there.
    cached : float
        The share of what is read from the disk that the page cache holds now, and has room for; from 0 to 1.
    overhead : float
        Seconds that a layer takes beside its weights.
    slowed : (float, float)
        The share of its speed that is left to computing while something is read, and to reading while something computes.
    note : str
        Why there is no prediction.
    """

    seconds: float | None
    compute: float | None = None
    reading: float | None = None
    source: str = "disk"
    cached: float = 0.0
    overhead: float = 0.0
    slowed: tuple[float, float] = (1.0, 1.0)
    note: str = ""

    def __str__(self) -> str:
        if self.seconds is None:
            return f"seconds per token not predicted: {self.note}"
        parts = [f"{self.source} {format_size(self.reading)}/s"] if self.reading else []
        parts += [f"{self.cached:.0%} of it cached"] if self.cached > LITTLE else []
        parts += [f"{format_size(self.compute)}/s compute"] if self.compute else []
        return f"about {self.seconds:.2g} s per token ({', '.join(parts)})"


def predict(work: Work, dtype: torch.dtype, *, write: bool = True) -> Prediction:
    """Predict the seconds per token on the CPU, after measuring what is not known yet.

    A layer takes the time that its weights need at the speed of linear layers of its shapes with one row, for which memory sets
    the pace, and what transformers takes beside that for any layer. Reading a layer takes its bytes at the disk's speed, or at
    what the page cache makes of it, if the share of the files that is there now finds room beside the weights; conversion is
    part of it. How these times fall together says `seconds_per_token`. An expert that is read when it is hit keeps its layer
    waiting. Not counted: attention to a long conversation.

    Parameters
    ----------
    work, dtype : Work, torch.dtype
        What one token asks for, and what it computes in.
    write : bool
        Whether a temporary file may be written where only that tells the disk's speed.
    """
    try:
        with sample.enough_memory():
            return _predict(work, dtype, write=write)
    except Unmeasurable as reason:
        return Prediction(None, note=str(reason))


def _predict(work: Work, dtype: torch.dtype, *, write: bool) -> Prediction:
    overhead = probe.layer_overhead()
    if work.streamed:
        return _predict_streaming(work, dtype, overhead, write=write)
    rate, last = probe.computing(work.shapes, dtype, work.packing), probe.computing(work.shapes, dtype, work.head)
    seconds = sum(work.computed) / rate + work.rest / last + overhead * len(work.computed)
    return Prediction(seconds, rate, overhead=overhead)


def _predict_streaming(work: Work, dtype: torch.dtype, overhead: float, *, write: bool) -> Prediction:
    cached = sample.cached_share(work.checkpoint, work.streamed)
    in_memory = sample.in_memory(work.checkpoint.folder)
    stays = cached if cached > LITTLE and (in_memory or cached * _nbytes(work.streamed) <= work.room) else 0.0
    reading, computing = probe.streaming(work.checkpoint, work.streamed, work.shapes, dtype, stays, work.packing, write=write)
    slowed = computing.share, reading.share
    seconds = seconds_per_token(
        [
            nbytes / computing.alone + missing / reading.alone + overhead
            for nbytes, missing in zip(work.computed, work.missing, strict=True)
        ],
        [nbytes / reading.alone for nbytes in work.read],
        work.rest / (probe.computing(work.shapes, dtype, work.head) if work.packing else computing.alone),
        work.slots,
        slowed=slowed,
    )
    # What is read ahead and what is read when it is hit share one disk.
    seconds = max(seconds, (sum(work.read) + sum(work.missing)) / reading.alone)
    source = "memory" if in_memory else "page cache" if stays > 1 - LITTLE else "disk"
    on_disk = stays if source == "disk" else 0.0
    return Prediction(seconds, computing.alone, reading.alone, source, on_disk, overhead, slowed)


def seconds_per_token(
    compute: Sequence[float], read: Sequence[float], rest: float, slots: int, *, slowed: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Return how long one pass of many takes whose streamed layers are read ahead.

    Two things go on at once. The computation takes the layers in turn, waits for one that is not read yet, and ends with
    `rest`. Reading takes the streamed layers in turn, from the last one on to the first of the next pass, and waits while all
    slots are full: one is free again when its layer has computed. With all layers streaming and equal that is
    max(read, compute) per layer; where layers that stay lie in between, a slot more cannot help, and where they lie together,
    reading waits. So this follows the two through some passes, step by step.

    Parameters
    ----------
    compute, read : sequence of float
        Seconds for each layer; nothing is read for one that stays.
    rest : float
        Seconds for what computes after the last layer.
    slots : int
        Layers that are held at once, the one that computes included.
    slowed : (float, float)
        The share of its speed that is left to computing while something is read, and to reading while something computes.

    Returns
    -------
    float
        Seconds of the last pass, when each is like the one before.
    """
    passes = 4
    streamed = [index for index, seconds in enumerate(read) if seconds > 0]
    tasks = [(seconds, read[index] > 0) for index, seconds in enumerate(compute)] + [(rest, False)]
    reads = [read[index] for index in streamed] * passes
    now, ended, arrived, given_back, left_to_read = 0.0, 0.0, 0, 0, reads[0] if reads else 0.0
    last = 0.0
    for _ in range(passes):
        for seconds, is_streamed in tasks:
            left = seconds
            while True:
                computes = not is_streamed or arrived > given_back
                if computes and left <= 0:
                    break
                reads_now = arrived < len(reads) and arrived - given_back < slots
                speed = slowed[0] if reads_now else 1.0
                pace = slowed[1] if computes else 1.0
                step = min(([left / speed] if computes else []) + ([left_to_read / pace] if reads_now else []))
                now += step
                if computes:
                    left = 0.0 if step == left / speed else left - step * speed
                if reads_now:
                    left_to_read = 0.0 if step == left_to_read / pace else left_to_read - step * pace
                    if left_to_read <= 0:
                        arrived += 1
                        left_to_read = reads[arrived] if arrived < len(reads) else 0.0
            given_back += is_streamed
        last, ended = now - ended, now
    return last
