"""The picture of a run as HTML: one cell per layer, bars, and lines of words. Pure functions of a `RunState`."""

from __future__ import annotations

import functools
from html import escape
from typing import TYPE_CHECKING

from airllm_nb.notebook.run_state import LayerState, Phase
from airllm_nb.notebook.verdict import time_left, verdict

if TYPE_CHECKING:
    from airllm_nb.events import LayerInfo
    from airllm_nb.notebook.batches import Batches
    from airllm_nb.notebook.run_state import RunState

__all__ = ["STYLE", "headline", "render", "render_layers", "verdict"]

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

COLUMNS = {"wide": (24, 34), "middle": (16, 24), "narrow": (10, 15)}
"""Least and most cells in a row, by how wide the page is: a few layers do not become a few broad bars."""
MOST_FILES = 8

# Colours come from JupyterLab's theme where it defines them. The fallbacks can be read on light and on dark: filled
# cells bring their own text colour, and the others take the page's.
STYLE = """<style>
.airllm { font-family: var(--jp-ui-font-family, system-ui, sans-serif); font-size: 13px; line-height: 1.5;
  max-width: 960px; container-type: inline-size; padding: 6px 0 8px; font-variant-numeric: tabular-nums; }
.airllm-top, .airllm-key { display: flex; flex-wrap: wrap; column-gap: 1em; align-items: baseline; }
.airllm-top b { font-weight: 600; overflow-wrap: anywhere; }
.airllm-top span { margin-left: auto; opacity: .8; overflow-wrap: anywhere; }
.airllm-bars { display: flex; flex-wrap: wrap; gap: 0 1em; align-items: center; margin: 2px 0 6px; font-size: 12px; }
.airllm-bars label { display: flex; align-items: center; gap: .5em; flex: 1 1 9em; }
.airllm-bars label.answer, .airllm-bars label.whole { flex: 3 1 15em; }
.airllm-bars label.now { font-weight: 600; }
.airllm-files { display: grid; grid-template-columns: auto minmax(6em, 1fr) auto; gap: 0 .7em; align-items: center;
  margin: 2px 0 6px; font-size: 12px; }
.airllm-files label { overflow-wrap: anywhere; }
.airllm progress { flex: 1; width: 100%; min-width: 3em; height: 8px; accent-color: var(--jp-brand-color1, #1976d2); }
.airllm-strip { display: grid; gap: 3px; grid-auto-rows: 24px;
  grid-template-columns: repeat(auto-fill, minmax(20px, 1fr)); }
@container (min-width: 350px) { .airllm-strip { grid-template-columns: repeat(var(--narrow), 1fr); } }
@container (min-width: 560px) { .airllm-strip { grid-template-columns: repeat(var(--middle), 1fr); } }
@container (min-width: 780px) { .airllm-strip { grid-template-columns: repeat(var(--wide), 1fr); } }
.airllm i { font-style: normal; display: flex; justify-content: center; align-items: center; box-sizing: border-box;
  border: 1px solid transparent; border-radius: 3px; cursor: default; }
.airllm-key { margin-top: 7px; font-size: 12px; }
.airllm-key span { display: flex; align-items: center; }
.airllm-key i { width: 18px; height: 18px; margin-right: 5px; }
.airllm-verdict { margin-top: 5px; min-height: 1.5em; }
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
    words = f'<div class="airllm-verdict">{escape(verdict(state))}</div>' if state.tokens_wanted else ""
    note = f'<div class="airllm-note" role="status">{escape(state.note)}</div>' if state.note else ""
    return (
        f'<div class="airllm"><div class="airllm-top"><b>{escape(headline(state))}</b>'
        f"<span>{escape(state.model)}</span></div>{_bars(state)}{_strip(state.layers)}{_key(state)}{words}{note}</div>"
    )


def render_layers(infos: tuple[LayerInfo, ...]) -> str:
    """Draw the layers of a plan: which would stay, and which would stream."""
    layers = [LayerState(info, "resident" if info.resident else "waiting") for info in infos]
    stay = sum(info.resident for info in infos)
    streams = len(infos) - stay
    key: list[tuple[Phase, str]] = [("resident", f"{_count(stay, 'layer')} in memory")] if stay else []
    key += [("waiting", f"{_count(streams, 'layer')} streamed from disk")] if streams else []
    return f'<div class="airllm">{_strip(layers)}{_explained(key)}</div>'


def headline(state: RunState) -> str:
    """Say in one line what is going on: ``token 7/40 · layer 12/30 · model.layers.11 · 3.1 tok/s``."""
    if state.batches is not None:
        return _headline_of_map(state, state.batches)
    if state.kind == "opening":
        return state.ended or _fetching(state) or ("starting" if state.tokens_wanted else "opening")
    if state.ended:
        return _ended(state)
    if state.kind == "load":
        wanted = sum(layer.info.resident for layer in state.layers)
        return f"loading · layer {state.loaded_layers}/{wanted} · {_size(state.loaded_nbytes)}"
    where = _where(state)
    if state.kind == "prefill":
        return f"prompt of {_count(state.prompt_tokens, 'token')} · {where}"
    rate = f" · {state.tokens_per_second:.1f} tok/s" if state.tokens_per_second else ""
    return f"token {state.tokens + 1}/{state.tokens_wanted} · {where}{rate}"


def _headline_of_map(state: RunState, batches: Batches) -> str:
    """Say it of many prompts: ``16/40 prompts · 1.23 s each · next 16: token 7/40 · layer 12/30 · model.layers.11``."""
    each = f" · {batches.seconds_per_prompt:.3g} s each" if batches.seconds_per_prompt else ""
    done = f"{batches.done}/{_count(batches.total, 'prompt')}{each}"
    if state.ended:
        return f"{'' if state.ended == 'done' else f'{state.ended} · '}{done} · {batches.seconds:.1f} s"
    if not state.passes_begun or not batches.rows:
        return done
    what = "prompts" if state.kind == "prefill" else f"token {min(state.tokens + 1, state.tokens_wanted)}/{state.tokens_wanted}"
    return f"{done} · next {batches.rows}: {what} · {_where(state)}"


def _where(state: RunState) -> str:
    """Name the layer that computes, or is waited for."""
    number = state.layer + 1 + state.waits
    wait = "waiting for " if state.waits else ""
    return f"{wait}layer {number}/{len(state.layers)} · {state.layers[number - 1].info.name}"


def _fetching(state: RunState) -> str:
    if not state.files:
        return state.fetching
    complete = sum(done >= total for done, total in state.files.values())
    done, total = (_size(sum(sizes)) for sizes in zip(*state.files.values(), strict=True))
    return f"{_activity(state)} · file {min(complete + 1, len(state.files))}/{len(state.files)} · {done} of {total}"


def _activity(state: RunState) -> str:
    """Say in a word what is done with the files: ``downloading``, or ``converting``."""
    return state.fetching.partition(" ")[0].lower()


def _ended(state: RunState) -> str:
    word = "" if state.ended == "done" else f"{state.ended} · "
    if state.kind == "load":
        wanted = sum(layer.info.resident for layer in state.layers)
        layers = f"{state.loaded_layers}/{wanted}" if word else str(wanted)
        return f"{word}{layers} layers in memory · {_size(state.loaded_nbytes)} · {state.seconds:.1f} s"
    rate = f" · {state.tokens_per_second:.1f} tok/s" if state.tokens else ""
    return f"{word}{_count(state.tokens, 'token')} · {state.seconds:.1f} s{rate}"


def _bars(state: RunState) -> str:
    """Show how far it is, and how long it will go on: one bar of a load, one of each phase of a run, one of each file."""
    left = f"<span>{time_left(state)}</span>"
    if state.batches is not None:
        share = state.fraction if state.batches.rows else 0.0
        bars = _bar("prompts", state.batches.fraction(share), "whole now") + (_bar("batch", share, "") if not state.ended else "")
        return f'<div class="airllm-bars">{bars}{left}</div>'
    if state.kind == "load":
        return f'<div class="airllm-bars">{_bar("loading", state.fraction, "whole now")}{left}</div>'
    if state.kind == "opening" and not state.tokens_wanted:
        return _files(state, left)
    prompt = 1.0 if state.kind == "decode" or state.tokens else state.pass_fraction if state.kind == "prefill" else 0.0
    return (
        '<div class="airllm-bars">'
        + _bar("prompt", prompt, "prompt" if state.kind == "decode" or state.ended else "prompt now")
        + _bar("answer", state.fraction, "answer now" if state.kind == "decode" and not state.ended else "answer")
        + f"{left}</div>"
    )


def _bar(word: str, fraction: float, classes: str) -> str:
    return f'<label class="{classes}">{word} {_progress(fraction)}</label>'


def _progress(fraction: float) -> str:
    percent = round(fraction * 100, 1)
    return f'<progress max="100" value="{percent}">{percent:.0f}%</progress>'


def _files(state: RunState, left: str) -> str:
    """Show the files that are fetched: all of a few, else those that are under way, and what they are together."""
    if not state.files:
        return ""
    shown = state.files
    if len(shown) > MOST_FILES:
        under_way = [(name, sizes) for name, sizes in shown.items() if 0 < sizes[0] < sizes[1]]
        shown = dict(under_way[:MOST_FILES])
    rows = "".join(
        f"<label>{escape(name)}</label>{_progress(done / total if total else 1.0)}<span>{_size(done)} of {_size(total)}</span>"
        for name, (done, total) in shown.items()
    )
    return (
        f'<div class="airllm-bars">{_bar(_activity(state), state.fraction, "whole now")}{left}</div>'
        f'<div class="airllm-files">{rows}</div>'
    )


def _strip(layers: list[LayerState]) -> str:
    columns = "; ".join(f"--{width}: {_columns(len(layers), *limits)}" for width, limits in COLUMNS.items())
    return f'<div class="airllm-strip" style="{columns}">{"".join(map(_cell, layers))}</div>'


def _columns(layers: int, least: int, most: int) -> int:
    """Return how many cells go into a row, so that rows are equally long."""
    rows = -(-layers // most)
    return max(least, -(-layers // max(rows, 1)))


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
    return _explained([(phase, WORDS[phase]) for phase in phases])


def _explained(phases: list[tuple[Phase, str]]) -> str:
    spans = "".join(f'<span><i class="{phase}">{GLYPHS[phase]}</i>{words}</span>' for phase, words in phases)
    return f'<div class="airllm-key">{spans}</div>'


def _size(nbytes: int) -> str:
    from airllm_nb.engine.memory import format_size  # with torch, which is there when there are sizes to show

    return format_size(nbytes)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
