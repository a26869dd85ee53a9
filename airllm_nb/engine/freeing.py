"""Lets go of a model's weights and threads: when it is closed, when it was forgotten, when Python exits."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from airllm_nb.engine.experts import ExpertStore
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.stream import WeightStream
from airllm_nb.engine.weights import WeightGroup


def free(
    model: weakref.ref[Any],
    process: int,
    streams: list[WeightStream | ExpertStore],
    groups: Sequence[WeightGroup],
    reader: Reader,
) -> None:
    """Let go of the weights, when the model is closed or forgotten, or Python exits. Must not keep the model: it never would be.

    A model that still lives is closed, here and now. One that does not was forgotten, and the garbage collector may run on any
    thread: on one that holds a lock of what is to be closed, or that this would wait for. Then a thread of its own waits.
    """
    reader.stopped = True
    if os.getpid() == process and model() is not None:
        _close(streams, groups, reader)
        return
    for group in groups:  # at once: what is loaded next needs the memory
        group.detach()
    if os.getpid() == process:  # in a forked one there is no thread to stop, and a lock that it held stays locked
        with contextlib.suppress(RuntimeError):  # Python exits, and starts no more threads
            threading.Thread(target=_close, args=(streams, groups, reader), name="airllm_nb-release", daemon=True).start()


def _close(streams: list[WeightStream | ExpertStore], groups: Sequence[WeightGroup], reader: Reader) -> None:
    for stream in streams:
        stream.close()
    for group in groups:
        group.detach()
    reader.close()
