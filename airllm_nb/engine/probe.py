"""Measures this machine for a prediction, in about two seconds: computing with one row, reading, and both at the same time.

Nothing is assumed about how computing and reading share cores and memory: how far each slows the other down is measured. What was
measured is remembered for the process, so that a second prediction is instant.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from airllm_nb.engine import packed, threads
from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry
from airllm_nb.engine.interrupts import interrupt_later
from airllm_nb.engine.packed import Packing
from airllm_nb.engine.packed_weight import Meant, packed_weight
from airllm_nb.engine.sample import LITTLE, Sample, Unmeasurable, cached_share, room_for, temporary

WEIGHTS = 256_000_000
"""Bytes of weights that the measured matrices hold together: more than a processor's caches."""
SECONDS = 0.3
"""Of measuring how fast is computed; reading, and both at once, take twice as long, because disks are less even."""

Shapes = tuple[tuple[int, int], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """A rate in bytes per second when nothing else happens (`alone`), and while the other one of reading and computing does."""

    alone: float
    meanwhile: float

    @property
    def share(self) -> float:
        """How much of its speed is left meanwhile, from 0 to 1."""
        return min(self.meanwhile / self.alone, 1.0)


class Linears:
    """Linear layers of given shapes, computed with one row again and again.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Rows and columns of the weights; those that are too large together get fewer rows.
    dtype : torch.dtype
        Of weights and input.
    packing : Packing, optional
        Of the weights, if they are quantized.

    Raises
    ------
    Unmeasurable
        If there is no memory for weights that exceed the caches.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, packing: Packing | None = None) -> None:
        def nbytes(shape: tuple[int, int]) -> int:
            return packing.nbytes(shape) if packing else shape[0] * shape[1] * dtype.itemsize

        allowed = room_for(WEIGHTS, 4)
        part = min(1.0, allowed / sum(map(nbytes, shapes)))
        least = packed.ROWS if packing else 1
        cut = [(max(int(rows * part) // least, 1) * least, columns) for rows, columns in shapes]
        times = max(allowed // sum(map(nbytes, cut)), 1)
        self._pairs = [
            (torch.full((1, shape[1]), 0.01, dtype=dtype, device="cpu"), _weight(shape, dtype, packing))
            for _ in range(times)
            for shape in cut
        ]
        self._nbytes = times * sum(map(nbytes, cut))
        self._sweep()  # the first time also prepares the kernels

    def rate(self, busy: Callable[[], bool]) -> float:
        """Return bytes of weights per second: the median of sweeps over all of them while `busy()`, at least one."""
        seconds = [self._sweep()]
        while busy():
            seconds.append(self._sweep())
        return self._nbytes / sorted(seconds)[len(seconds) // 2]

    def _sweep(self) -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            for row, weight in self._pairs:
                torch.nn.functional.linear(row, weight)
        return time.perf_counter() - begin


def _weight(shape: tuple[int, int], dtype: torch.dtype, packing: Packing | None) -> torch.Tensor:
    if packing is None:
        return torch.full(shape, 0.01, dtype=dtype, device="cpu")
    memory = torch.full((packing.nbytes(shape),), 0x11, dtype=torch.uint8, device="cpu")
    return packed_weight("measured", memory, Meant(packing, shape, dtype))


def computing(shapes: Shapes, dtype: torch.dtype, packing: Packing | None = None) -> float:
    """Return how fast linear layers of these shapes compute with one row, in bytes of (packed) weights per second.

    Raises
    ------
    Unmeasurable
        If too little memory is free to tell.
    """
    with threads.applied() as (number, _):

        def measure() -> float:
            linears = Linears(shapes, dtype, packing)
            end = time.perf_counter() + SECONDS
            return linears.rate(lambda: time.perf_counter() < end)

        return _remembered((shapes, dtype, packing, number), measure)


def streaming(
    checkpoint: Checkpoint,
    entries: Sequence[TensorEntry],
    shapes: Shapes,
    dtype: torch.dtype,
    cached: float = 0.0,
    packing: Packing | None = None,
    *,
    write: bool = True,
) -> tuple[Speed, Speed]:
    """Return how fast tensors are read and how fast is computed: alone, and both at once.

    Parameters
    ----------
    checkpoint, entries : Checkpoint, sequence of TensorEntry
        What is read. It may not be here yet.
    shapes, dtype : sequence of (int, int), torch.dtype
        What computes, and in what.
    cached : float
        The share of `entries` that the page cache holds, by `cached_share`, and goes on holding. Where it holds more than that,
        and where the files are not here yet, a temporary file on the same disk tells its speed: written, dropped from the page
        cache, read and deleted.
    packing : Packing, optional
        Of the weights, if they are quantized: these are read as they are.
    write : bool
        Whether it may be written.

    Raises
    ------
    Unmeasurable
        With the reason.
    """
    published = torch.uint8 if packing else entries[0].dtype
    into = torch.uint8 if packing else dtype

    def measure() -> tuple[Speed, Speed]:
        if checkpoint.states and cached_share(checkpoint, entries) <= cached + LITTLE:
            with Sample(checkpoint, entries, into) as sample:
                return _both(sample, shapes, dtype, packing)
        if not write:
            raise Unmeasurable("the disk cannot be measured without writing to it")
        with temporary(checkpoint.folder, published) as other, Sample(other, list(other.values()), into) as sample:
            found = _both(sample, shapes, dtype, packing)
            if sample.missed == 0:
                raise Unmeasurable("the disk cannot be measured: what is written to it stays in memory")
            return found

    with threads.applied() as (number, _):
        try:
            device = checkpoint.folder.stat().st_dev
        except OSError as error:
            raise Unmeasurable(f"the folder cannot be read: {error.strerror}") from error
        return _remembered((device, round(4 * cached), published, shapes, dtype, packing, number), measure)


def layer_overhead() -> float:
    """Return the seconds that one decoder layer of transformers takes for one token beside its weights: a tiny Llama's.

    The least of several passes, on one thread. Its matrices are too small for a second one to help, but with one they wait for
    each other in every layer: 0.3 ms grow to 10 ms while another program takes turns on the same two cores. What the weights
    of a real layer suffer from such a neighbour is in the rates that are measured with them.
    """

    def measure() -> float:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers = 8
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4,
        )  # fmt: skip
        state = torch.random.get_rng_state()
        count = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            with interrupt_later(), torch.device("cpu"), torch.no_grad():
                model = LlamaForCausalLM(config).eval()
                token, cache, seconds = torch.ones(1, 1, dtype=torch.long), None, []
                for _ in range(24):
                    begin = time.perf_counter()
                    cache = model(token, past_key_values=cache, use_cache=True).past_key_values
                    seconds.append(time.perf_counter() - begin)
        finally:
            torch.set_num_threads(count)
            torch.random.set_rng_state(state)
        return min(seconds) / layers

    return _remembered(("overhead",), measure)


_memory: dict[tuple[Any, ...], Any] = {}


def _remembered(key: tuple[Any, ...], measure: Callable[[], T]) -> T:
    if key not in _memory:
        _memory[key] = measure()
    found: T = _memory[key]
    return found


def _both(sample: Sample, shapes: Shapes, dtype: torch.dtype, packing: Packing | None) -> tuple[Speed, Speed]:
    alone = sample.rate(2 * SECONDS)
    compute = computing(shapes, dtype, packing)
    results: list[float | Exception] = []

    def read() -> None:
        try:
            results.append(sample.rate(2 * SECONDS))
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller is who can tell
            results.append(error)

    linears = Linears(shapes, dtype, packing)
    thread = threading.Thread(target=read, name="airllm_nb-probe", daemon=True)
    thread.start()
    try:
        meanwhile = linears.rate(thread.is_alive)
    finally:
        thread.join()
    (found,) = results
    if isinstance(found, Exception):
        raise found
    return Speed(alone, found), Speed(compute, meanwhile)
