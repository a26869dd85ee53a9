"""A process that works for a cell: what it prints is shown as it comes, and stopping the cell stops it."""

from __future__ import annotations

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
        If the user interrupts: then the process has ended too.
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
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise Interrupted("stopped; the rows above are measured") from None
