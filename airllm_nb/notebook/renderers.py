"""Three ways to draw a run: widgets in a notebook, tqdm in a terminal, and not at all."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import ipywidgets
from IPython.display import display
from tqdm import tqdm

from airllm_nb.notebook import strip
from airllm_nb.notebook.stop_button import StopButton

if TYPE_CHECKING:
    from collections.abc import Callable

    from airllm_nb.notebook.progress import Renderer
    from airllm_nb.notebook.run_state import RunState

    Stop = Callable[[], object]


class LayerDisplay(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets publishes no types
    """A box that shows what goes on, and says nothing where it is over: its text form, which a saved notebook shows, is empty."""

    def __repr__(self) -> str:
        return ""


class WidgetRenderer:
    """One HTML widget whose value is replaced; nothing else is sent. Until the run ends, a button below it calls `stop`."""

    def __init__(self, stop: Stop | None = None) -> None:
        self._picture = ipywidgets.HTML()
        self._button = StopButton(stop) if stop else None
        self._box = LayerDisplay([ipywidgets.HTML(strip.STYLE), self._picture, *filter(None, (self._button,))])
        self._shown = False

    def draw(self, state: RunState) -> None:
        """Replace the picture; the first time, show it."""
        self._picture.value = strip.render(state)
        if not self._shown:
            self._shown = True
            display(self._box)
        if state.ended and self._button is not None:
            self._box.children = self._box.children[:-1]
            self._button.close()
            self._button = None

    def before_text(self) -> None:
        """Do nothing: text is written below the widget."""

    def close(self) -> None:
        """Remove the widgets from the notebook and from memory."""
        for widget in (*self._box.children, self._box):
            widget.close()


class TextRenderer:
    """A tqdm bar on stderr: over the layers of a load or of the prompt's pass; gone when text begins. A note comes last."""

    def __init__(self, _stop: Stop | None = None) -> None:
        self._bar: tqdm | None = None
        self._text_began = False

    def draw(self, state: RunState) -> None:
        """Move the bar; it is made when there is something to count."""
        if state.ended:
            self.close()
            if state.note:
                print(state.note, file=sys.stderr)
        elif (state.layers or state.fetching) and not self._text_began:
            if self._bar is None:
                # `disable=None` keeps it out of files and pipes; Progress sets the pace.
                self._bar = tqdm(total=100, bar_format="{desc} |{bar:30}|", leave=False, disable=None, delay=1e-9)
            part = state.fraction if state.kind in ("opening", "load") or state.batches else state.pass_fraction
            self._bar.n = round(100 * (state.batches.fraction(part) if state.batches else part))
            self._bar.set_description_str(strip.headline(state))

    def before_text(self) -> None:
        """Take the bar away: a terminal has one line for both."""
        self._text_began = True
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class SilentRenderer:
    """Draws nothing."""

    def __init__(self, _stop: Stop | None = None) -> None:
        """Take what the others take."""

    def draw(self, state: RunState) -> None:
        """Do nothing."""

    def before_text(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


KINDS: dict[str, Callable[[Stop], Renderer]] = {"widget": WidgetRenderer, "text": TextRenderer, "silent": SilentRenderer}
"""By name; each takes what stops the run, and a terminal has Ctrl+C for that."""
