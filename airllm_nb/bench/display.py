"""Row g: what the display costs, in a real kernel whose messages somebody receives."""

from __future__ import annotations

import json
import os
import sys
from statistics import mean
from typing import Any

from airllm_nb import LayeredModel
from airllm_nb.bench.machine import BenchError
from airllm_nb.bench.timing import generate

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
    """Generate in turn without a listener and with the widget that ``%%airllm`` shows; print each round's seconds per token."""
    from airllm_nb.notebook.progress import Progress
    from airllm_nb.notebook.renderers import WidgetRenderer
    from airllm_nb.notebook.run_state import RunState
    from airllm_nb.notebook.verdict import memory_left

    found: Seconds = {"off": [], "on": []}
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory="1000TB") as model:
        for number in range(rounds + 1):
            for way in ("off", "on") if number % 2 else ("on", "off"):
                state = RunState(model.name, model.layers, tokens + 1, memory_left(model))
                progress = Progress(state, WidgetRenderer()) if way == "on" else None
                model.progress = progress
                found[way].append(mean(generate(model, tokens)))
                model.progress = None
                if progress is not None:
                    progress.finish("done")
    print("\n" + json.dumps({way: seconds[1:] for way, seconds in found.items()}))  # the first round warms up
