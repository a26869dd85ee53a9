"""The panel as a person uses it: a real JupyterLab, a real browser, the demo model, and no code but %airllm."""

import nbformat
import pages
import pytest

from airllm_nb.demo import demo_path

PROMPT = "textarea[placeholder='Ask something']"
STATES = "Array.from(document.querySelectorAll('.airllm-strip i'), cell => cell.classList[0])"


class Panel:
    """One panel in a page."""

    def __init__(self, lab, root):
        self.lab, self.page, self.root = lab, lab.page, root

    def button(self, text):
        return self.root.locator(f"button.jupyter-button:has-text('{text}'):visible").first

    def wait_for_text(self, text, seconds=60):
        self.root.get_by_text(text).first.wait_for(timeout=1000 * seconds)

    def load(self, memory=None):
        if memory:
            field = self.root.locator("input[placeholder='auto, or 4GB']")
            field.fill(memory)
            field.press("Enter")
            self.wait_for_text("streamed")
        self.button("Load").click()
        self.root.locator(f"{PROMPT}:visible").wait_for(timeout=60_000)
        self.root.locator("button:has-text('Ask'):not([disabled])").wait_for(timeout=60_000)

    def ask(self, text):
        self.root.locator(PROMPT).fill(text)
        self.button("Ask").click()

    def idle(self, seconds=90):
        """Wait until Stop can no longer be pressed."""
        self.root.locator("button:has-text('Stop')[disabled]:visible").first.wait_for(timeout=1000 * seconds)


@pytest.fixture
def open_panels(lab, tmp_path):
    """Return a function that opens a notebook with panels in a theme; gives the lab and its panels."""
    demo_path()  # the download is not what is tested here

    def open_them(theme="Light", cells=("%load_ext airllm_nb\n%airllm",)):
        path = tmp_path / "panel.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
        notebook = lab(path, theme)
        for index in range(len(cells)):
            notebook.start(index)
            notebook.wait(index)
        roots = notebook.page.locator(".airllm-panel")
        try:
            roots.first.locator(".airllm-plan").wait_for(timeout=60_000)
        except Exception:
            notebook.screenshot("panel-failed", 0)
            raise
        return notebook, [Panel(notebook, roots.nth(index)) for index in range(roots.count())]

    return open_them


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_load_ask_stop_and_go_on(open_panels, theme):
    notebook, (panel,) = open_panels(theme)
    page = notebook.page
    cuda = panel.root.locator("button.jupyter-button:has-text('CUDA')")
    assert cuda.is_disabled()
    panel.wait_for_text("CUDA: this PyTorch is built without CUDA")
    panel.wait_for_text("s per token")
    notebook.screenshot(f"panel-choose-{theme.lower()}", 0)

    panel.load(memory="180MB")
    panel.ask("Tell me a long story about a lighthouse.")
    seen = set()
    for _ in range(200):
        seen |= set(page.evaluate(STATES))
        if {"computing", "reading"} <= seen or {"computing", "waiting"} <= seen:
            break
        page.wait_for_timeout(20)
    assert "computing" in seen, seen
    panel.root.locator(".airllm-assistant").last.wait_for()
    page.wait_for_timeout(1500)
    notebook.screenshot(f"panel-working-{theme.lower()}", 0)
    panel.button("Stop").click()
    panel.idle(2)  # takes effect within two seconds
    panel.wait_for_text("stopped; Continue goes on")
    text = panel.root.locator(".airllm-assistant > div").first.inner_text()
    notebook.screenshot(f"panel-stopped-{theme.lower()}", 0)

    panel.button("Continue").click()
    panel.root.locator("button:has-text('Stop'):not([disabled]):visible").wait_for()
    page.wait_for_function(
        "length => document.querySelector('.airllm-assistant > div')?.innerText.length > length", arg=len(text) + 10
    )
    panel.button("Stop").click()
    panel.idle(2)
    longer = panel.root.locator(".airllm-assistant > div").first.inner_text()
    assert longer.startswith(text)
    assert len(longer) > len(text)

    panel.button("New conversation").click()
    panel.ask("What is the capital of France?")
    panel.wait_for_text("The capital of France is Paris.")
    panel.idle()
    panel.ask("And what is the capital of Italy?")
    panel.wait_for_text("And what is the capital of Italy?")
    panel.idle()
    panel.wait_for_text("were in the KV cache")
    left = page.locator(".jp-OutputArea pre:has-text('The capital of France is Paris.')")
    left.first.wait_for(state="attached")  # for the time when the widgets are gone; until then it would be there twice
    assert not left.first.is_visible()
    notebook.screenshot(f"panel-answered-{theme.lower()}", 0)
    panel.root.screenshot(path=pages.SCREENSHOTS / f"panel-alone-{theme.lower()}.png")  # these two are in the README


def test_two_panels_and_bad_input(open_panels):
    notebook, (first, second) = open_panels(cells=("%load_ext airllm_nb\n%airllm", "%airllm"))
    field = second.root.locator("input[placeholder='auto, or 4GB']")
    field.fill("lots")
    field.press("Enter")
    second.wait_for_text("'lots' is not a size.")
    model = second.root.locator("input[placeholder^='org/name']")
    model.fill("/no/such/folder")
    model.press("Enter")
    second.wait_for_text('There is no folder "/no/such/folder".')
    notebook.screenshot("panel-bad-input", 1)
    first.load()
    first.ask("What is the capital of France?")
    first.wait_for_text("The capital of France is Paris.")
    first.idle()
    second.wait_for_text("The capital of France is Paris.")  # one session: both show the same conversation
    second.wait_for_text("SmolLM2-135M-Instruct · 30 layers, all resident")
    second.button("Another model").click()
    assert model.input_value() == "/no/such/folder"  # what was typed is still there
    second.ask("And of Italy?")
    second.idle()
    first.wait_for_text("And of Italy?")


def test_by_keyboard_alone(open_panels):
    notebook, (panel,) = open_panels()
    page = notebook.page
    panel.root.locator("input[placeholder^='org/name']").focus()
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText || document.activeElement.tagName"))
        if reached[-1].strip().endswith("Load"):
            break
    assert any("CPU" in text for text in reached), reached
    assert any("float32" in text for text in reached), reached
    assert not any("CUDA" in text for text in reached), reached
    assert reached[-1].strip().endswith("Load"), reached
    page.keyboard.press("Enter")
    panel.root.locator(f"{PROMPT}:visible").wait_for(timeout=60_000)
    panel.root.locator("button:has-text('Ask'):not([disabled])").wait_for()
    panel.root.locator(PROMPT).focus()
    page.keyboard.type("What is the capital of France?")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    panel.wait_for_text("The capital of France is Paris.")


def test_small_windows_and_large_letters(open_panels):
    notebook, (panel,) = open_panels()
    page = notebook.page
    page.set_viewport_size({"width": 800, "height": 900})
    notebook.screenshot("panel-800", 0)
    page.set_viewport_size({"width": 500, "height": 900})  # what a window of 1000 pixels shows at 200%
    page.wait_for_timeout(500)
    notebook.screenshot("panel-200-percent", 0)
    for name in ("Load", "CPU", "float32"):
        box = panel.button(name).bounding_box()
        assert box["x"] + box["width"] <= 500, name
