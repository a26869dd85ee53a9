"""Front ends as servers on loopback: a folder to work in, settings that keep them calm, and an end."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat

TOKEN = "browser-test"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A process that answers on a port of 127.0.0.1: `url` is where. It is started when made, and there when that returns."""

    def __init__(self, folder, command, port, answers="/api", **environ):
        self.url = f"http://127.0.0.1:{port}"
        log = folder / "server.log"
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environ)
        for _ in range(240):
            if self.process.poll() is None:
                with contextlib.suppress(urllib.error.URLError, OSError):
                    urllib.request.urlopen(self.url + answers, timeout=5)
                    return
                time.sleep(0.25)
        self.stop()
        raise AssertionError(log.read_text())

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def jupyter(application, folder, theme):
    """Start ``lab`` or ``notebook`` in a folder, with a theme."""
    settings = write_settings(folder / ".settings", theme)
    port = free_port()
    command = [
        sys.executable, "-m", "jupyter", application, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    environ = {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces")}
    return Server(folder, command, port, **environ)


def voila(folder, theme):
    """Start Voila for the notebooks of a folder."""
    port = free_port()
    command = [
        sys.executable, "-m", "voila", str(folder), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1",
        f"--theme={theme.lower()}", f"--Voila.token={TOKEN}",
    ]  # fmt: skip
    return Server(folder, command, port, f"/voila/tree?token={TOKEN}")


def write_settings(folder, theme):
    """Write JupyterLab's and Notebook's settings of a user: a theme, no news, every cell in the page; returns the folder."""
    for plugin, name, content in (
        ("apputils", "themes", {"theme": f"JupyterLab {theme}"}),
        ("apputils", "notification", {"fetchNews": "false"}),
        ("notebook", "tracker", {"windowingMode": "none"}),  # keep cells in the page when they scroll out of sight
    ):
        file = folder / f"@jupyterlab/{plugin}-extension" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


def copy_notebook(path, folder, *, keep_outputs=False):
    """Put a notebook into a folder, without outputs: then a number beside a cell says that it has run here."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and not keep_outputs:
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / path.name)


def write_notebook(path, *cells):
    """Write a notebook of code cells; returns its path."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": kernel}, cells=code), path)
    return path
