"""What a run leaves in the notebook: static HTML, which is saved with it and needs no kernel, no script and no widget.

Who shows notebooks keeps different parts of HTML, and so this holds to what they share:

- GitHub drops ``style``, ``class`` and ``<span>``: the words still stand in their order, in ``<div>`` and ``<table>``.
- JupyterLab keeps most inline styles of a notebook that is not trusted, but no ``var()``, no ``aria-*`` and no ``<svg>``.
- ``<img src="data:image/svg+xml;base64,...">`` passes both: JupyterLab checks the schemes of ``href`` and ``cite`` alone, and an
  output of type ``image/svg+xml`` is turned into just that by GitHub and by newer versions of nbconvert. (Such an output beside
  the HTML would not be seen: all prefer HTML.) Where images are dropped all the same, the words beside them say what they show.
"""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from airllm_nb.engine.memory import format_size
from airllm_nb.notebook import report, timechart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from airllm_nb import LayeredModel
    from airllm_nb.notebook.summary import Answer, Settings, Stopped
    from airllm_nb.notebook.timeline import Timeline

WHY: dict[Stopped, str] = {
    "end": "the model ended its text",
    "length": "ended by max-new-tokens",
    "stop": "ended by a stop text",
    "interrupted": "stopped by the user",
}

BOX = "max-width:960px;padding:4px 2px 6px;font-size:13px;line-height:1.6"
QUIET = "font-size:12px;opacity:0.8"
PICTURE = "display:block;max-width:100%;height:auto;margin:6px 0 4px"
SAID = (
    "margin:0 0 8px;padding:0;border:0;background-color:transparent;font-family:inherit;white-space:pre-wrap;"
    "overflow-wrap:break-word"
)
TABLE = "border-collapse:collapse;margin:4px 0;font-size:12px"
CELL = "padding:1px 12px 1px 0;text-align:left;white-space:nowrap"
LANES = "display:block;max-width:none;margin:0"

SYSTEM_CHARACTERS = 200
PER_MINUTE = 60


class StaticResult:
    """The result of one run, to be displayed once; it holds strings only, neither the answer nor the model.

    Parameters
    ----------
    answer : Answer
        What is left of the run.
    model : LayeredModel, optional
        What ran, where the answer does not say (`Answer.settings`).
    with_text : bool
        Carry the text too. A cell that wrote it to stdout has it already.
    mark : str
        A class for all of it, by which a page can find it.
    messages : sequence of mapping
        With `with_text`, the whole conversation in place of the answer's text: ``{"role": ..., "content": ...}`` each.
    """

    def __init__(
        self,
        answer: Answer,
        model: LayeredModel | None = None,
        *,
        with_text: bool = False,
        messages: Sequence[Mapping[str, str]] = (),
        mark: str = "",
    ) -> None:
        said = (messages or [{"role": "assistant", "content": answer.text}]) if with_text else ()
        html = "".join(_render(answer, model, said))
        self.html = f'<div class="{escape(mark)}">{html}</div>' if mark else html
        self._text = f"<airllm_nb: {_tokens(len(answer.token_ids))}, {WHY[answer.stopped]}>"

    def __repr__(self) -> str:  # without times: nbval compares it
        return self._text

    def _repr_html_(self) -> str:
        return self.html

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:  # noqa: ARG002  # the protocol
        return {"text/plain": self._text, "text/html": self.html}


def _render(answer: Answer, model: LayeredModel | None, said: Sequence[Mapping[str, str]]) -> Iterator[str]:
    yield f'<div class="airllm-result" style="{BOX}">'  # the class is for nbval's sanitizing
    for message in said:
        first = "\n" if message["content"].startswith("\n") else ""  # a line break right after <pre> is none, but the second is
        yield f'<div><b>{escape(message["role"])}</b></div><pre style="{SAID}">{first}{escape(message["content"])}</pre>'
    rate = f" · {answer.tokens_per_second:.1f} tok/s" if answer.token_ids else ""
    yield f"<div><b>{_tokens(len(answer.token_ids))} · {_time(answer.seconds)}{rate}</b> · {WHY[answer.stopped]}</div>"
    for line in _settings(answer, model):
        yield f'<div style="{QUIET}">{escape(line)}</div>'
    if any(layer.passes for layer in answer.layers):
        yield from _layers(answer)
    if answer.timeline is not None and answer.timeline.passes:
        yield from _timeline(answer.timeline)
    yield "</div>"


