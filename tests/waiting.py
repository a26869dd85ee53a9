"""Waiting for what another thread does."""

import time


def wait_for(condition, seconds=20):
    """Wait until a condition holds, but not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)
