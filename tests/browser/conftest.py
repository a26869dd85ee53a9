"""Real front ends on loopback, and a real Chromium that looks at them.

`lab` and `notebook7` open a notebook in JupyterLab and in Notebook 7; both give what `pages.Lab` describes: running cells,
restarting the kernel, a second notebook beside it, a narrow window, zoom. `serve` is for other front ends.
"""

import os
import shutil
from pathlib import Path

import frontends
import pages
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CALM = [  # no network of the browser's own, no sandbox (containers have none), no GPU
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update",
]  # fmt: skip
WINDOW = {"width": 1000, "height": 900}


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
def serve():
    """Return a function that takes a `frontends.Server`, and stops it at the end of the test."""
    servers = []

    def keep(server):
        servers.append(server)
        return server

    yield keep
    for server in servers:
        server.stop()


@pytest.fixture
def window(browser):
    """Return a function that opens a window: its pages share what the browser remembers, and no other window does."""
    windows = []

    def open_window():
        windows.append(browser.new_context(viewport=WINDOW))
        windows[-1].set_default_timeout(pages.BUSY)
        return windows[-1].new_page()

    yield open_window
    for context in windows:
        context.close()


def opening(application, kind, tmp_path, serve, window):
    """Return a function that opens a notebook in one of Jupyter's front ends."""

    def open_notebook(path, theme="Light", *others, keep_outputs=False):
        folder = tmp_path / f"{application}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for notebook in (path, *others):
            frontends.copy_notebook(notebook, folder, keep_outputs=keep_outputs)
        server = serve(frontends.jupyter(application, folder, theme))
        return kind(window(), server.url, path.name, f"?token={frontends.TOKEN}")

    return open_notebook


@pytest.fixture
def lab(tmp_path, serve, window):
    """Return a function that opens a notebook in JupyterLab with a theme, and gives its `Lab`.

    Notebooks after the theme lie in the folder beside it, for `Lab.beside`. With ``keep_outputs=True`` it is shown as saved.
    """
    return opening("lab", pages.Lab, tmp_path, serve, window)


@pytest.fixture
def notebook7(tmp_path, serve, window):
    """Return a function that opens a notebook in Notebook 7 with a theme, and gives its `Notebook7`; else as `lab`."""
    return opening("notebook", pages.Notebook7, tmp_path, serve, window)
