"""The Stop button beside a run, where the kernel can take a click while a cell runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ipywidgets
from IPython import get_ipython

if TYPE_CHECKING:
    from collections.abc import Callable


class StopButton(ipywidgets.HBox):  # type: ignore[misc]  # ipywidgets publishes no types
    """A button that calls `stop` on another thread while the cell runs, or one that is disabled, with words that say what to do.

    The click arrives through a subshell: a thread of the kernel beside the one that runs the cell.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self.button = ipywidgets.Button(description="Stop", icon="stop", tooltip="Stop before the next layer computes")
        words = ""
        if clicks_arrive():
            self.button.on_click(lambda _: stop())
            keep_subshell_route(self.button.comm)
        else:
            self.button.disabled = True
            words = "use the interrupt button (■ in the toolbar)"
        super().__init__([self.button, ipywidgets.HTML(words)])

    def close(self) -> None:
        """Take it away: a click that comes late meets nothing."""
        for widget in self.children:
            widget.close()
        super().close()


def clicks_arrive() -> bool:
    """Tell whether a click is handled while a cell runs: with subshells (ipykernel 7.1), which VS Code does not use."""
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_supports_kernel_subshells", False)) and "VSCODE_PID" not in os.environ


def keep_subshell_route(comm: Any) -> None:
    """Have messages handled where the page sends them: ipykernel 7.4 hands them to the shell that last sent one, the busy one."""
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, default: default  # noqa: SLF001  # there is no public way
