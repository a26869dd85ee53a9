"""What stays in a notebook: it is static, small, safe, and says the same wherever it is shown."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from runs import Run

from airllm_nb.notebook.magics import AirLLMMagics
from airllm_nb.notebook.result import StaticResult
from airllm_nb.notebook.summary import Answer

EVIL = '</pre><script>alert("&1")</script><img src=x onerror=alert(2)>'
VOID = {"img"}


class Page(HTMLParser):
    """Reads HTML as strictly as XML: every element is closed, in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    @property
    def pictures(self):
        begin = "data:image/svg+xml;base64,"
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(source.startswith(begin) for source in sources)
        return [base64.b64decode(source.removeprefix(begin)) for source in sources]


@pytest.fixture
def run():
    return Run(layers=4, streamed=(1, 3)).go(12, read=0.5, waited=0.25, computed=0.5)


def page(*arguments, **options):
    return Page(StaticResult(*arguments, **options)._repr_html_())


def test_what_it_says(run):
    shown = page(run.answer(temperature=0.7, top_p=0.9, seed=3, system="You are a poet."))
    for words in (
        "12 tokens · 30.0 s · 0.4 tok/s",
        "the model ended its text",
        "name · 4 layers, 2 resident, 2 streamed · cpu · float32 · 100 MB of 250 MB",
        "prompt of 5 tokens · at most 10 new · temperature 0.7, top-p 0.9, seed 3",
        "system: You are a poet.",
        "computing 24.0 s",
        "waiting for weights 6.0 s",
        "meanwhile reading 12.0 s (24.0 MB from disk)",
        "all else 0 ms",
        "prompt, token 1",
        "token 9",
    ):
        assert words in shown.text
    assert "meanwhile reading 12.0 s (12.0 MB from disk)" in page(run.answer(file_share=0.5)).text  # as the file has them
    assert "always the most likely token" in page(run.answer()).text
    assert "stopped by the user" in page(run.answer(stopped="interrupted")).text
    assert "time to launch" in page(run.answer(device="cuda:0")).text


def test_all_resident():
    shown = page(Run(layers=4).go(1, computed=0.5).answer())
    assert "1 token · 2.0 s" in shown.text
    assert "read" not in shown.text
    assert "wait" not in shown.text


def test_nothing_came(run):
    shown = page(Run(layers=4).answer(stopped="interrupted"))
    assert "0 tokens" in shown.text
    assert not shown.pictures
    old = Answer("text", (1,), 5, 1.0, "end", run.answer().layers)  # without settings and timeline
    assert "computing" in page(old).text


def test_a_run_that_went_on():
    run = Run(layers=2).go(2, computed=1.0)
    run.begin()
    run.compute(0, computed=1.0)
    run.end(completed=False)
    words = page(run.go(7, computed=1.0).answer()).text
    assert "token 22.0 sstopped1.0 stoken 32.0 s" in words
    assert "token 8" in words


def test_its_text_is_short_and_constant():
    slow, quick = (Run(layers=2).go(3, computed=seconds).answer(device=device) for seconds, device in ((9, "cpu"), (1, "cuda")))
    assert repr(StaticResult(slow)) == repr(StaticResult(quick)) == "<airllm_nb: 3 tokens, the model ended its text>"
    assert repr(slow) == repr(quick)
    bundle = StaticResult(slow)._repr_mimebundle_()
    assert bundle == {"text/plain": repr(StaticResult(slow)), "text/html": StaticResult(slow)._repr_html_()}


@pytest.mark.parametrize("streamed", [(), (1, 3)])
def test_it_is_static(streamed):
    run = Run(layers=4, streamed=streamed).go(12, read=0.5, waited=0.25, computed=0.5)
    shown = page(run.answer(text="text"), with_text=True)
    assert set(shown.tags) <= {"div", "b", "pre", "img", "details", "summary", "table", "tr", "td"}
    assert {name for _, name, _ in shown.attributes} <= {"class", "style", "alt", "src"}
    assert not any("var(" in value or "url(" in value for _, _, value in shown.attributes)
    assert len(shown.pictures) > 3
    for picture in shown.pictures:
        elements = {element.tag.rpartition("}")[2] for element in ET.fromstring(picture).iter()}
        assert elements <= {"svg", "path"}
        assert b"href" not in picture


