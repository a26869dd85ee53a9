"""One run: a prompt goes in, text comes out as it is written, an `Answer` is left; it can be stopped and gone on with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from airllm_nb.compat import cache
from airllm_nb.engine import decoding
from airllm_nb.errors import PromptError
from airllm_nb.events import Event, PassBegin
from airllm_nb.notebook import randomness
from airllm_nb.notebook.progress import Progress, Renderer, listener_of_user
from airllm_nb.notebook.run_state import Ended, RunState
from airllm_nb.notebook.streaming import TextStream, Unseen
from airllm_nb.notebook.summary import Answer, Interrupted, LayerTotals, Settings, Stopped
from airllm_nb.notebook.timeline import Recorder
from airllm_nb.notebook.verdict import memory_left

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from airllm_nb import LayeredModel
    from airllm_nb.notebook.conversation import Conversation


@dataclass(frozen=True)
class Point:
    """A moment between two passes, from which a run can go on."""

    made: int  # ids
    restore: Callable[[], None]  # puts the KV cache back
    random: randomness.State


class Run:
    """One answer, which is made in one go or in several: what comes out is the same.

    What is made is what `TextStream.ids` holds: an id gets there in one step, whatever an interrupt does. All else is made again
    from there: the text from the ids, the KV cache and the random state from what they were when the last pass began.

    Parameters
    ----------
    model : LayeredModel
        The model.
    encode : callable
        Returns the prompt's ids.
    sampling : Sampling
        How the next token is chosen, and when the text ends.

    Attributes
    ----------
    prompt : list of int
        The prompt's ids.
    cache
        The KV cache; None if transformers makes one that cannot be kept.
    conversation : Conversation or None
        Where it belongs, if it is a turn of one.
    limited : bool
        The text was cut at `Sampling.max_new_tokens`, and whoever asked has been told.
    system : str or None
        The system prompt, to be noted in the answer.
    """

    def __init__(self, model: LayeredModel, encode: Callable[[], list[int]], sampling: decoding.Sampling) -> None:
        self.model = model
        self.prompt: list[int] = []
        self.cache: Any = None
        self.conversation: Conversation | None = None
        self.limited = False
        self.system: str | None = None
        self._encode = encode
        self._sampling = sampling
        self._wanted = 0
        self._point: Point | None = None  # None before it has begun
        self._stream: TextStream | None = None
        self._unseen = Unseen("", lambda _: None)
        self._asked = randomness.state()
        self._seconds = 0.0
        self._layers: tuple[LayerTotals, ...] = ()
        self._recorder = Recorder()

    @property
    def ids(self) -> list[int]:
        """The ids of the answer so far."""
        return self._stream.ids if self._stream else []

    @property
    def full(self) -> bool:
        """Whether the model's context has no room for another token."""
        limit = self.model.context_length
        return limit is not None and len(self.prompt) + len(self.ids) >= limit

    def begin(self, write: Callable[[str], object]) -> None:
        """Encode the prompt, and see whether it can be answered; nothing happens if that is done.

        Raises
        ------
        PromptError
            If the prompt is none, or leaves no room in the model's context.
        """
        if not self._wanted:
            self.prepare()
            self._wanted = self._room("prompt", "Shorten it: the answer needs room too.", write)

    def go(
        self, new_renderer: Callable[[], Renderer], write: Callable[[str], object], stop: threading.Event, *, again: bool
    ) -> Answer:
        """Go on where it stands; write the text that is new, and return the whole answer.

        The first time, sampling without a seed takes PyTorch's random numbers. `again`, it takes those that it would have got
        then, and leaves the random state as it is.

        Raises
        ------
        UnsupportedError
            If the checkpoint asks for a decoding that transformers refuses, or computes what is not a number.
        KeyboardInterrupt
            If the user interrupts, or `stop` is set; `interrupted` says more.
        """
        answer = self._answer(self._make(new_renderer, write, stop, again=again))
        self.keep(answer)
        return answer

    def interrupted(self) -> Interrupted:
        """Return what to raise when it is interrupted, with the answer so far."""
        answer = self._answer("interrupted")
        self.keep(answer)
        count = len(self.ids)
        where = f"after {count} tokens; _airllm holds the text so far" if count else "before the first token"
        return Interrupted(f"stopped {where}, and %airllm continue goes on", answer)

    def prepare(self) -> None:
        """Set `prompt` and `cache`."""
        self.prompt = self._encode()
        self.cache = cache.new(self.model)

    def keep(self, answer: Answer) -> None:
        """Take note of an answer, complete or not; may be called again."""

    def extend(self, write: Callable[[str], object]) -> None:
        """Let a text that was cut have as many new tokens again.

        Raises
        ------
        PromptError
            If the model's context is full.
        """
        more = self._room("text", "Ask again with a shorter prompt, or begin a new conversation.", write)
        self._wanted = len(self.ids) + more
        self.limited = False

    def release(self) -> Any:
        """Return the KV cache, which another run goes on with: this one cannot any more."""
        taken, self.cache, self._point = self.cache, None, None
        return taken

    def rewind(self) -> None:
        """Make the KV cache what it was between two passes; may be called again."""
        if self._point is not None:
            self._point.restore()

    def _make(
        self, new_renderer: Callable[[], Renderer], write: Callable[[str], object], stop: threading.Event, *, again: bool
    ) -> Stopped:
        """Generate what is missing, and return how the text ends."""
        outside, listener = randomness.state(), listener_of_user(self.model)
        aside = again or self._sampling.seed is not None
        wanted = self._wanted - (self._point.made if self._point else 0)
        state = RunState(self.model.name, self.model.layers, wanted, memory_left(self.model), self._recorder)
        self._recorder.resume()
        progress = Progress(state, new_renderer(), stop)
        last = ""
        ended: Ended = "failed"

        def show(text: str) -> None:
            nonlocal last
            last = text
            progress.before_text()
            write(text)

        def leave() -> None:
            self.model.progress = listener
            self._settle()
            if aside:
                randomness.put_back(outside)
            elif self._point is not None and ended != "done":
                randomness.put_back(self._point.random)

        try:
            try:
                self._generate(show, progress)
                ended = "done"
            except KeyboardInterrupt:
                ended = "interrupted"
                raise
            finally:
                leave()
        finally:
            leave()  # once more, should an interrupt have hit the first
            if ended != "done" and self._stream is not None:
                self._open(show, self.ids).end()  # what was held back, and what an interrupt has kept from being written
            if last and not last.endswith("\n"):
                write("\n")
            self._unseen.close()
            progress.finish(ended)
            self._seconds += progress.state.seconds
            done = progress.totals()
            self._layers = tuple(map(LayerTotals.__add__, self._layers, done)) if self._layers else done
        return self._ending()

    def _generate(self, show: Callable[[str], object], progress: Progress) -> None:
        if self._point is None:
            if self._sampling.seed is None:
                randomness.put_back(self._asked)
            else:
                torch.manual_seed(self._sampling.seed)
            self._point = self._here()
        else:
            self._point.restore()
            randomness.put_back(self._point.random)
        stream = self._open(show, self.ids[: self._point.made])
        if self._complete(stream):  # the interrupt came late
            stream.end()
            return

        def listen(event: Event) -> None:
            if type(event) is PassBegin:
                self._point = self._here()
            progress(event)

        self.model.progress = listen
        with decoding.refusals(self.model, lambda: progress.state.passes_begun):
            self.model.generate(**self._options(stream))
        stream.end()

    def _options(self, stream: TextStream) -> dict[str, Any]:
        """Return what ``generate`` takes: all ids, those included whose keys the cache holds already."""
        ids = torch.tensor([self.prompt + stream.ids])
        options = self._sampling.options(self.model) | {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": self._wanted - len(stream.ids),
            "pad_token_id": decoding.pad_id(self.model),
            "stopping_criteria": [_Take(stream, self._complete)],
        }
        if self.cache is not None:
            options |= {"past_key_values": self.cache, "cache_implementation": None}
        if stream.ids:
            options["begin_suppress_tokens"] = None  # they are for the beginning of the text
        return options

    def _here(self) -> Point:
        return Point(len(self.ids), cache.snapshot(self.cache), randomness.state())

    def _settle(self) -> None:
        """Go back to the begin of the last pass, unless the id that it gave was kept: then on to the present."""
        if self._point is None:
            return
        if len(self.ids) > self._point.made and not self.model.generation_config.stop_strings:
            self._point = self._here()
        else:  # with stop strings of the checkpoint, transformers has to look at that id again
            self._point.restore()

    def _open(self, write: Callable[[str], object], ids: list[int]) -> TextStream:
        """Make the text again as far as it goes, and write what the reader has not seen of it."""
        self._unseen = Unseen(self._unseen.seen, write)
        self._stream = TextStream(self.model.tokenizer, self._unseen, self._sampling.stop, ids)
        return self._stream

    def _complete(self, stream: TextStream) -> bool:
        """Tell whether the text has come to its end."""
        ends = decoding.as_set(self.model.generation_config.eos_token_id)
        return stream.stopped or len(stream.ids) >= self._wanted or not ends.isdisjoint(stream.ids[-1:])

    def _ending(self) -> Stopped:
        if self._stream is not None and self._stream.stopped:
            return "stop"
        return "end" if len(self.ids) < self._wanted or self.ids[-1] in decoding.end_ids(self.model) else "length"

    def _room(self, what: str, remedy: str, write: Callable[[str], object]) -> int:
        """Return how many more tokens the context has room for, up to `max_new_tokens`, and say so if it is fewer."""
        wanted, limit, used = self._sampling.max_new_tokens, self.model.context_length, len(self.prompt) + len(self.ids)
        if limit is None:
            return wanted
        if limit - used < 1:
            raise PromptError(f"The {what} has {used} tokens, and {self.model.name} has a context of {limit}.", remedy)
        if limit - used < wanted:
            write(f"(The context of {limit} tokens leaves room for {limit - used}, not {wanted}.)\n")
        return min(limit - used, wanted)

    def _answer(self, stopped: Stopped) -> Answer:
        text = self._stream.text if self._stream else ""
        if stopped == "interrupted" and self._stream:  # who knows where
            stream = TextStream(self.model.tokenizer, lambda _: None, self._sampling.stop, self.ids)
            stream.end()
            text = stream.text
        most = max(self._sampling.max_new_tokens, self._wanted)  # `extend` allows more
        sampling = replace(self._sampling, max_new_tokens=most)
        settings, timeline = Settings.of(self.model, sampling, self.system), self._recorder.timeline()
        return Answer(text, tuple(self.ids), len(self.prompt), self._seconds, stopped, self._layers, settings, timeline)


class _Take:
    """A stopping criterion for ``generate``, by which each new id comes.

    A streamer gets it later: since transformers 5.23 after all criteria, so that the text would go on for a token after a stop
    string, and on MPS a whole pass later.
    """

    def __init__(self, stream: TextStream, complete: Callable[[TextStream], bool]) -> None:
        self._stream = stream
        self._complete = complete

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if not self._complete(self._stream):
            self._stream.take(input_ids[0, -1:].tolist())
        return torch.full((input_ids.shape[0],), self._stream.stopped, dtype=torch.bool, device=input_ids.device)
