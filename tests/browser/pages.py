"""A notebook in a browser, and what a person does with it."""

import os
import re
import time
from pathlib import Path

SCREENSHOTS = Path(__file__).parent / "screenshots"
THEMES = ["Light", "Dark"] if os.environ.get("AIRLLM_NB_BOTH_THEMES") else ["Dark"]
"""Of pictures that a person looks at. What a theme changes, `test_strip` measures in both."""
BUSY = 60_000  # milliseconds that a page may take to come, on a machine with other things to do

STATES = "place => Array.from(place?.querySelectorAll('.airllm-strip i') ?? [], cell => cell.classList[0])"
# Notes each picture that a strip shows, and the line above it, in a cell only while it runs: who looks now and then misses most.
RECORD = f"""(cell, running) => {{
    const states = {STATES}, seen = cell.seen = {{pictures: new Set(), lines: new Set()}};
    new MutationObserver(() => {{
        if (!running || cell.querySelector('.jp-InputPrompt').textContent.includes('*')) {{
            const run = Array.from(cell.querySelectorAll('.airllm')).at(-1);
            const line = run?.querySelector('.airllm-top b')?.textContent;
            seen.pictures.add(states(run).join(' '));
            if (line) seen.lines.add(line);
        }}
    }}).observe(cell, {{subtree: true, childList: true, characterData: true, attributes: true}});
}}"""
RECORDED = "cell => ({pictures: Array.from(cell.seen.pictures), lines: Array.from(cell.seen.lines)})"
# What is seen, reaches out of the output of a cell, and does not lie in something that scrolls.
CUT_OFF = """output => {
    const right = output.getBoundingClientRect().right + 1;
    const scrolls = element => element && element !== output
        && (/auto|scroll/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
    return Array.from(output.querySelectorAll('*'))
        .filter(element => element.checkVisibility() && element.getBoundingClientRect().right > right && !scrolls(element))
        .map(element => `${element.tagName} ${element.className}: ${element.textContent.slice(0, 60)}`);
}"""


class Page:
    """A page of a front end, by its path on the server.

    `strangers` are the addresses off this machine that it asked for: there should be none.
    """

    def __init__(self, page, address):
        self.page = page
        self.strangers = []
        page.on("request", lambda request: self._note(request.url))
        page.goto(address, timeout=BUSY)

    def _note(self, url):
        if not re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:", url):
            self.strangers.append(url)

    def resize(self, width, height=900):
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.wait_for_timeout(500)  # until it has been laid out

    def zoom(self, factor):
        """Zoom as the browser's menu does in a window of this size: fewer CSS pixels, of which the screenshot has one each."""
        size = self.page.viewport_size
        self.resize(*(round(size[name] / factor) for name in ("width", "height")))

    def screenshot(self, name):
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


