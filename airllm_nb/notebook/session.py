"""The loaded model and how it was loaded: one at a time, and one run at a time."""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from typing import TYPE_CHECKING, Any

from airllm_nb.compat.config import quiet
from airllm_nb.compat.versions import require_supported
from airllm_nb.engine.interrupts import interrupt_later
from airllm_nb.notebook.conversation import Conversation
from airllm_nb.notebook.imports import import_engine
from airllm_nb.notebook.last_run import LastRun
from airllm_nb.notebook.one_at_a_time import OneAtATime, SessionError
from airllm_nb.notebook.progress import Renderer, drawn, listening
from airllm_nb.notebook.run_state import RunState
from airllm_nb.notebook.summary import Answer, Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from airllm_nb import LayeredModel
    from airllm_nb.engine.trace import Trace
    from airllm_nb.notebook.answers import Answers
    from airllm_nb.notebook.generation import Run

PLENTY = "1000TB"
LENS_TOKENS = 12


def write_stdout(text: str) -> None:
    """Write to the cell's (or the terminal's) output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Session:
    """Holds at most one model, and runs it.

    Parameters
    ----------
    new_renderer : callable
        Returns what draws the next load or run.
    write : callable, optional
        Takes each piece of generated text; it goes to stdout unless told otherwise.

    Attributes
    ----------
    conversation : Conversation
        What `chat` goes on with.
    watchers : set of Watcher
        Told when a load or a run begins, and when it is over; does not keep them.
    """

    def __init__(self, new_renderer: Callable[[], Renderer], write: Callable[[str], object] = write_stdout) -> None:
        self.conversation = Conversation()
        self._new_renderer = new_renderer
        self._model: LayeredModel | None = None
        self._turns = OneAtATime()
        self._last = LastRun(new_renderer, write, self._turns.stop)
        self.watchers = self._turns.watchers

    @property
    def answer(self) -> Answer | None:
        """The last run's answer."""
        return self._last.answer

    @property
    def model(self) -> LayeredModel:
        """The loaded model; raises `SessionError` if there is none."""
        if self._model is None:
            require_supported()  # or the advice to load one would be in vain
            raise SessionError("No model is loaded.", "Load one first, for example: %airllm load demo")
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether there is a model."""
        return self._model is not None

    @property
    def busy(self) -> bool:
        """Whether a load or a run is under way."""
        return self._turns.busy

    def stop(self) -> None:
        """End the load or the run that is under way, on whatever thread, before its next layer; it raises `Interrupted` there."""
        self._turns.stop.set()

    def load(self, model: str, *, renderer: Renderer | None = None, **options: Any) -> LayeredModel:
        """Load a model in place of the one that is loaded.

        What can be known from the new model's headers is checked first, and if that fails the old one stays. Then the old one
        is freed, to make room; should the load fail after that, none is loaded.

        Parameters
        ----------
        model : str
            Hub id, local folder, or ``"demo"``.
        renderer : Renderer, optional
            What draws this load, in place of the session's own.
        **options
            What `LayeredModel.from_pretrained` takes.

        Raises
        ------
        AirLLMError
            If the model cannot be loaded; the message says why.
        Interrupted
            If the user interrupts.
        """
        with self._alone():
            require_supported()
            with drawn(RunState(model), renderer or self._new_renderer(), self._turns.stop) as progress:
                import_engine()
                from airllm_nb import LayeredModel

                with quiet():
                    if self.loaded:
                        _check(model, progress=progress, **options)
                        self._free()
                    loaded = LayeredModel.from_pretrained(model, progress=progress, **options)
                loaded.progress = None
                self._model = loaded
            return loaded

    def ask(
        self,
        prompt: str,
        *,
        system: str | None = None,
        raw: bool = False,
        renderer: Renderer | None = None,
        write: Callable[[str], object] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Run the model on a prompt, and write the text as it comes.

        Parameters
        ----------
        prompt : str
            What the user says; goes through the tokenizer's chat template where it has one.
        system : str, optional
            A system prompt for the chat template.
        raw : bool
            Give the prompt to the model as it is, without chat template.
        renderer, write : optional
            What draws this run, and what takes its text, in place of the session's own.
        **sampling
            See `airllm_nb.engine.decoding.Sampling`.

        Raises
        ------
        AirLLMError
            If no model is loaded, or the prompt or an option makes no sense.
        Interrupted
            If the user interrupts; its `answer` holds the text so far.
        """
        with self._alone():
            model = self.model
            from airllm_nb.engine import prompts
            from airllm_nb.engine.decoding import Sampling
            from airllm_nb.notebook.generation import Run

            def make() -> Run:
                run = Run(model, lambda: prompts.encode(model, prompt, system, raw=raw), Sampling(**sampling))
                run.system = system
                return run

            return self._last.begin(make, self.conversation, renderer, write)

    def chat(
        self,
        prompt: str,
        *,
        system: str | None = None,
        renderer: Renderer | None = None,
        write: Callable[[str], object] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Say something in the conversation, and write the answer as it comes.

        Only what the KV cache does not hold yet is computed; see `conversation` for how much it held. A turn that fails is no
        part of the conversation; of one that is stopped the text so far is.

        Parameters
        ----------
        prompt : str
            What the user says.
        system : str, optional
            The conversation's system prompt from now on; None leaves it as it is, an empty one takes it away.
        renderer, write, **sampling
            As for `ask`.

        Raises
        ------
        AirLLMError
            If no model is loaded, the prompt or an option makes no sense, or the model's context is full.
        Interrupted
            If the user interrupts; its `answer` holds the text so far.
        """
        with self._alone():
            model = self.model
            from airllm_nb.engine.decoding import Sampling

            def make() -> Run:
                return self.conversation.turn(model, prompt, system, Sampling(**sampling))

            return self._last.begin(make, self.conversation, renderer, write)

    def proceed(self, *, renderer: Renderer | None = None, write: Callable[[str], object] | None = None) -> Answer:
        """Go on with the last text, if it was stopped or cut at its largest length: what comes out is as if it had not been.

        Only what is new is written; the answer holds all.

        Raises
        ------
        SessionError
            If there is no such text.
        PromptError
            If the model's context is full.
        Interrupted
            If the user interrupts again.
        """
        with self._alone():
            if not self._last.goes_on(self.model):
                raise SessionError("There is nothing to go on with: no text was stopped or cut.", "Ask something first.")
            return self._last.proceed(renderer, write)

    def trace(self, *, last: int = LENS_TOKENS, renderer: Renderer | None = None) -> Trace:
        """Run over the last text once more, prompt and answer, and note what each layer would have said.

        The answer's last token is left out: what comes after it was not asked for.

        Parameters
        ----------
        last : int
            How many tokens are looked at, from the end.
        renderer : Renderer, optional
            What draws this pass, in place of the session's own.

        Raises
        ------
        SessionError
            If there is no text of the loaded model.
        UnsupportedError
            If the model has no logit lens.
        Interrupted
            If the user interrupts.
        """
        with self._alone():
            model = self.model
            if not self._last.text:
                raise SessionError("There is no text to look into.", "Ask something first.")
            from airllm_nb.notebook.verdict import memory_left

            state = RunState(model.name, model.layers, 1, memory_left(model))
            drawing = drawn(state, renderer or self._new_renderer(), self._turns.stop)
            with drawing as progress, listening(model, progress):
                return model.trace(self._last.text[:-1], last=last)

    def map(self, prompts: Iterable[str], *, renderer: Renderer | None = None, **options: Any) -> Answers:
        """Answer many prompts, of which each pass over the layers serves a whole batch.

        Parameters
        ----------
        prompts : iterable of str
            A list, a column of a DataFrame, ...
        renderer : Renderer, optional
            What draws it, in place of the session's own.
        **options
            What `LayeredModel.map` takes.

        Raises
        ------
        AirLLMError
            If no model is loaded, or a prompt, an option or the file of results makes no sense.
        MapInterrupted
            If the user interrupts; its `answers` hold what was complete.
        """
        with self._alone():
            model = self.model
            from airllm_nb.notebook import mapping

            return mapping.run(model, prompts, renderer or self._new_renderer(), self._turns.stop, **options)

    @property
    def can_proceed(self) -> bool:
        """Whether the last text was stopped or cut, so that `proceed` can go on with it."""
        return self._last.run is not None and not self.busy

    @property
    def can_proceed_in_conversation(self) -> bool:
        """Whether that text is the conversation's last answer."""
        return self.can_proceed and self._last.run is self.conversation.last

    def forget(self) -> None:
        """Begin a new conversation, and let the memory of the old one go."""
        with self._alone():
            self._forget()

    def unload(self) -> None:
        """Free the model; nothing happens if there is none."""
        with self._alone():
            self._free()

    def end(self) -> None:
        """Close whoever watches, stop what is under way, wait for it, and free the model."""
        self._turns.end()
        self.unload()

    def _forget(self) -> None:
        self._last.leave(self.conversation)
        self.conversation.close()
        self.conversation = Conversation()

    def _free(self) -> None:
        if self._model is None:
            return
        self._last.forget(self.conversation)
        self._forget()
        with interrupt_later():  # in the middle, it could be lost in a finalizer, which raises nothing
            model, self._model = self._model, None
            model.close()
            del model
            gc.collect()  # modules and their hooks refer to each other

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._refuse_nesting()
        try:
            self._turns.enter()
            self._last.ask()
            yield
            run = self._last.made
            if run is not None:
                self._last.give(run)  # last: an interrupt until then means that it was not given
        except Interrupted:
            raise
        except KeyboardInterrupt as interrupt:
            traceback.clear_frames(interrupt.__traceback__)  # IPython keeps it, and so what is half loaded or half computed
            if self._last.current is not None:  # between its last layer and who asked
                raise self._last.interrupted(self._last.current) from None
            raise Interrupted(f"stopped; {self._model.name if self._model else 'no model'} is loaded") from None
        finally:
            self._turns.leave()

    def _refuse_nesting(self) -> None:
        """Refuse a call from within another one: by looking at who calls, since an interrupt might leave a flag behind."""
        frame, calls = sys._getframe(1).f_back, 0  # noqa: SLF001  # Python has no other name for it
        while frame is not None:
            calls += frame.f_code in _CALLS and frame.f_locals.get("self") is self
            frame = frame.f_back
        if calls > 1:
            raise SessionError("This was called from within a run, which has the model.", "Call it before or after that run.")


_TAKE_TURNS = ("load", "ask", "chat", "proceed", "trace", "map", "forget", "unload")
_CALLS = frozenset(getattr(Session, name).__code__ for name in _TAKE_TURNS)


def _check(model: str, *, memory: str = "auto", **options: Any) -> None:
    """Raise what `LayeredModel.from_pretrained` would raise for want of anything but memory that is in use now."""
    from airllm_nb import plan

    plan(model, memory=PLENTY if memory == "auto" else memory, **options)