def test_text_is_escaped(run):
    messages = [{"role": "user", "content": EVIL}, {"role": EVIL, "content": EVIL}]
    answer = run.answer(text=EVIL, model=EVIL, system=EVIL)
    for shown in (page(answer, with_text=True, messages=messages), page(answer, with_text=True)):
        assert "script" not in shown.tags
        assert not any(name.startswith("on") for _, name, _ in shown.attributes)
        assert shown.text.count(EVIL) >= 3
    assert EVIL in page(answer).text  # of the settings
    assert "the answer itself" not in page(run.answer(text="the answer itself")).text


def test_it_stays_small():
    run = Run(layers=126, streamed=range(0, 126, 2)).go(4096, read=0.01, waited=0.02, computed=0.013)
    assert len(StaticResult(run.answer())._repr_html_()) < 60_000
    assert "tokens 7" in page(run.answer()).text


GITHUB = {
    "tags": {"b", "br", "pre", "img", "div", "table", "tr", "td", "th", "summary", "details", "p", "strong", "em", "code"},
    "attributes": {"*": ["align", "alt", "height", "open", "title", "width"], "img": ["src"]},
}
"""Of GitHub's published rules (html-pipeline, ``SanitizationFilter::WHITELIST``) those for what a result may have."""


@pytest.mark.parametrize("images", [True, False])
def test_on_github(run, images):
    """There are no styles and no classes, and perhaps no images: every word is still there, in the same order."""
    bleach = pytest.importorskip("bleach")
    html = StaticResult(run.answer(text="Hello"), with_text=True)._repr_html_()
    kept = bleach.clean(html, **GITHUB, protocols=["https", *["data"] * images], strip=True)
    shown = Page(kept)
    assert "style" not in kept
    assert shown.text == Page(html).text
    assert len(shown.tags) == len(Page(html).tags)
    assert sum(name == "src" for _, name, _ in shown.attributes) == (len(Page(html).pictures) if images else 0)
    assert any("Time per layer: computing" in value for _, name, value in shown.attributes if name == "alt")


def test_nbconvert(run):
    """The page that nbconvert makes has the result, and refers to nothing that it would not refer to without one."""
    nbformat = pytest.importorskip("nbformat")
    nbconvert = pytest.importorskip("nbconvert")
    bundle = StaticResult(run.answer())._repr_mimebundle_()
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {"text/plain": "1"})])]
    without, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    notebook.cells[0].outputs.append(nbformat.v4.new_output("display_data", bundle))
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    sources = re.findall(r'src="data:[^"]+"', bundle["text/html"])
    assert len(sources) > 3
    assert re.findall(r'src="data:image/svg[^"]+"', html) == sources
    assert "one bar for each layer" in html
    outside = r"<script|<link|https?://[^\s\"'<]+"
    assert re.findall(outside, html) == re.findall(outside, without)


@pytest.mark.parametrize(("display", "published"), [("auto", 0), ("text", 0), ("silent", 0), ("widget", 1)])
def test_where_it_is_published(shell, chat, monkeypatch, display, published):
    """This shell is a terminal's."""
    shown = []
    monkeypatch.setattr("airllm_nb.notebook.magics.publish", shown.append)
    shell.run("%config AirLLMMagics.display = 'silent'")
    shell.run(f"%airllm load {chat} --device cpu --dtype float32 --memory 500kB")
    shell.run(f"%config AirLLMMagics.display = {display!r}")
    shell.run("%%airllm --max-new-tokens 3 --temperature 0.5 --seed 1 -o answer\nHello")
    assert isinstance(shell.magics, AirLLMMagics)
    assert [type(one) for one in shown] == [StaticResult] * published
    answer = shell["answer"]
    settings = answer.settings
    assert (settings.model, settings.device, settings.temperature, settings.seed) == (chat.name, "cpu", 0.5, 1)
    assert settings.resident + settings.streamed == 4
    assert settings.streamed
    assert settings.used_nbytes <= settings.budget_nbytes == 500_000
    assert len(answer.timeline.passes) == 3
    assert all(len(one.computed) == 4 for one in answer.timeline.passes)
    assert {layer for layer, *_ in answer.timeline.read} == {layer.index for layer in answer.layers if not layer.resident}
    for one in answer.timeline.passes:
        spans = [span for span in one.computed if one.begin <= span[1] <= span[2] <= one.end]
        assert len(spans) == 4
