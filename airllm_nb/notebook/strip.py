"""The picture of a run as HTML: one cell per layer, a bar, and a line of words. Pure functions of a `RunState`."""

from __future__ import annotations

import functools
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airllm_nb.events import LayerInfo
    from airllm_nb.notebook.progress import LayerState, Phase, RunState

GLYPHS: dict[Phase, str] = {
    "waiting": "·",
    "reading": "↓",
    "ready": "○",
    "resident": "■",
    "computing": "►",
    "done": "✓",
}
"""A glyph beside every colour: neither a colour-blind reader nor a grey print loses anything."""

WORDS: dict[Phase, str] = {
    "waiting": "on disk",
    "reading": "being read",
    "ready": "read ahead",
    "resident": "in memory",
    "computing": "computing",
    "done": "done",
}

MOST_COLUMNS = 34
LEAST_COLUMNS = 24  # a few layers do not become a few broad bars

# Colours come from JupyterLab's theme where it defines them. The fallbacks can be read on light and on dark: filled
# cells bring their own text colour, and the others take the page's.
STYLE = """<style>
.airllm { font-family: var(--jp-ui-font-family, system-ui, sans-serif); font-size: 13px; line-height: 1.5;
  max-width: 960px; padding: 6px 0 8px; font-variant-numeric: tabular-nums; }
.airllm-top, .airllm-key { display: flex; flex-wrap: wrap; column-gap: 1em; align-items: baseline; }
.airllm-top b { font-weight: 600; }
.airllm-top span { margin-left: auto; opacity: .75; }
.airllm progress { display: block; width: 100%; height: 8px; margin: 3px 0 7px;
  accent-color: var(--jp-brand-color1, #1976d2); }
.airllm-strip { display: grid; gap: 3px; grid-auto-rows: 24px;
  grid-template-columns: repeat(auto-fill, minmax(max(24px, 100% / var(--columns) - 3px), 1fr)); }
.airllm i { font-style: normal; display: flex; justify-content: center; align-items: center; box-sizing: border-box;
  border: 1px solid transparent; border-radius: 3px; cursor: default; }
.airllm-key { margin-top: 7px; font-size: 12px; }
.airllm-key span { display: flex; align-items: center; }
.airllm-key i { width: 18px; height: 18px; margin-right: 5px; }
.airllm-note { margin-top: 5px; padding-left: 8px; border-left: 3px solid var(--jp-warn-color1, #f57c00); }
.airllm .waiting { border: 1px dashed rgba(128, 128, 128, .8); }
.airllm .reading { background: var(--jp-warn-color1, #f57c00); color: #000; }
.airllm .ready { border: 2px solid var(--jp-warn-color1, #f57c00); }
.airllm .resident { background: rgba(128, 128, 128, .28); }
.airllm .computing { background: var(--jp-brand-color1, #1976d2); color: var(--jp-ui-inverse-font-color0, #fff);
  font-weight: 700; }
.airllm .done { background: var(--jp-success-color0, #1b5e20); color: var(--jp-ui-inverse-font-color0, #fff); }
.airllm .done.streams { background: rgba(67, 160, 71, .2); color: inherit; border-color: var(--jp-success-color1, #388e3c); }
</style>"""


def render(state: RunState) -> str:
    """Draw the whole picture."""
    percent = round(state.fraction * 100, 1)
    cells = "".join(map(_cell, state.layers))
    note = f'<div class="airllm-note" role="status">{escape(state.note)}</div>' if state.note else ""
    return (
        f'<div class="airllm"><div class="airllm-top"><b>{escape(headline(state))}</b>'
        f"<span>{escape(state.model)}</span></div>"
        f'<progress aria-label="done so far" max="100" value="{percent}">{percent:.0f}%</progress>'
        f'<div class="airllm-strip" style="--columns: {_columns(len(state.layers))}">{cells}</div>{_key(state)}{note}</div>'
    )


