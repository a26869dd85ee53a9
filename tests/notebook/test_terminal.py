"""Where nobody draws widgets: IPython in a terminal, and a notebook that a command executes."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "dumb"}


class Terminal:
    """IPython on a pseudo-terminal of 100 columns."""

    def __init__(self, folder):
        import fcntl
        import pty
        import struct
        import termios

        self.screen, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        command = [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--no-confirm-exit"]
        self.process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env=ENVIRONMENT | {"IPYTHONDIR": str(folder)},
        )
        os.close(inner)

    def read_until(self, pattern, seconds=30):
        """Return what is written until a pattern comes."""
        end, text = time.monotonic() + seconds, ""
        while not re.search(pattern, text):
            assert time.monotonic() < end, repr(text)
            if select.select([self.screen], [], [], 0.1)[0]:
                text += os.read(self.screen, 65536).decode(errors="replace")
        return text

    def type(self, text):
        os.write(self.screen, text.encode())


@pytest.fixture
def terminal(tmp_path):
    pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.screen)


def test_ipython_in_a_terminal(terminal, chat):
    """A bar while the model loads and the prompt is read, then nothing but the text; an interrupt leaves the session."""
    terminal.read_until(r"In \[1\]: ")
    terminal.type("%load_ext airllm_nb\n")
    terminal.read_until(r"In \[2\]: ")
    terminal.type(f"%airllm load {chat} --device cpu --dtype float32\n")
    shown = terminal.read_until(r"In \[3\]: ")
    assert f"{chat.name} · 4 layers, all resident · cpu · float32 · 626 kB\r\n" in shown
    assert "<airllm_nb" not in shown  # a widget's repr
    terminal.type("%%airllm --max-new-tokens 3000\nHello\n\n\n")
    shown = terminal.read_until(r"(\.\.\.: )+(?s:.){400}")
    terminal.process.send_signal(signal.SIGINT)  # as Ctrl+C does
    shown += terminal.read_until(r"In \[4\]: ")
    assert re.search(r"\r[^\r\n]* \|[^|\r\n]{30}\|", shown), "no bar"
    assert "stopped after" in shown
    assert "Traceback" not in shown
    terminal.type("%airllm status\n")
    assert re.search(r"layers +all 4 layers stay", terminal.read_until(r"In \[5\]: "))
    terminal.type("exit\n")
    assert terminal.process.wait(30) == 0


def test_jupyter_execute(tmp_path, chat):
    """Silent, and nothing is left behind."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    cells = (
        "%load_ext airllm_nb",
        f"%airllm load {chat} --device cpu --dtype float32 --memory 500kB",
        "%%airllm --max-new-tokens 40 -o answer\nHello",
        "assert len(answer.token_ids) == 40",
    )
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": kernel}, cells=[nbformat.v4.new_code_cell(cell) for cell in cells]
    )
    path, temporary = tmp_path / "work" / "run.ipynb", tmp_path / "temporary"
    path.parent.mkdir()
    temporary.mkdir()
    nbformat.write(notebook, path)
    before = path.read_bytes()
    run = subprocess.run(
        [sys.executable, "-m", "jupyter", "execute", path.name], env=ENVIRONMENT | {"TMPDIR": str(temporary)}, cwd=path.parent,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not run.stdout
    assert "airllm" not in run.stderr.replace(str(path), "")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
    assert [file.name for file in temporary.iterdir() if not file.name.startswith("torchinductor_")] == []  # PyTorch's own