def _settings(answer: Answer, model: LayeredModel | None) -> Iterator[str]:
    settings = answer.settings
    if settings is None:
        if model is not None:
            yield report.one_line(model)
        return
    memory = f"{format_size(settings.used_nbytes)} of {format_size(settings.budget_nbytes)}"
    where = f"{settings.device} · {settings.dtype} · {memory}"
    yield f"{settings.model} · {report.count_layers(settings.resident, settings.streamed)} · {where}"
    yield f"prompt of {_tokens(answer.prompt_tokens)} · at most {settings.max_new_tokens} new · {_choice(settings)}"
    if settings.system is not None:
        system = settings.system
        shown = system if len(system) <= SYSTEM_CHARACTERS else system[:SYSTEM_CHARACTERS] + "…"
        yield f"system: {shown}"


def _choice(settings: Settings) -> str:
    """Say how tokens were chosen."""
    if not settings.temperature:
        return "always the most likely token"
    top_p = f", top-p {settings.top_p:g}" if settings.top_p is not None else ""
    seed = f", seed {settings.seed}" if settings.seed is not None else ""
    return f"temperature {settings.temperature:g}{top_p}{seed}"


def _layers(answer: Answer) -> Iterator[str]:
    """Show where the time went: a bar for each layer, and the sums in words, which are the legend."""
    layers = answer.layers
    computed, waited, read = (
        sum(getattr(layer, f"{name}_seconds") for layer in layers) for name in ("compute", "waited", "read")
    )
    parts = [("compute", f"computing {_time(computed)}")]
    reads = any(layer.read_seconds for layer in layers)
    if reads:
        share = answer.settings.file_share if answer.settings else 1.0  # as a plan counts them: bytes of the files
        disk, cache = (round(share * sum(getattr(layer, f"{name}_nbytes") for layer in layers)) for name in ("disk", "cache"))
        sources = [f"{format_size(size)} from {name}" for size, name in ((disk, "disk"), (cache, "the page cache")) if size]
        parts.append(("wait", f"waiting for weights {_time(waited)}"))
        parts.append(("read", f"meanwhile reading {_time(read)} ({', '.join(sources)})"))
    other = max(answer.seconds - computed - waited, 0.0)
    legend = " &nbsp; ".join(f"{_image(timechart.sample(kind), '')} {escape(words)}" for kind, words in parts)
    yield _image(timechart.layer_bars(layers), "Time per layer: " + ", ".join(words for _, words in parts), PICTURE)
    yield f'<div style="font-size:12px">{legend} &nbsp; all else {_time(other)}</div>'
    how = "above the line reading, below it computing and, thin, waiting" if reads else "the time it computed"
    launch = ". On a GPU, computing is the time to launch it" if answer.settings and answer.settings.device != "cpu" else ""
    yield f'<div style="{QUIET}">one bar for each layer, 0 to {len(layers) - 1}: {how}{launch}</div>'


def _timeline(timeline: Timeline) -> Iterator[str]:
    """Show pass after pass from left to right, folded. The tokens share one scale; the prompt, which takes long, has its own."""
    prompt, *tokens = timeline.passes
    longest = max([one.seconds for one in tokens] + [one.seconds / one.passes for one in timeline.later], default=0.0)
    rows = []
    number = 1
    for one in timeline.passes:
        scale = prompt.seconds if one is prompt else longest
        what = ("prompt, token 1" if one is prompt else f"token {number}") if one.completed else "stopped"
        rows.append((what, timechart.pass_lanes(one, timeline.read, scale), _time(one.seconds)))
        number += one.completed
    for stretch in timeline.later:
        last = number + stretch.passes - 1
        what = f"tokens {number}–{last}" if last > number else f"token {number}"  # noqa: RUF001  # a dash between numbers
        mean = f"{_time(stretch.seconds / stretch.passes)}{' each' if last > number else ''}"
        rows.append((what, timechart.stretch_lanes(stretch, longest), mean))
        number = last + 1
    yield f'<details style="margin-top:4px"><summary>Timeline</summary><table style="{TABLE}">'
    for what, svg, seconds in rows:
        cells = "".join(f'<td style="{CELL}">{cell}</td>' for cell in (what, _image(svg, "", LANES), seconds))
        yield f'<tr style="background-color:transparent">{cells}</tr>'
    how = "reading above, below it computing and, thin, waiting" if timeline.read else "layer after layer"
    mean = "; of those that are taken together the mean is shown" if timeline.later else ""
    shared = f". Tokens share one scale{mean}" if len(rows) > 1 else ""
    yield f'</table><div style="{QUIET}">from left to right: {how}{shared}</div></details>'


def _image(svg: str, alt: str, style: str = "") -> str:
    data = base64.b64encode(svg.encode()).decode()
    styled = f' style="{style}"' if style else ""
    return f'<img alt="{escape(alt)}"{styled} src="data:image/svg+xml;base64,{data}">'


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 2 * PER_MINUTE else f"{seconds / PER_MINUTE:.1f} min"


def _tokens(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"
