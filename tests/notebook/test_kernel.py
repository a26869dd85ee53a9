"""The magics in a real kernel: what a notebook receives, the interrupt button, and nbval."""

import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


class Kernel:
    """A kernel, and what its cells show."""

    def __init__(self):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=ENVIRONMENT)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, cell, on_message=lambda _: None, timeout=60):
        """Run a cell; returns its reply and the messages that it published."""
        request = self.client.execute(cell)
        messages = []
        while True:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
            messages.append(message)
            on_message(message)
        reply = self.reply_to(request, timeout)
        if reply["status"] == "aborted":  # right after a failed cell, a kernel turns down what has arrived
            return self.run(cell, on_message, timeout)
        return reply, messages

    def reply_to(self, request, timeout=60):
        while True:
            reply = self.client.get_shell_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == request:
                return reply["content"]

    def shown(self, cell):
        """Run a cell that must succeed; returns what it wrote to stdout."""
        reply, messages = self.run(cell)
        assert reply["status"] == "ok", reply
        streams = of_type(messages, "stream")
        assert {stream["name"] for stream in streams} <= {"stdout"}
        return "".join(stream["text"] for stream in streams)

    def interrupt_after(self, cell, seconds):
        """Press stop that long after a cell began."""
        request = self.client.execute(cell)
        time.sleep(seconds)
        self.manager.interrupt_kernel()
        reply = self.reply_to(request)
        self.drain()
        return reply

    def drain(self):
        try:
            while True:
                self.client.get_iopub_msg(timeout=0.5)
        except queue.Empty:
            pass


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    kernel.shown("%load_ext airllm_nb")
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def of_type(messages, kind):
    return [message["content"] for message in messages if message["msg_type"] == kind]


def test_in_a_kernel(kernel, chat):
    """In this order: a stop while torch is imported, a load, a run with its display, a stop while text is written."""
    load = f"%airllm load {chat} --device cpu --dtype float32"
    reply = kernel.interrupt_after(load, 0.4)
    assert (reply["status"], reply["ename"]) == ("error", "Interrupted")
    assert len(reply["traceback"]) == 1
    assert kernel.shown("%airllm status").startswith("No model is loaded.")
    assert kernel.shown(load) == f"{chat.name} · 4 layers, all resident · cpu · float32 · 626 kB\n"

    reply, messages = kernel.run("%%airllm --max-new-tokens 120 -o answer\nHello")
    assert reply["status"] == "ok"
    display, result = of_type(messages, "display_data")
    assert display["data"]["text/plain"] == ""
    assert "application/vnd.jupyter.widget-view+json" in display["data"]
    assert set(result["data"]) == {"text/plain", "text/html"}
    assert result["data"]["text/plain"] == "<airllm_nb: 120 tokens, ended by max-new-tokens>"
    assert not of_type(messages, "update_display_data")
    assert not of_type(messages, "clear_output")
    states = [content["data"].get("state", {}) for content in of_type(messages, "comm_msg")]
    pictures = [state["value"] for state in states if "value" in state]
    assert len(pictures) >= 3
    assert any("prompt of" in picture for picture in pictures)
    assert any("token " in picture and "prompt of" not in picture for picture in pictures[:-1])  # there may be few
    assert "120 tokens · " in pictures[-1]
    streams = of_type(messages, "stream")
    assert {stream["name"] for stream in streams} == {"stdout"}
    assert len(streams) >= 3  # it came in pieces
    text = "".join(stream["text"] for stream in streams)
    assert kernel.shown("print(answer)") == text

    pressed = []

    def press_stop(message):
        if message["msg_type"] == "stream" and not pressed:
            pressed.append(time.perf_counter())
            kernel.manager.interrupt_kernel()

    reply, messages = kernel.run("%%airllm --max-new-tokens 3000 -o long\nHello", press_stop)
    assert time.perf_counter() - pressed[0] < 5
    assert (reply["status"], reply["ename"]) == ("error", "Interrupted")
    [error] = of_type(messages, "error")
    assert len(error["traceback"]) == 1
    assert "stopped after" in error["traceback"][0]
    assert "long holds the text so far" in error["traceback"][0]
    assert "stopped by the user" in of_type(messages, "display_data")[-1]["data"]["text/html"]
    assert kernel.shown("print(long.stopped, len(long.token_ids) > 0, _airllm is long)") == "interrupted True True\n"
    assert kernel.shown("%%airllm --max-new-tokens 120\nHello") == text


def test_completion_in_a_kernel(kernel):
    reply = kernel.reply_to(kernel.client.complete("%airllm load --dev", 18))
    assert reply["matches"] == ["--device"]


def test_nbval_strict(tmp_path, chat):
    """A notebook with these cells gives the same output every time."""
    pytest.importorskip("nbval")
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells = [
        nbformat.v4.new_code_cell(source)
        for source in (
            "%load_ext airllm_nb",
            f"%airllm load {chat} --device cpu --dtype float32 --memory 500kB",
            "%%airllm --max-new-tokens 60 -o answer\nHello",
            "answer",
            "%%airllm --max-new-tokens 20 --temperature 1 --seed 2\nHello",
            f"%airllm plan {chat} --device cpu --dtype float32 --memory 500kB",
            "%airllm",
            "%airllm unload",
            "%unload_ext airllm_nb",
        )
    ]
    notebook.cells[5].metadata["tags"] = ["nbval-ignore-output"]  # seconds per token are measured
    client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=ENVIRONMENT)
    notebook.metadata.pop("widgets", None)
    path = tmp_path / "strict.ipynb"
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider", str(path)]
    command.append(f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval.cfg'}")
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=120, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
