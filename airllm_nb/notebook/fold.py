"""Something that can be folded away. A plain button does it: ipywidgets' accordion cannot be reached with the keyboard."""

from __future__ import annotations

from typing import Any

import ipywidgets


class Fold(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets publishes no types
    """A heading that shows and hides what is below it, hidden at first.

    Parameters
    ----------
    title : str
        The heading.
    body : widget
        What is shown and hidden.
    """

    def __init__(self, title: str, body: ipywidgets.DOMWidget) -> None:
        self.heading = ipywidgets.ToggleButton(description=title, layout={"width": "auto"})
        self._body = body
        super().__init__([self.heading, body])
        self.add_class("airllm-fold")
        self.heading.observe(self._turn, "value")
        self._turn()

    def __repr__(self) -> str:
        return "<airllm_nb: folded away>"

    def _turn(self, _change: Any = None) -> None:
        self.heading.icon = "caret-down" if self.heading.value else "caret-right"
        self._body.layout.display = None if self.heading.value else "none"
