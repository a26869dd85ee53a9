"""A process that works for a cell: what it prints is shown as it comes, and stopping the cell stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from airllm_nb.notebook.summary import Interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence

GRACE = 10.0
"""Seconds that it has to end when it is stopped."""


def run_printing(command: Sequence[str]) -> None:
    """Run a command that can import what this process can, and print its lines.

    Raises
    ------
    Interrupted
        If the user interrupts: then the process has ended too. A second interrupt does not wait for it.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(  # noqa: S603  # our own command, without a shell
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the kernel interrupts its whole group, and it would be interrupted twice
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
            process.wait()
        except KeyboardInterrupt:
            # Windows has no such signal for a process: there it is killed at once.
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt, ValueError):
                process.send_signal(signal.SIGINT)
                process.wait(GRACE)
            raise Interrupted("stopped; the rows above are measured") from None
        finally:
            if process.poll() is None:
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads a session, and those that it has started in it: nobody else would end them."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended; macOS then refuses
        os.killpg(process.pid, signal.SIGKILL)
