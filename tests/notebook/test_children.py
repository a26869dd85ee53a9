"""A process that works for a cell ends when the cell is stopped."""

import os
import sys
import time

import psutil
import pytest

from airllm_nb.notebook.children import GRACE, run_printing
from airllm_nb.notebook.summary import Interrupted


def test_stopping_a_process_that_works_for_a_cell(capsys):
    """The interrupt comes while its output is awaited; afterwards it is gone."""
    code = """
import os, signal, time
print(os.getpid(), flush=True)
time.sleep(0.5)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    with pytest.raises(Interrupted, match="the rows above"):
        run_printing([sys.executable, "-c", code])
    with pytest.raises(ProcessLookupError):
        os.kill(int(capsys.readouterr().out), 0)


def test_stopping_twice_does_not_wait(capsys):
    """A process that does not listen is killed, and what it has started too."""
    code = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), own.pid, flush=True)
for _ in range(2):
    time.sleep(1)
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="the rows above"):
        run_printing([sys.executable, "-c", code])
    assert time.monotonic() - begin < GRACE
    running = [psutil.Process(pid) for pid in map(int, capsys.readouterr().out.split()) if psutil.pid_exists(pid)]
    ended = [process for process in running if _ended(process)]
    assert ended == running


def _ended(process):
    """Wait until a process has ended; whoever inherits one that was killed may leave it a zombie."""
    for _ in range(100):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False
