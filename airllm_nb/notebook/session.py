"""The loaded model and how it was loaded: one at a time, and one run at a time."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from airllm_nb.compat.config import quiet
from airllm_nb.compat.versions import require_supported
from airllm_nb.errors import AirLLMError
from airllm_nb.notebook.conversation import Conversation
from airllm_nb.notebook.imports import import_engine
from airllm_nb.notebook.interrupts import free_logging, interrupt_later
from airllm_nb.notebook.progress import Progress, Renderer
from airllm_nb.notebook.run_state import Ended, RunState
from airllm_nb.notebook.summary import Answer, Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from airllm_nb import LayeredModel
    from airllm_nb.engine.trace import Trace
    from airllm_nb.notebook.answers import Answers
    from airllm_nb.notebook.generation import Run

PLENTY = "1000TB"
PAUSE = 0.01
LENS_TOKENS = 12


class SessionError(AirLLMError):
    """No model is loaded, or the one that is loaded is busy."""


def write_stdout(text: str) -> None:
    """Write to the cell's (or the terminal's) output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Watcher(Protocol):
    """Who wants to know when something about the session has changed."""

    def refresh(self) -> None:
        """Look at the session again."""

    def close(self) -> None:
        """Go away: the session is not used any more."""


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
    answer : Answer or None
        The last run's answer.
    conversation : Conversation
        What `chat` goes on with.
    watchers : set of Watcher
        Told when a load or a run begins, and when it is over; does not keep them.
    """

    def __init__(self, new_renderer: Callable[[], Renderer], write: Callable[[str], object] = write_stdout) -> None:
        self.answer: Answer | None = None
        self.conversation = Conversation()
        self.watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self._run: Run | None = None  # what can be gone on with
        self._text: list[int] = []  # the last run's ids, of the prompt and of the answer
        self._given: Answer | None = None  # by the call that is under way
        self._new_renderer = new_renderer
        self._write = write
        self._model: LayeredModel | None = None
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._owner: int | None = None  # the thread whose run it is

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
        return self._owner is not None

    def stop(self) -> None:
        """End the load or the run that is under way, on whatever thread, before its next layer; it raises `Interrupted` there."""
        self._stop.set()

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
            progress = Progress(RunState(model), renderer or self._new_renderer(), self._stop)
            ended: Ended = "failed"
            try:
                import_engine()
                from airllm_nb import LayeredModel

                with quiet():
                    if self.loaded:
                        _check(model, progress=progress, **options)
                        self._free()
                    loaded = LayeredModel.from_pretrained(model, progress=progress, **options)
                loaded.progress = None
                self._model = loaded
                ended = "done"
            except KeyboardInterrupt:
                ended = "interrupted"
                raise
            finally:
                progress.finish(ended)
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

            return self._begin(make, renderer, write)

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

            return self._begin(make, renderer, write)

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
            model, run = self.model, self._run
            if run is None or run.model is not model:
                raise SessionError("There is nothing to go on with: no text was stopped or cut.", "Ask something first.")
            if run.limited:
                run.extend(write or self._write)
            return self._go(run, renderer, write, again=True)

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
            if not self._text:
                raise SessionError("There is no text to look into.", "Ask something first.")
            from airllm_nb.notebook.verdict import memory_left

            state = RunState(model.name, model.layers, 1, memory_left(model))
            progress = Progress(state, renderer or self._new_renderer(), self._stop)
            ended: Ended = "failed"
            try:
                model.progress = progress
                trace = model.trace(self._text[:-1], last=last)
                ended = "done"
            except KeyboardInterrupt:
                ended = "interrupted"
                raise
            finally:
                model.progress = None
                progress.finish(ended)
            return trace

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

            return mapping.run(model, prompts, (lambda: renderer) if renderer else self._new_renderer, self._stop, **options)

    @property
    def can_proceed(self) -> bool:
        """Whether the last text was stopped or cut, so that `proceed` can go on with it."""
        return self._run is not None and not self.busy

    @property
    def can_proceed_in_conversation(self) -> bool:
        """Whether that text is the conversation's last answer."""
        return self.can_proceed and self._run is self.conversation.last

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
        for watcher in list(self.watchers):
            watcher.close()
        while self.busy:
            self.stop()  # again and again: what has just begun takes a stop for one of what was before
            time.sleep(PAUSE)
        self.unload()

    def _begin(self, make: Callable[[], Run], renderer: Renderer | None, write: Callable[[str], object] | None) -> Answer:
        """Make a new answer; where it is refused, what could be gone on with before still can."""
        before, self._run = self._run, None
        try:
            with quiet():
                self._run = run = make()
            with self._interruptible(run):
                run.begin(write or self._write)
        except Exception:
            self._run = before
            raise
        self._let_go(before)
        try:
            return self._go(run, renderer, write, again=False)
        except Exception:
            self._run = None
            raise

    def _go(self, run: Run, renderer: Renderer | None, write: Callable[[str], object] | None, *, again: bool) -> Answer:
        write = write or self._write
        self._text = []
        with self._interruptible(run):
            run.begin(write)  # again, if that was interrupted
            answer = run.go((lambda: renderer) if renderer else self._new_renderer, write, self._stop, again=again)
        self.answer = self._given = answer
        self._text = [*run.prompt, *run.ids]
        return answer

    @contextlib.contextmanager
    def _interruptible(self, run: Run) -> Iterator[None]:
        try:
            with quiet():
                yield
        except KeyboardInterrupt as interrupt:
            if run is not None:
                run.limited, self._run = False, run
            traceback.clear_frames(interrupt.__traceback__)  # as below
            stopped = run.interrupted()
            self.answer = stopped.answer
            raise stopped from None

    def _let_go(self, run: Run | None) -> None:
        """Free a run's KV cache, unless the conversation goes on with it: IPython's last traceback may hold the run itself."""
        if run is not None and run is not self.conversation.last:
            run.release()

    def _forget(self) -> None:
        if self._run is not None and self._run.conversation is self.conversation:
            self._run = None
        self.conversation.close()
        self.conversation = Conversation()

    def _free(self) -> None:
        if self._model is None:
            return
        self._let_go(self._run)
        self._run = None
        self._text = []
        self._forget()
        with interrupt_later():  # in the middle, it could be lost in a finalizer, which raises nothing
            model, self._model = self._model, None
            model.close()
            del model
            gc.collect()  # modules and their hooks refer to each other

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        me = threading.get_ident()
        run: Run | None = None
        try:
            with self._guard:
                # A thread does one thing at a time: should an interrupt keep what is below from being undone, it is let in again.
                if self._owner not in {None, me}:
                    raise SessionError("The model is busy with another run.", "Wait until it ends, or stop it.")
                self._owner = me
                self._stop.clear()
                self._given = None
            self._tell()
            yield
            if self._given is not None and self._run is not None:  # last: an interrupt until then means that it was not given
                run = self._run
                run.limited = self._given.stopped == "length"
                self._run = run if run.limited else None
        except Interrupted:
            raise
        except KeyboardInterrupt as interrupt:
            if run is not None:
                run.limited, self._run = False, run
            traceback.clear_frames(interrupt.__traceback__)  # IPython keeps it, and so what is half loaded or half computed
            raise Interrupted(f"stopped; {self._model.name if self._model else 'no model'} is loaded") from None
        finally:
            free_logging()
            if self._owner == me:
                self._owner = None
                self._tell()

    def _tell(self) -> None:
        for watcher in list(self.watchers):
            watcher.refresh()


def _check(model: str, *, memory: str = "auto", **options: Any) -> None:
    """Raise what `LayeredModel.from_pretrained` would raise for want of anything but memory that is in use now."""
    from airllm_nb import plan

    plan(model, memory=PLENTY if memory == "auto" else memory, **options)