def render_layers(infos: tuple[LayerInfo, ...]) -> str:
    """Draw the layers of a plan: which stay, and which stream."""
    from airllm_nb.notebook.progress import LayerState

    layers = [LayerState(info, "resident" if info.resident else "waiting") for info in infos]
    return f'<div class="airllm-strip" style="--columns: {_columns(len(layers))}">{"".join(map(_cell, layers))}</div>'


def headline(state: RunState) -> str:
    """Say in one line what is going on: ``token 7/40 · layer 12/30 · model.layers.11 · 3.1 tok/s``."""
    if state.kind == "opening":
        return state.ended or state.fetching or ("starting" if state.tokens_wanted else "opening")
    if state.ended:
        return _ended(state)
    if state.kind == "load":
        wanted = sum(layer.info.resident for layer in state.layers)
        return f"loading · layer {state.loaded_layers}/{wanted} · {_size(state.loaded_nbytes)}"
    number = state.layer + 1 + state.waits
    wait = "waiting for " if state.waits else ""
    where = f"{wait}layer {number}/{len(state.layers)} · {state.layers[number - 1].info.name}"
    if state.kind == "prefill":
        return f"prompt of {_count(state.prompt_tokens, 'token')} · {where}"
    rate = f" · {state.tokens_per_second:.1f} tok/s" if state.tokens_per_second else ""
    return f"token {state.tokens + 1}/{state.tokens_wanted} · {where}{rate}"


def _ended(state: RunState) -> str:
    word = "" if state.ended == "done" else f"{state.ended} · "
    if state.kind == "load":
        wanted = sum(layer.info.resident for layer in state.layers)
        layers = f"{state.loaded_layers}/{wanted}" if word else str(wanted)
        return f"{word}{layers} layers in memory · {_size(state.loaded_nbytes)} · {state.seconds:.1f} s"
    rate = f" · {state.tokens_per_second:.1f} tok/s" if state.tokens else ""
    return f"{word}{_count(state.tokens, 'token')} · {state.seconds:.1f} s{rate}"


def _columns(layers: int) -> int:
    """Return how many cells go into a row, at most, so that full-width rows are equally long."""
    rows = -(-layers // MOST_COLUMNS)
    return max(LEAST_COLUMNS, -(-layers // max(rows, 1)))


def _cell(layer: LayerState) -> str:
    phase = layer.phase
    title = _about(layer.info)
    if layer.passes:
        title += f"\ncomputed {layer.passes} times, {layer.compute_seconds / layer.passes * 1e3:.1f} ms each"
    if layer.read_seconds:
        title += f"\nread in {layer.read_seconds * 1e3:.0f} ms, waited for {layer.waited_seconds * 1e3:.0f} ms"
    streams = "" if layer.info.resident else " streams"
    return f'<i class="{phase}{streams}" title="{title}">{GLYPHS[phase]}</i>'


@functools.lru_cache(maxsize=4096)
def _about(info: LayerInfo) -> str:
    return escape(f"{info.name} · {_size(info.nbytes)} · {'stays in memory' if info.resident else 'streams'}")


def _key(state: RunState) -> str:
    """Explain the glyphs that can occur: always the same ones during a run, so that nothing jumps."""
    if not state.layers:
        return ""
    resident = any(layer.info.resident for layer in state.layers)
    streams = any(not layer.info.resident for layer in state.layers)
    phases: list[Phase] = ["waiting"] if streams or state.kind == "load" else []
    phases += ["reading"] if streams or state.kind == "load" else []
    phases += ["ready"] if streams and state.kind != "load" else []
    phases += ["resident"] if resident else []
    phases += ["computing", "done"] if state.kind != "load" else []
    return (
        '<div class="airllm-key">'
        + "".join(f'<span><i class="{phase}">{GLYPHS[phase]}</i>{WORDS[phase]}</span>' for phase in phases)
        + "</div>"
    )


def _size(nbytes: int) -> str:
    from airllm_nb.engine.memory import format_size  # with torch, which is there when there are sizes to show

    return format_size(nbytes)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
