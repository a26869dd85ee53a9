"""How a model would be, or is, loaded: a record of sizes, of what stays and what streams, that says so in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from airllm_nb.engine import expert_stacks
from airllm_nb.engine.memory import format_size
from airllm_nb.engine.prediction import Prediction, Work, predict
from airllm_nb.engine.threads import Threads
from airllm_nb.events import LayerInfo


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

    @property
    def share(self) -> float:
        """The share of all experts that may be in memory, from 0 to 1."""
        return min(1.0, self.used_nbytes / self.total_nbytes)

    def __str__(self) -> str:
        hit = f"{self.per_token} of {self.per_layer}" if self.per_token else f"some of {self.per_layer}"
        return f"{format_size(self.nbytes)} each, read when hit: {hit} in a layer per token; {self.share:.0%} of all stay"


@dataclass(frozen=True, repr=False)
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
    quantized : str
        What is kept in few bits, if anything.
    hint : str
        What would make it faster, if anything is known.
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
    work: Work = dataclasses.field(repr=False, compare=False)
    shared_nbytes: int | None = None
    by_rows: bool = False
    kernels: str = ""
    experts: ExpertsPlan | None = None
    quantized: str = ""
    hint: str = ""

    def predict(self, *, write: bool = True) -> Prediction | None:
        """Predict the seconds per token from a probe of this machine: two seconds the first time, nothing after that.

        The probe reads some of the weights that are here.

        Parameters
        ----------
        write : bool
            Whether it may write a temporary file of up to 256 MB, never beside the weights, where only that tells the disk's
            speed: the weights are not here yet, or all in the page cache.

        Returns
        -------
        Prediction or None
            None for anything but the CPU: what is not measured is not guessed.
        """
        return predict(self.work, self.dtype, write=write) if self.device.type == "cpu" else None

    @property
    def used_nbytes(self) -> int:
        """What weights and read-ahead buffers occupy."""
        layers = sum(layer.nbytes for layer in self.layers if layer.resident)
        return self.always_nbytes + layers + sum(self.window) + (self.experts.used_nbytes if self.experts else 0)

    def __repr__(self) -> str:
        stay = sum(layer.resident for layer in self.layers)
        return f"Plan({self.name}: {stay} of {len(self.layers)} layers stay, {format_size(self.used_nbytes)})"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # IPython's hook for what ends a cell
        printer.text(str(self))

    def __str__(self) -> str:
        resident = [layer for layer in self.layers if layer.resident]
        streamed = len(self.layers) - len(resident)
        stay = f"all {len(resident)} layers stay" if not streamed else f"{len(resident)} layers stay, {streamed} stream"
        parts, rows = ("norm and head", ", embedding read by rows") if self.by_rows else ("embedding, norm and head", "")
        dtype = str(self.dtype).removeprefix("torch.")
        device, number, budget = self.reasons
        read = f"{format_size(self.streamed_nbytes) if streamed else 'nothing'} read from disk"
        if self.experts:
            read = f"{read}, and experts" if streamed else "only experts read from disk, those that are not in memory"
        used, allowed, least = map(format_size, (self.used_nbytes, self.budget, self.least))
        return "\n".join((
            f"model     {self.name}",
            f"device    {self.device}  ({device})",
            f"dtype     {dtype}  ({number})",
            *([f"threads   {self.threads.number}  ({self.threads.reason})"] if self.device.type == "cpu" else []),
            f"memory    {used} of {allowed}  ({budget}); at least {least}",
            *([f"shared    {self.sharing}"] if self.sharing else ()),
            f"weights   {format_size(self.total_nbytes)} in {dtype}, {format_size(self.checkpoint_nbytes)} on disk",
            *([f"quantized {self.quantized}"] if self.quantized else []),
            f"layers    {stay}; {format_size(self.always_nbytes)} of {parts} stay too{rows}",
            *([f"experts   {self.experts}"] if self.experts else ()),
            f"per token {read}",
            *([f"kernels   {self.kernels}"] if self.kernels else []),
            *([f"hint      {self.hint}"] if self.hint else []),
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
