"""A model whose name, text and errors are HTML: whatever a kernel sends to be shown as HTML shows it as text."""

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

NAME = "<img src=x onerror=alert(1)>&'`"
PROMPT = "<script>alert('prompt')</script>"
ALLOWED = {
    "a",
    "b",
    "br",
    "button",
    "code",
    "details",
    "div",
    "em",
    "i",
    "label",
    "li",
    "p",
    "pre",
    "progress",
    "small",
    "span",
    "strong",
    "style",
}
ALLOWED |= {"summary", "table", "tbody", "td", "th", "thead", "tr", "ul"}
ALLOWED |= {"svg", "g", "rect", "line", "path", "text", "title", "tspan", "polyline", "polygon", "circle", "defs", "desc"}


class Elements(HTMLParser):
    """The elements of a page that could do something: of a kind that is not ours, with a handler, or with a script as address."""

    def __init__(self):
        super().__init__()
        self.bad = []

    def handle_starttag(self, tag, attributes):
        acting = [name for name, value in attributes if name.startswith("on") or "script:" in (value or "").lower()]
        if (tag not in ALLOWED and not (tag == "img" and dict(attributes)["src"].startswith("data:image/svg+xml"))) or acting:
            self.bad.append((tag, attributes))

    handle_startendtag = handle_starttag


@pytest.fixture
def hostile(checkpoint, tmp_path):
    """A folder with a name, tokens and a template that are HTML."""
    folder = Path(shutil.copytree(checkpoint("llama", tokenizer=True), tmp_path / NAME))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {
        word if number < 128 or number > 255 else f"<script>alert({number})</script>": number for word, number in words.items()
    }
    path.write_text(json.dumps(content))
    return folder


def pages_of(client, cell):
    """Run a cell in a kernel; return all HTML that it shows: as output, as a widget's value, and what it prints."""
    request = client.execute(cell)
    pages, printed, widgets = [], [], set()
    while True:
        message = client.get_iopub_msg(timeout=60)
        content, kind = message["content"], message["msg_type"]
        if kind in ("display_data", "execute_result", "update_display_data"):
            pages.append(content["data"].get("text/html", ""))
        elif kind == "stream":
            printed.append(content["text"])
        elif kind == "error":
            printed += content["traceback"]
        elif kind in ("comm_open", "comm_msg"):
            state = content["data"].get("state", {})
            if "HTML" in state.get("_model_name", ""):
                widgets.add(content["comm_id"])
            if content["comm_id"] in widgets:
                pages.append(state.get("value", ""))
        elif kind == "status" and content["execution_state"] == "idle" and message["parent_header"].get("msg_id") == request:
            return pages, "".join(printed)


def test_hostile_strings_are_shown_as_text(hostile):
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    client = manager.blocking_client()
    client.start_channels()
    pages, printed = [], []
    try:
        client.wait_for_ready(timeout=60)
        for cell in (
            "%load_ext airllm_nb", f'%airllm plan "{hostile}"', f'%airllm load "{hostile}" --device cpu --dtype float32',
            "%airllm status", f"%%airllm --max-new-tokens 6 -o answer\n{PROMPT}", "answer", "print(answer.text)", "%airllm",
            f'%airllm load "{hostile}-{NAME}"', f'%airllm load "{hostile}" --memory "{NAME}"',
        ):  # fmt: skip
            shown, text = pages_of(client, cell)
            pages += shown
            printed.append(text)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "<script>alert(" in printed[6], printed
    # The text itself is plain output; the panel and the HTML that it is part of are in test_panel and test_result.
    assert "&lt;img" in "".join(pages)
    for page in pages:
        parser = Elements()
        parser.feed(page)
        assert not parser.bad, page
