"""What is left of a run when it is over: the text, how it came about, how it ended, and where each layer's time went."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from airllm_nb import LayeredModel
    from airllm_nb.engine.decoding import Sampling
    from airllm_nb.notebook.timeline import Timeline

Stopped = Literal["end", "length", "stop", "interrupted"]
"""Why a text ended: the model ended it, `max_new_tokens` was reached, a stop string came, or the user stopped it."""

REPR_CHARACTERS = 60


@dataclass(frozen=True)
class LayerTotals:
    """What one layer did in a run.

    Attributes
    ----------
    index, name, nbytes, resident
        The layer, as in `airllm_nb.events.LayerInfo`.
    passes : int
        How often it computed.
    disk_nbytes, cache_nbytes : int
        Bytes read for it from the disk, and from the operating system's page cache, counted as they lie in memory
        (`Settings.file_share` says what they are in the file).
    read_seconds, waited_seconds, compute_seconds : float
        Time to read its weights, time the computation stood still for them, time it computed.
    """

    index: int
    name: str
    nbytes: int
    resident: bool
    passes: int
    disk_nbytes: int
    cache_nbytes: int
    read_seconds: float
    waited_seconds: float
    compute_seconds: float

    def __add__(self, later: LayerTotals) -> LayerTotals:
        """Return what the layer did in this run and in a later one that goes on with it."""
        numbers = {field.name: getattr(self, field.name) + getattr(later, field.name) for field in fields(self)[4:]}
        return replace(later, **numbers)


@dataclass(frozen=True)
class Settings:
    """What a run was made with.

    Attributes
    ----------
    model, device, dtype : str
        The model's short name, where and in what it computed.
    used_nbytes, budget_nbytes : int
        What weights and read-ahead buffers occupied, and what they were allowed.
    resident, streamed : int
        How many layers stayed in memory, and how many were read in every pass.
    max_new_tokens, temperature, top_p, seed, stop
        As in `airllm_nb.engine.decoding.Sampling`; the first is larger where the text was gone on with.
    system : str or None
        The system prompt.
    file_share : float
        Bytes in the published files for each byte in memory, of the layers that are read in every pass: 0.5 if bfloat16 is
        read and float32 computes.
    """

    model: str
    device: str
    dtype: str
    used_nbytes: int
    budget_nbytes: int
    resident: int
    streamed: int
    max_new_tokens: int
    temperature: float
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    system: str | None
    file_share: float = 1.0

    @classmethod
    def of(cls, model: LayeredModel, sampling: Sampling, system: str | None) -> Settings:
        """Note what a model runs with; nothing in it refers to the model."""
        resident = sum(layer.resident for layer in model.layers)
        in_memory = sum(layer.nbytes for layer in model.layers if not layer.resident)
        return cls(
            model=model.name,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            used_nbytes=model.plan.used_nbytes,
            budget_nbytes=model.plan.budget,
            resident=resident,
            streamed=len(model.layers) - resident,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
            system=system,
            file_share=model.plan.streamed_nbytes / in_memory if in_memory else 1.0,
        )


@dataclass(frozen=True, repr=False)
class Answer:
    """The result of one run; ``str(answer)`` is its text.

    Attributes
    ----------
    text : str
        The text as it was shown, without special tokens and without the stop string.
    token_ids : tuple of int
        All generated ids, an end token or stop string included.
    prompt_tokens : int
        Length of the prompt in tokens, its chat template included.
    seconds : float
        From the begin of the first pass to the end of the last one, without the time between a stop and going on.
    stopped : {"end", "length", "stop", "interrupted"}
        The model ended the text, `max_new_tokens` was reached, a stop string came, or the user stopped it.
    layers : tuple of LayerTotals
        What every layer did.
    settings : Settings or None
        What it was made with.
    timeline : Timeline or None
        When what happened, see `airllm_nb.notebook.timeline`.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    stopped: Stopped
    layers: tuple[LayerTotals, ...]
    settings: Settings | None = None
    timeline: Timeline | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, the prompt's pass included."""
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:  # without times: a notebook that shows it gives the same output every time
        text = self.text if len(self.text) <= REPR_CHARACTERS else self.text[:REPR_CHARACTERS] + "…"
        return f"Answer({text!r}, tokens={len(self.token_ids)}, stopped={self.stopped!r})"


class Interrupted(KeyboardInterrupt):
    """The user pressed stop: a `KeyboardInterrupt` that is shown as one line.

    It is raised rather than swallowed so that loops end, and "Run all" does not go on as if nothing had happened.

    Parameters
    ----------
    message : str
        What was stopped, and what is left of it.
    answer : Answer, optional
        What was generated so far.
    """

    def __init__(self, message: str, answer: Answer | None = None) -> None:
        super().__init__(message)
        self.answer = answer

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: the lines that are shown in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]
