"""The last run: what it has left, and whether it can be gone on with."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING

from airllm_nb.compat.config import quiet

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from airllm_nb import LayeredModel
    from airllm_nb.notebook.conversation import Conversation
    from airllm_nb.notebook.generation import Run
    from airllm_nb.notebook.progress import Renderer
    from airllm_nb.notebook.summary import Answer, Interrupted

    Write = Callable[[str], object]


class LastRun:
    """Makes runs, and keeps the last one as long as it can be gone on with.

    Whatever an interrupt hits, either the answer is given to whoever asked for it, or the run can be gone on with: so `ask` comes
    before all else, `give` after it, and `take_back` when an interrupt came after that.

    Parameters
    ----------
    new_renderer : callable
        Returns what draws a run, where nothing else is said.
    write : callable
        Takes each piece of text, where nothing else is said.
    stop : threading.Event
        Set by whoever stops a run.

    Attributes
    ----------
    run : Run or None
        What can be gone on with.
    text : list of int
        The last run's ids, those of the prompt and those of the answer.
    answer : Answer or None
        The last answer, complete or not.
    current : Run or None
        The run of the call that is under way, if it has made or taken one.
    """

    def __init__(self, new_renderer: Callable[[], Renderer], write: Write, stop: threading.Event) -> None:
        self.run: Run | None = None
        self.text: list[int] = []
        self.answer: Answer | None = None
        self._new_renderer = new_renderer
        self._write = write
        self._stop = stop
        self.current: Run | None = None
        self._made: Answer | None = None  # by the call that is under way

    def ask(self) -> None:
        """Note that somebody asks for something."""
        self.current = self._made = None

    @property
    def made(self) -> Run | None:
        """The run that has made an answer since then."""
        return self.run if self._made is not None else None

    def give(self, run: Run) -> None:
        """Note that they get it: only a text that was cut at its largest length can be gone on with."""
        run.limited = self._made is not None and self._made.stopped == "length"
        self.run = run if run.limited else None

    def take_back(self, run: Run) -> None:
        """Note that they did not get it, or not all of it: it can be gone on with."""
        run.limited, self.run = False, run

    def interrupted(self, run: Run) -> Interrupted:
        """Take a run back, and return what to raise: who asked gets the text so far, and it can be gone on with."""
        self.take_back(run)
        stopped = run.interrupted()
        self.answer = stopped.answer
        return stopped

    def begin(
        self, make: Callable[[], Run], conversation: Conversation, renderer: Renderer | None, write: Write | None
    ) -> Answer:
        """Make a new answer; where it is refused, what could be gone on with before still can."""
        before, self.run = self.run, None
        try:
            with quiet():
                self.run = self.current = run = make()
            with self._interruptible(run):
                run.begin(write or self._write)
        except Exception:
            self.run, self.current = before, None
            raise
        _release(before, conversation)
        try:
            return self._go(run, renderer, write, again=False)
        except Exception:
            self.run = self.current = None
            raise

    def goes_on(self, model: LayeredModel) -> bool:
        """Whether `proceed` has a text of this model."""
        return self.run is not None and self.run.model is model

    def proceed(self, renderer: Renderer | None, write: Write | None) -> Answer:
        """Go on with the run; there must be one."""
        run = self.current = self.run
        assert run is not None
        if run.limited:
            run.extend(write or self._write)
        return self._go(run, renderer, write, again=True)

    def leave(self, conversation: Conversation) -> None:
        """Forget the run, if it belongs to a conversation."""
        if self.run is not None and self.run.conversation is conversation:
            self.run = None

    def forget(self, conversation: Conversation) -> None:
        """Forget run and text, because their model goes."""
        _release(self.run, conversation)
        self.run = None
        self.text = []

    def _go(self, run: Run, renderer: Renderer | None, write: Write | None, *, again: bool) -> Answer:
        write = write or self._write
        self.text = []
        with self._interruptible(run):
            run.begin(write)  # again, if that was interrupted
            answer = run.go((lambda: renderer) if renderer else self._new_renderer, write, self._stop, again=again)
        self.answer = self._made = answer
        self.text = [*run.prompt, *run.ids]
        return answer

    @contextlib.contextmanager
    def _interruptible(self, run: Run) -> Iterator[None]:
        try:
            with quiet():
                yield
        except KeyboardInterrupt as interrupt:
            traceback.clear_frames(interrupt.__traceback__)  # IPython keeps it, and so what is half computed
            raise self.interrupted(run) from None


def _release(run: Run | None, conversation: Conversation) -> None:
    """Free a run's KV cache, unless the conversation goes on with it: IPython's last traceback may hold the run itself."""
    if run is not None and run is not conversation.last:
        run.release()
