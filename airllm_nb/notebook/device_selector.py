"""Where to compute: one button for each device that PyTorch knows, and for those that cannot be used the reason in words."""

from __future__ import annotations

import functools
from html import escape
from typing import Any

import ipywidgets
import traitlets

from airllm_nb.engine.devices import DeviceInfo, devices, select_device
from airllm_nb.errors import DeviceError

CHOSEN = "● "
"""Stands before the name of the chosen device: the colour of a pressed button alone would be lost on some."""


class DeviceSelector(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets publishes no types
    """A row of buttons of which one is pressed; those of devices that cannot be used are disabled.

    No core widget can disable a single option, so each is a button of its own. A disabled button cannot be reached by keyboard,
    so that its reason stands below as text.

    Attributes
    ----------
    value : str
        Name of the chosen device, for ``device=``. What `device="auto"` would choose at first; setting it to one that cannot be
        used raises `DeviceError`.
    disabled : bool
        Whether nothing can be chosen at present.
    """

    value = traitlets.Unicode()
    disabled = traitlets.Bool(default_value=False)

    def __init__(self) -> None:
        self._row = ipywidgets.HBox()
        self._reasons = ipywidgets.HTML()
        self._refresh = ipywidgets.Button(
            description="refresh", icon="refresh", tooltip="Look again which devices there are", layout={"width": "auto"}
        )
        self._refresh.add_class("airllm-quiet")
        self._refresh.on_click(lambda _: self.refresh())
        self._row.add_class("airllm-row")
        self._buttons: dict[str, ipywidgets.ToggleButton] = {}
        self._infos: dict[str, DeviceInfo] = {}
        self._drawing = False
        super().__init__([self._row, self._reasons])
        self.refresh()

    def __repr__(self) -> str:
        return "<airllm_nb: devices>"

    @property
    def buttons(self) -> dict[str, ipywidgets.ToggleButton]:
        """The buttons by the name of their device."""
        return dict(self._buttons)

    def refresh(self) -> None:
        """Look again which devices there are. If the chosen one is gone, what `device="auto"` chooses now is chosen, and said."""
        self._infos = {info.name: info for info in devices()}
        for button in self._buttons.values():
            button.close()
        self._buttons = {name: self._button(info) for name, info in self._infos.items()}
        self._row.children = (*self._buttons.values(), self._refresh)
        before = self.value
        info = self._infos.get(before)
        gone = info is None or not info.usable
        if gone:
            self.value = str(select_device("auto")[0])
        self._draw(f"{before} can no longer be used: {self.value} is chosen now" if before and gone else "")

    @traitlets.validate("value")
    def _usable(self, proposal: Any) -> str:
        name = str(proposal["value"])
        info = self._infos.get(name)
        if info is None:
            names = ", ".join(name for name, info in self._infos.items() if info.usable)
            raise DeviceError(f"There is no device {name!r} here.", f"Choose one of: {names}.")
        if not info.usable:
            raise DeviceError(f"{info.label} cannot be used: {info.reason}.", "Choose another device.")
        return name

    @traitlets.observe("value", "disabled")
    def _changed(self, _change: Any) -> None:
        self._draw()

    def _button(self, info: DeviceInfo) -> ipywidgets.ToggleButton:
        button = ipywidgets.ToggleButton(tooltip=info.reason, layout={"width": "auto"})
        button.observe(functools.partial(self._pressed, info.name), "value")
        return button

    def _pressed(self, name: str, change: Any) -> None:
        if self._drawing:
            return
        if change["new"]:
            self.value = name
        self._draw()  # a click on the chosen one does not release it

    def _draw(self, news: str = "") -> None:
        self._drawing = True
        try:
            for name, button in self._buttons.items():
                info = self._infos[name]
                chosen = name == self.value
                button.value = chosen
                button.disabled = self.disabled or not info.usable
                button.description = f"{CHOSEN if chosen else ''}{info.label}"
        finally:
            self._drawing = False
        lines = [f"{info.label}: {info.reason}" for info in self._infos.values() if not info.usable]
        lines = [*([news] if news else []), *lines]
        self._reasons.value = f'<div class="airllm-why">{"<br>".join(map(escape, lines))}</div>' if lines else ""
