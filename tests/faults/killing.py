"""Work that is killed at random moments: in forks of a process that has everything imported, which takes longer than the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

FORKS = """
import gc, json, os, random, sys, time
{setup}
moments = random.Random(20)
warm()
gc.freeze()  # what the children are born with they need not look through

def forked(longest):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if longest is not None:
        time.sleep(moments.uniform(0.0, longest))
        os.kill(child, 9)
    return os.waitpid(child, 0)[1]

for line in sys.stdin:
    begin = time.perf_counter()
    status = forked(json.loads(line))
    print("\\n=", json.dumps([status, time.perf_counter() - begin]), flush=True)
"""
KILLED = 9


class Forks:
    """Forks that work.

    Parameters
    ----------
    setup : str
        Code that is run once; defines ``work()``, which may print, and ``warm()``, after which it takes no longer than it must.
    **variables
        For its environment.
    """

    def __init__(self, setup: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORKS.replace("{setup}", setup)], env=os.environ | variables,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, kill_within: float | None = None) -> tuple[int, float, list[str]]:
        """Work, and be killed after up to so many seconds; returns the status, the seconds, and the lines that were printed."""
        self._process.stdin.write(f"{json.dumps(kill_within)}\n")
        self._process.stdin.flush()
        lines = [self._process.stdout.readline()]
        while not lines[-1].startswith("= ["):
            assert lines[-1], "the process has ended"
            lines.append(self._process.stdout.readline())
        status, seconds = json.loads(lines.pop().removeprefix("="))
        return status, seconds, "".join(lines).split("\n")[:-2]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        assert self._process.wait() == 0
