"""A real JupyterLab on loopback, and a real Chromium that looks at it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

SCREENSHOTS = Path(__file__).parent / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CALM = [  # no network of the browser's own, no sandbox (containers have none), no GPU
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update",
]  # fmt: skip
TOKEN = "browser-test"


def pytest_collection_modifyitems(items):
    """Skip with the reason, unless a browser is required: then the tests run, and fail for want of one."""
    here = str(Path(__file__).parent)
    reason = "no Chromium on this machine (Debian: apt-get install chromium)"
    if CHROMIUM is None and not os.environ.get("AIRLLM_NB_REQUIRE_BROWSER"):
        for item in items:
            if str(item.path).startswith(here):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "AIRLLM_NB_REQUIRE_BROWSER is set, and there is no Chromium on this machine"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CALM)
        yield chromium
        chromium.close()


@pytest.fixture
def lab(tmp_path, browser):
    """Return a function that opens a notebook in JupyterLab with a theme, and gives its `Lab`."""
    servers = []

    def open_notebook(path, theme="Light", keep_outputs=False):
        folder = tmp_path / f"work-{len(servers)}"
        folder.mkdir()
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if (
                cell.cell_type == "code" and not keep_outputs
            ):  # as a new notebook: then a number beside a cell says that it has run here
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / path.name)
        settings = tmp_path / f"settings-{len(servers)}"
        for plugin, name, content in (
            ("apputils", "themes", {"theme": f"JupyterLab {theme}"}),
            ("apputils", "notification", {"fetchNews": "false"}),
            ("notebook", "tracker", {"windowingMode": "none"}),  # keep cells in the page when they scroll out of sight
        ):
            file = settings / f"@jupyterlab/{plugin}-extension" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [
                sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
                f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}", f"--LabApp.user_settings_dir={settings}",
                f"--LabApp.workspaces_dir={settings}/workspaces",
            ],
            stdout=(folder / "server.log").open("w"), stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        servers.append(server)
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.25)
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(f"{url}/lab/tree/{path.name}?token={TOKEN}")
        return Lab(page)

    yield open_notebook
    for server in servers:
        server.terminate()
    for server in servers:
        server.wait(20)


class Lab:
    """One notebook in JupyterLab."""

    def __init__(self, page):
        self.page = page
        dialog = page.locator(".jp-Dialog")  # on a busy machine Lab asks for the kernel that it has not listed yet
        page.add_locator_handler(dialog, lambda: dialog.locator(".jp-mod-accept").click())
        page.wait_for_selector(".jp-CodeCell", timeout=60_000)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', state="attached", timeout=60_000)
        page.keyboard.press("Control+b")  # hide the side bar
        self.cells = page.locator(".jp-CodeCell")

    def index(self, source):
        """Return the number of the first code cell whose source contains a text; Lab draws cells one after another."""
        for _ in range(120):
            for index in range(self.cells.count()):
                if source in self.cells.nth(index).locator(".jp-InputArea-editor").inner_text():
                    return index
            self.page.wait_for_timeout(250)
        raise AssertionError(f"no cell with {source!r}")

    def start(self, index):
        """Run a cell and return while it runs (or when it has run). The first keys can be lost while Lab still starts."""
        prompt = self.cells.nth(index).locator(".jp-InputPrompt")
        for _ in range(60):
            prompt.click()
            self.page.keyboard.press("Shift+Enter")
            for _ in range(20):
                if "[ ]" not in prompt.inner_text():
                    return
                self.page.wait_for_timeout(50)
        raise AssertionError("the cell does not start")

    def running(self, index):
        return "*" in self.cells.nth(index).locator(".jp-InputPrompt").inner_text()

    def wait(self, index, seconds=120):
        end = time.monotonic() + seconds
        while self.running(index):
            assert time.monotonic() < end, "the cell runs too long"
            self.page.wait_for_timeout(50)

    def output(self, index):
        return self.cells.nth(index).locator(".jp-OutputArea").inner_text()

    def screenshot(self, name, index):
        SCREENSHOTS.mkdir(exist_ok=True)
        self.cells.nth(index).scroll_into_view_if_needed()
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")
