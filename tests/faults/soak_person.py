"""A person at one session: loads, asks, presses stop, goes on. What comes out is transformers' own, or a clear error."""

from __future__ import annotations

import _thread
import contextlib
import io
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from soak_reference import LONGEST, TEMPERATURE, Reference
from tiny import budgets

from airllm_nb import plan
from airllm_nb.engine.interrupts import free_locks
from airllm_nb.errors import AirLLMError
from airllm_nb.notebook.magics import AirLLMMagics
from airllm_nb.notebook.session import Session
from airllm_nb.notebook.summary import Answer, Interrupted

PROMPTS = ["What is this?", "Tell me of the sea.", "abcdefgh", "One, two, three, four, five: what comes next?"]
LENGTHS = [1, 4, 8]
"""Tokens that are asked for; LONGEST is a multiple of each."""
END = 257


class Asked(NamedTuple):
    """A text that was begun: what was said, the last by the user; how the next token is chosen; how many at once."""

    messages: tuple[str, ...]
    seed: int | None
    most: int
    in_conversation: bool


class Late(Exception):  # noqa: N818  # no error
    """An interrupt that came before the session had begun, or when it was done: nobody knows which."""


class Person:
    """Works in one shell.

    Parameters
    ----------
    shell : InteractiveShell
        Has the extension loaded.
    references : list of Reference
        The models there are.
    folder : Path
        For files that are hurt, or written.
    rng : random.Random
        Decides everything but how long things take.

    Attributes
    ----------
    did : Counter
        What came of what was done, in words.
    model, dtype : Reference or None, str
        What is loaded.
    """

    def __init__(self, shell: Any, references: list[Reference], folder: Path, rng: random.Random) -> None:
        self.shell, self.references, self.folder, self.rng = shell, references, folder, rng
        self.did: Counter[str] = Counter()
        self.model: Reference | None = None
        self.dtype = "float32"
        self.asked: Asked | None = None
        self._usual: dict[str, float] = {}  # seconds that a kind of call took

    @property
    def session(self) -> Session:
        """The shell's session: another one after the extension was loaded anew."""
        return self.shell.magics_manager.registry[AirLLMMagics.__name__].session

    def load(self) -> None:
        """Load one of the models, and see that its logits are right."""
        reference, keep = self.rng.choice(self.references), self.rng.choice(["all", "half", "none"])
        dtype = self.rng.choice(["float32", "float32", "bfloat16"])
        memory = self.budget(reference, dtype, keep)
        self.asked = None
        try:
            if self.rng.random() < 0.5:
                self.cell(f'%airllm load "{reference.folder}" --device cpu --dtype {dtype} --memory {memory}')
            else:
                options = {"device": "cpu", "dtype": dtype, "memory": memory}
                self.pressing_stop("load", lambda: self.session.load(str(reference.folder), **options))
        except (Interrupted, Late):
            self.did["loads stopped"] += 1
        else:
            self.did["loads"] += 1
        self.look()
        assert not self.did["loads"] or self.model is None or self.model in self.references

    def look(self) -> None:
        """See what is loaded, and that its logits are right."""
        self.model = None
        if self.session.loaded:
            model = self.session.model
            self.model = next(reference for reference in self.references if reference.folder == model.path)
            self.dtype = str(model.dtype).removeprefix("torch.")
            ids = tuple(b"exactly this")
            assert torch.equal(model(torch.tensor([ids])).logits, self.model.logits(ids, self.dtype)), "other logits"

    @staticmethod
    def budget(reference: Reference, dtype: str, keep: str) -> int:
        """Return the bytes with which all layers stay, half of them, or none."""
        return budgets(plan(reference.folder, device="cpu", dtype=dtype, memory="1TB"))[keep]

    def ask(self, *, stop: bool = True, cell: bool = True) -> None:
        """Ask, perhaps by a cell."""
        asked = Asked((self.rng.choice(PROMPTS),), self.rng.choice([None, 1, 2]), self.rng.choice(LENGTHS), False)
        prompt, sampling = asked.messages[0], self._sampling(asked)

        def by_cell() -> Answer:
            how = f"--temperature {TEMPERATURE} --seed {asked.seed}" if asked.seed else ""
            self.cell(f"%%airllm --max-new-tokens {asked.most} {how}\n{prompt}")
            return self.session.answer

        ask = by_cell if cell and self.rng.random() < 0.3 else lambda: self.session.ask(prompt, **sampling)
        self.run("ask", ask, asked, stop=stop)

    def chat(self) -> None:
        """Say something in the conversation."""
        said = self.said()
        if len(said) > 2 or self.dtype != "float32":  # in bfloat16, the last bits of a KV cache can decide between two tokens
            self.forget()
            said = ()
        asked = Asked((*said, self.rng.choice(PROMPTS)), self.rng.choice([None, 1, 2]), self.rng.choice(LENGTHS), True)
        kept = self.run("chat", lambda: self.session.chat(asked.messages[-1], **self._sampling(asked)), asked)
        assert self.said() in {said if kept else (), (*asked.messages, self.session.answer.text if self.session.answer else "")}

    def proceed(self) -> None:
        """Go on with a text, if there is one, until it has its end or is long enough."""
        while self.asked and self.session.can_proceed and len(self.session.answer.token_ids) < LONGEST:
            self.run("proceed", self.session.proceed, self.asked)
            self.did["texts gone on with"] += 1

    def forget(self) -> None:
        """Begin a new conversation."""
        self.session.forget()
        self.asked = self.asked if self.asked and not self.asked.in_conversation else None
        assert not self.said()

    def run(self, name: str, call: Callable[[], Answer], asked: Asked, *, stop: bool = True) -> bool:
        """Do what makes text, perhaps stop it, and compare it with transformers' own; tell whether nothing was forgotten."""
        try:
            answer = self.pressing_stop(name, call) if stop else call()
        except Interrupted as interrupt:
            self.did["texts stopped"] += 1
            if interrupt.answer is None:  # before it had begun: what there was before can be gone on with
                return True
            answer = interrupt.answer
        except Late:
            self.asked = None
            self.session.forget()
            return False
        self.asked = asked
        self.did["texts"] += 1
        self.compare(answer, asked)
        return True

    def compare(self, answer: Answer, asked: Asked) -> None:
        """Raise unless an answer is the beginning of what transformers makes, of a length that was asked for or to the end."""
        made, expected = list(answer.token_ids), self.model.ids(asked.messages, self.dtype, asked.seed)
        assert made == expected[: len(made)], f"{made} instead of {expected}: {asked}, {self.model.kind}, {self.dtype}"
        assert answer.text == self.model.text(made), f"{answer.text!r} for {made}"
        if answer.stopped != "interrupted":
            assert made[-1] == END or (made and len(made) % asked.most == 0), f"{len(made)} tokens of {asked}"

    def said(self) -> tuple[str, ...]:
        """Return what was said in the conversation."""
        return tuple(message["content"] for message in self.session.conversation.messages)

    def pressing_stop(self, name: str, call: Callable[[], Any]) -> Any:
        """Call, and perhaps press stop at a random moment: by a signal, as ^C, or from another thread, as a button.

        Raises
        ------
        Interrupted
            If it was stopped.
        Late
            If the signal came outside of the session.
        """
        how = self.rng.choice(["not", "by signal", "by button"])
        moment = self.rng.random() * self._usual.get(name, 0.1)
        begin = time.perf_counter()
        if how == "not":
            made = call()
            self._usual[name] = time.perf_counter() - begin
            return made
        if how == "by button":
            timer = threading.Timer(moment, self.session.stop)
            timer.start()
            try:
                return call()
            finally:
                timer.cancel()
                timer.join()
        try:
            with _signal_after(moment):
                return call()
        except Interrupted:
            raise
        except KeyboardInterrupt:
            free_locks()
            self.did["interrupts outside of the session"] += 1
            raise Late from None

    def cell(self, code: str) -> str:
        """Run a cell as a notebook does; returns what it printed, and raises what it raised."""
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
            result = self.shell.run_cell(code)
        if (error := result.error_before_exec or result.error_in_exec) is not None:
            assert isinstance(error, KeyboardInterrupt) or "Traceback" not in shown.getvalue(), shown.getvalue()
            raise error
        return shown.getvalue()

    @contextlib.contextmanager
    def refusal(self, *kinds: str) -> Iterator[None]:
        """Expect an error of these kinds, with a cause and a remedy."""
        with pytest.raises(AirLLMError) as caught:
            yield
        assert type(caught.value).__name__ in kinds, repr(caught.value)
        self.clear(caught.value)

    def clear(self, error: AirLLMError) -> None:
        """See that an error is one that says what to do."""
        assert error.cause.strip(), repr(error)
        assert error.remedy.strip(), repr(error)
        self.did["errors"] += 1

    @staticmethod
    def _sampling(asked: Asked) -> dict[str, Any]:
        return {"max_new_tokens": asked.most} | ({"temperature": TEMPERATURE, "seed": asked.seed} if asked.seed else {})


@contextlib.contextmanager
def _signal_after(seconds: float) -> Iterator[None]:
    """Interrupt a block, if it takes as long: by a real signal, to whatever handler there is for one."""
    before = signal.signal(signal.SIGALRM, lambda *_: _thread.interrupt_main())
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(0)  # for one that has just come
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
