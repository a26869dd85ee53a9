"""The conversation: what was said, what is being written, the prompt, and how the next token is chosen."""

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets

from airllm_nb.errors import PromptError
from airllm_nb.notebook.fold import Fold

if TYPE_CHECKING:
    from collections.abc import Sequence

EVERY = 0.1  # seconds between two updates of text that is being written: the eye follows no faster
DIGITS = 20  # of a seed: Python refuses to read thousands
NOTHING_YET = "The last answer's time, layer by layer, will be here."
NAMES = {"user": "you", "assistant": "model", "system": "system"}


class ChatBox(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets publishes no types
    """The turns of a conversation, the growing answer below them, the prompt box, and the settings, folded away.

    Parameters
    ----------
    actions : widget
        What can be done with the prompt: stands right below it.

    Attributes
    ----------
    prompt : Textarea
        What to ask next.
    settings, times : Fold
        How the next token is chosen, and where the time of the last answer went.
    """

    def __init__(self, actions: ipywidgets.DOMWidget) -> None:
        self._turns = ipywidgets.HTML()
        self._growing = ipywidgets.HTML()
        self._said = ipywidgets.HTML()
        # While it is typed, what is sent lags behind, and a click would overtake it: so it is sent when it is left.
        self.prompt = ipywidgets.Textarea(placeholder="Ask something", rows=3, continuous_update=False, layout={"width": "auto"})
        wide, narrow = {"description_width": "150px"}, {"width": "250px"}
        self.temperature = ipywidgets.FloatSlider(
            description="temperature", value=0.0, min=0.0, max=2.0, step=0.1, style=wide, readout_format=".1f",
            tooltip="0: the most likely token every time",
        )  # fmt: skip
        self.top_p = ipywidgets.FloatSlider(
            description="top p", value=1.0, min=0.05, max=1.0, step=0.05, style=wide, readout_format=".2f",
            tooltip="Sample from the likeliest tokens with this share together; 1: from all",
        )  # fmt: skip
        self.seed = ipywidgets.Text(description="seed", placeholder="none", continuous_update=False, style=wide, layout=narrow)
        self.most = ipywidgets.BoundedIntText(
            description="longest answer, tokens", value=256, min=1, max=1_000_000, style=wide, layout=narrow
        )
        self.system = ipywidgets.Textarea(
            description="system prompt",
            placeholder="none",
            rows=2,
            continuous_update=False,
            style=wide,
            layout={"width": "auto", "max_width": "560px"},
        )
        settings = ipywidgets.VBox([self.temperature, self.top_p, self.seed, self.most, self.system])
        self._back = ipywidgets.HTML(NOTHING_YET)
        self.settings = Fold("How it answers: sampling, length, system prompt", settings)
        self.times = Fold("Where the time went", self._back)
        self._text = ""
        self._drawn = 0.0
        super().__init__([self._turns, self._growing, self._said, self.prompt, actions, self.settings, self.times])

    def __repr__(self) -> str:
        return "<airllm_nb: conversation>"

    @property
    def sampling(self) -> dict[str, Any]:
        """What `Session.chat` takes beside the prompt.

        Raises
        ------
        PromptError
            If the seed is no number.
        """
        seed = self.seed.value.strip()
        if seed and not (seed.isdecimal() and len(seed) < DIGITS):
            raise PromptError(f"The seed is {seed!r}.", "Use a whole number from 0 up, or leave it empty.")
        samples = self.temperature.value > 0
        return {
            "max_new_tokens": self.most.value,
            "temperature": round(self.temperature.value, 3),
            "top_p": round(self.top_p.value, 3) if samples and self.top_p.value < 1 else None,
            "seed": int(seed) if seed else None,
            "system": self.system.value.strip(),
        }

    def show(self, messages: Sequence[dict[str, str]], notes: dict[tuple[int, str], str], hint: str = "") -> None:
        """Draw the turns; `notes` has a line to stand below some, by their number and text; `hint` follows that of the last."""
        below = [notes.get((number, message["content"]), "") for number, message in enumerate(messages)]
        below[-1:] = [note and note + hint for note in below[-1:]]
        self._turns.value = "".join(map(_turn, messages, below))
        self._growing.value = ""

    def begin(self, text: str = "") -> None:
        """Be ready for an answer that is written piece by piece, `text` being there already."""
        self._text = text
        self._said.value = ""
        self._draw()

    def write(self, text: str) -> None:
        """Show more of the answer."""
        self._text += text
        if time.perf_counter() - self._drawn >= EVERY:
            self._draw()

    def say(self, html: str) -> None:
        """Show something below the conversation that is not part of it."""
        self._said.value = html

    def look_back(self, html: str = NOTHING_YET) -> None:
        """Show where the time of the last answer went."""
        self._back.value = html

    def enable(self, *, yes: bool) -> None:
        """Let the controls be used, or not."""
        for control in (self.temperature, self.top_p, self.seed, self.most, self.system):
            control.disabled = not yes

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        self._growing.value = _turn({"role": "assistant", "content": self._text + " ▍"}, "")


def _turn(message: dict[str, str], note: str) -> str:
    role = message["role"]
    below = f'<div class="airllm-turn-note">{escape(note)}</div>' if note else ""
    return (
        f'<div class="airllm-turn airllm-{escape(role)}"><b>{escape(NAMES.get(role, role))}</b>'
        f"<div>{escape(message['content'])}</div>{below}</div>"
    )