class Lab(Page):
    """One notebook in JupyterLab.

    `cells` are its code cells, as a locator; all methods take the number of one, which `index` finds by what it says.

    - Running: `start` returns at once, `wait` waits for the end, `run` does both; `running`, `output`.
    - The kernel: `restart` presses 0 0 and accepts, and returns when the new kernel is there.
    - Another one beside it: ``other = lab.beside(path)`` opens a notebook of the same server in another tab, with a kernel of
      its own: two strips, or two panels, at once.
    - The window: ``resize(800)``, ``zoom(2)`` for 200% (``zoom(1 / 2)`` goes back), then `cut_off` lists what does not fit.
    - Afterwards: ``save()`` and ``reopen()`` show the notebook as somebody sees it who opens it tomorrow.
    """

    READY = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
    PATH = "lab/tree"

    def __init__(self, page, server, path, opened_with=""):
        """Open a notebook, by its path on the server."""
        self.server = server
        dialog = page.locator(".jp-Dialog")  # on a busy machine Lab asks for the kernel that it has not listed yet
        # Another one may follow at once, for which the handler is called again.
        page.add_locator_handler(dialog.first, lambda: dialog.first.locator(".jp-mod-accept").click(), no_wait_after=True)
        super().__init__(page, f"{server}/{self.PATH}/{path}{opened_with}")
        self.cells = page.locator(".jp-CodeCell")
        self._settle()

    def _settle(self):
        self.page.wait_for_selector(".jp-CodeCell", timeout=BUSY)
        self.page.wait_for_selector(self.READY, state="attached", timeout=BUSY)
        if self.page.locator(".jp-SideBar").count() and self.page.locator("#jp-left-stack").is_visible():
            self.page.keyboard.press("Control+b")  # hide the side bar

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
        before = prompt.inner_text()
        for _ in range(60):
            prompt.click()
            self.page.keyboard.press("Shift+Enter")
            for _ in range(20):
                if prompt.inner_text() != before:
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

    def run(self, index, seconds=120):
        """Run a cell to its end; returns what it shows."""
        self.start(index)
        self.wait(index, seconds)
        return self.output(index)

    def output(self, index):
        return self.cells.nth(index).locator(".jp-OutputArea").inner_text()

    def states(self, index):
        """Return the state of each layer in a cell's strip, now."""
        return tuple(self.cells.nth(index).locator(".jp-OutputArea").first.evaluate(STATES))

    def record(self, index):
        """Note from now on what a cell shows while it runs."""
        self.cells.nth(index).evaluate(RECORD, True)

    def pictures(self, index):
        """Return the different pictures that a recorded cell's strip has shown, each as its layers' states."""
        return [tuple(picture.split()) for picture in self.cells.nth(index).evaluate(RECORDED)["pictures"] if picture]

    def lines(self, index):
        """Return the different lines that stood above a recorded cell's strip."""
        return self.cells.nth(index).evaluate(RECORDED)["lines"]

    def watch(self, index):
        """Run a cell to its end; returns the pictures that its strip showed meanwhile."""
        self.record(index)
        self.run(index)
        return self.pictures(index)

    def restart(self):
        """Restart the kernel as a person does; returns when the new one is there."""
        self.cells.first.locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Escape")
        with self.page.expect_response(lambda response: response.url.partition("?")[0].endswith("/restart"), timeout=BUSY):
            self.page.keyboard.press("0")
            self.page.keyboard.press("0")
            self.page.wait_for_function("document.querySelector('.jp-Dialog .jp-mod-accept')")
            self.page.keyboard.press("Enter")
        self.page.wait_for_selector(self.READY, state="attached", timeout=BUSY)

    def beside(self, path):
        """Open a notebook that lies in the folder of this one in another tab, with a kernel of its own."""
        return type(self)(self.page.context.new_page(), self.server, path)

    def save(self):
        self.cells.first.locator(".jp-InputPrompt").click()
        with self.page.expect_request(lambda request: "/api/contents/" in request.url and request.method == "PUT"):
            self.page.keyboard.press("Control+s")

    def reopen(self):
        """Load the page again: outputs come from the file. The kernel still runs, but no widget knows it."""
        self.page.reload()
        self._settle()

    def cut_off(self, index):
        """Return what of a cell's output does not fit into the window: it should be nothing, or something that scrolls."""
        return self.cells.nth(index).locator(".jp-OutputArea").first.evaluate(CUT_OFF)

    def screenshot(self, name, index):
        self.cells.nth(index).scroll_into_view_if_needed()
        super().screenshot(name)


class Notebook7(Lab):
    """One notebook in Notebook 7, which has the same cells and keys as JupyterLab."""

    PATH = "notebooks"


class App(Page):
    """A notebook that Voila shows as an app."""

    def __init__(self, page, server, path, opened_with=""):
        super().__init__(page, f"{server}/voila/render/{path}{opened_with}")

    def watch(self, text, seconds=120):
        """Wait until a text is there; returns the different pictures that the last strip showed meanwhile."""
        body = self.page.locator("body")
        body.evaluate(RECORD, False)
        self.page.get_by_text(text).first.wait_for(state="attached", timeout=seconds * 1000)
        return [tuple(picture.split()) for picture in body.evaluate(RECORDED)["pictures"] if picture]
