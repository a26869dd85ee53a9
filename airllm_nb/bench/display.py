"""Row g: what the display costs, in a real kernel whose messages somebody receives."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airllm_nb import LayeredModel
from airllm_nb.bench.machine import BenchError
from airllm_nb.bench.timing import generate

if TYPE_CHECKING:
    from airllm_nb.events import Event
    from airllm_nb.notebook.progress import Progress

Seconds = dict[str, list[float]]


def display(**options: Any) -> Seconds:
    """Start a kernel, and have `in_kernel` run as a cell in it."""
    try:
        import ipykernel  # noqa: F401  # the kernel needs it
        from jupyter_client.manager import KernelManager
    except ImportError as error:
        raise BenchError(f"{error.name} is not installed.", 'Install it with `pip install "airllm_nb[lab]"`.') from error
    manager = KernelManager(kernel_name="python3")
    # It finds what this process finds, wherever that comes from.
    manager.start_kernel(env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    client = manager.blocking_client()
    client.start_channels()
    printed: list[str] = []

    def receive(message: Any) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    try:
        client.wait_for_ready(timeout=60)
        cell = f"from airllm_nb.bench.display import in_kernel\nin_kernel(**{options!r})"
        reply = client.execute_interactive(cell, allow_stdin=False, output_hook=receive)["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    if reply["status"] != "ok":
        raise BenchError(f"The kernel failed: {reply['ename']}: {reply['evalue']}", "The other rows do not need this one.")
    found: Seconds = json.loads("".join(printed).splitlines()[-1])
    return found


def in_kernel(folder: str, dtype: str, tokens: int, rounds: int) -> None:
    """Generate in turn without a listener and with the widget that ``%%airllm`` shows; print what each round took.

    Seconds of the run, of them those in the listener, and the processor's for passing on what it sent: by the other threads of
    this kernel, and by the process that started it and receives.
    """
    from airllm_nb.notebook.progress import Progress
    from airllm_nb.notebook.renderers import WidgetRenderer
    from airllm_nb.notebook.run_state import RunState
    from airllm_nb.notebook.verdict import memory_left

    found: Seconds = {f"{what} {way}": [] for way in ("off", "on") for what in ("run", "listener", "passing on")}
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory="1000TB") as model:
        for number in range(rounds + 1):
            for way in ("off", "on") if number % 2 else ("on", "off"):
                state = RunState(model.name, model.layers, tokens + 1, memory_left(model))
                listener = _Timed(Progress(state, WidgetRenderer())) if way == "on" else None
                model.progress = listener
                before, began = _passing_on(), time.perf_counter()
                generate(model, tokens)
                found[f"run {way}"].append(time.perf_counter() - began)
                found[f"passing on {way}"].append(_passing_on() - before)
                found[f"listener {way}"].append(listener.seconds if listener else 0.0)
                model.progress = None
                if listener is not None:
                    listener.progress.finish("done")
    print("\n" + json.dumps({what: seconds[1:] for what, seconds in found.items()}))  # the first round warms up


class _Timed:
    """A listener, and the seconds that it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds = 0.0

    def __call__(self, event: Event) -> None:
        began = time.perf_counter()
        self.progress(event)
        self.seconds += time.perf_counter() - began


def _passing_on() -> float:
    """Return the processor's seconds of the threads that take messages to whom they are for, in the kernel and its parent."""
    mine = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    threads = [task for task in Path("/proc/self/task").iterdir() if int(task.name) in mine or _name(task).startswith("ZMQ")]
    return sum(map(_seconds, [*threads, *Path(f"/proc/{os.getppid()}/task").iterdir()]))


def _name(task: Path) -> str:
    return (task / "comm").read_text(encoding="utf-8")


def _seconds(task: Path) -> float:
    return int((task / "schedstat").read_text(encoding="utf-8").split()[0]) / 1e9
