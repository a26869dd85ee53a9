"""A trace as pictures: a table for the logit lens, SVG for attention and norms. No script, no plotting library.

They are read on light and on dark pages, and in saved notebooks: text takes the page's own colour, a cell's colour is laid over
the page's with less than full strength, and an SVG, which is shown as an image and cannot ask the theme, keeps to a middle grey.
(What viewers of notebooks let through is noted in `airllm_nb.notebook.result`.)
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airllm_nb.engine.trace import Trace

BLUE = "27,114,200"
STRONGEST = 0.62
"""How strong a cell's colour gets: black text on white and white text on black stay readable on it."""
INK = "#808080"
LINES = {"first token": "#dd6f00", "others (median)": INK, "last token": "#1b72c8"}
TEXT_CHARACTERS = 12
FONT = "font-family='sans-serif' font-size='12'"

BOX = "max-width:100%;overflow-x:auto;padding:4px 0 10px;font-size:12px;line-height:1.4"
TABLE = "color:inherit;border-collapse:separate;border-spacing:1px;margin:4px 0;font-size:12px"
CELL = "padding:1px 5px;text-align:left;white-space:nowrap"
QUIET = "opacity:0.8"

CHART_WIDTH, CHART_HEIGHT, MARGIN = 620, 200, 48
SQUARE, LETTER = 17, 7.5
BEGIN, SLANT = 0.7, 60
"""Where a column's name begins, as a share of the column's width, and by how many degrees it is turned."""


class Picture:
    """HTML to be displayed; a notebook that shows it is the same every time but for the numbers in it."""

    def __init__(self, title: str, body: str, note: str) -> None:
        self._title = title
        self.html = (
            f'<div class="airllm-trace" style="{BOX}"><div><b>{escape(title)}</b></div>{body}'
            f'<div style="{QUIET}">{escape(note)}</div></div>'
        )

    def __repr__(self) -> str:
        return f"<airllm_nb: {self._title}>"

    def _repr_html_(self) -> str:
        return self.html


def line(text: str) -> str:
    """Return a line of words below the pictures, as HTML."""
    return f'<div class="airllm-trace" style="{BOX};{QUIET}">{escape(text)}</div>'


def lens(trace: Trace, tokens: int, layers: int) -> Picture:
    """Draw the logit lens: rows are layers, columns tokens, and a cell is the likeliest next token."""
    count = trace.top_ids.shape[1]
    shown = range(max(count - tokens, 0), count)
    texts = [trace.tokens[trace.first + column] for column in shown]
    final = trace.top_ids[-1, :, 0].tolist() if trace.top_ids.numel() else []
    head = "".join(f'<th style="{CELL}" title="{escape(visible(text))}">{escape(short(text))}</th>' for text in texts)
    rows = [f'<tr style="background-color:transparent"><th style="{CELL};{QUIET}">layer</th>{head}</tr>']
    for layer in spread(len(trace.layers), layers) if final else ():
        cells = (_cell(trace, layer, column, final[column]) for column in shown)
        rows.append(f'<tr style="background-color:transparent"><th style="{CELL};{QUIET}">{layer}</th>{"".join(cells)}</tr>')
    note = (
        "Below each token of the text: what would come next if the layer on the left were the last one. The stronger the colour, "
        "the higher its probability; bold where it is what the last layer says. · is a blank, ↵ a line break."
    )
    return Picture(f"Logit lens of {trace.model}", f'<table style="{TABLE}">{"".join(rows)}</table>', note)


def lens_words(trace: Trace) -> str:
    """Write what would come after the last token, a line for each layer."""
    lines = [f"After {visible(trace.tokens[-1])!r} each layer would say:"]
    for layer in range(len(trace.layers)):
        guesses = (f"{visible(text)} {probability:.0%}" for text, probability in trace.guesses(layer))
        lines.append(f"{layer:5}  {'   '.join(guesses)}")
    return "\n".join(lines)


def attention(trace: Trace, layer: int, head: int, tokens: int) -> Picture:
    """Draw where each token looks: a row of squares for each, stronger where it looks more."""
    weights = trace.attention[layer, head]
    columns = range(max(len(trace.ids) - max(tokens, 1), 0), len(trace.ids))
    rows = range(max(columns.start, trace.first), len(trace.ids))
    labels = 12 + LETTER * max(len(short(trace.tokens[column])) for column in columns)
    width, height = labels + SQUARE * len(columns), labels + SQUARE * len(rows)
    parts = []
    for at, column in enumerate(columns):
        x, y = labels + SQUARE * (at + BEGIN), labels - 5
        parts.append(_text(x, y, short(trace.tokens[column]), f"transform='rotate(-{SLANT} {x:.0f} {y:.0f})'"))
    for down, row in enumerate(rows):
        y = labels + SQUARE * down
        parts.append(_text(labels - 6, y + 13, short(trace.tokens[row]), "text-anchor='end'"))
        looks = weights[row - trace.first].tolist()
        for at, column in enumerate(columns):
            if column <= row:  # what comes later cannot be seen
                parts.append(_square(labels + SQUARE * at, y, looks[column]))
    picture = _image(
        width + labels * math.cos(math.radians(SLANT)), height + 4, parts, f"Attention of head {head} in layer {layer}"
    )
    note = "Each row is a token, and shows how much it looks at the tokens before it and at itself: together, 100%."
    return Picture(f"Attention of head {head} in layer {layer}", picture, note)


def norms(trace: Trace) -> Picture:
    """Draw how long the hidden state is from layer to layer, on a logarithmic scale."""
    lines = _lines(trace)
    values = [value for line in lines.values() for value in line if 0 < value < math.inf] or [1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    count = len(trace.norms)

    def place(index: float, value: float) -> tuple[float, float]:
        x = MARGIN + index * (CHART_WIDTH - MARGIN - 10) / max(count - 1, 1)
        power = math.log10(value) if 0 < value < math.inf else low
        return x, 10 + (high - power) * (CHART_HEIGHT - 40) / (high - low)

    parts = []
    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        parts.append(f"<path d='M{MARGIN} {y:.1f}H{CHART_WIDTH - 10}' stroke='{INK}' stroke-width='0.5' opacity='0.5'/>")
        parts.append(_text(MARGIN - 6, y + 4, f"{10.0**power:g}", "text-anchor='end'"))
    marks = {index: str(index - 1) if index else "in" for index in spread(count, 11)}
    parts += [_text(place(index, 1.0)[0], CHART_HEIGHT - 12, mark, "text-anchor='middle'") for index, mark in marks.items()]
    for name, line in lines.items():
        points = " ".join("{:.1f},{:.1f}".format(*place(index, value)) for index, value in enumerate(line))
        parts.append(f"<polyline points='{points}' fill='none' stroke='{LINES[name]}' stroke-width='2'/>")
    legend = " &nbsp; ".join(f'<span style="color:{LINES[name]}">&#9632;</span> {name}' for name in lines)
    picture = _image(CHART_WIDTH, CHART_HEIGHT, parts, "Norm of the hidden state from layer to layer")
    note = (
        "From left to right: what enters the first layer, and what leaves each layer, by its number. "
        "Each line of the scale is ten times the one below."
    )
    return Picture("Norm of the hidden state", f"{picture}<div>{legend}</div>", note)


def _lines(trace: Trace) -> dict[str, list[float]]:
    """Return a line for each kind of token: the first one, often far from all others, the last one, and the rest."""
    states = trace.norms.tolist()
    begin = 1 if trace.first == 0 and len(states[0]) > 1 else 0
    lines = {"first token": [row[0] for row in states]} if begin else {}
    if len(states[0]) > begin + 1:
        lines["others (median)"] = [statistics.median(row[begin:-1]) for row in states]
    return lines | {"last token": [row[-1] for row in states]}


def visible(text: str) -> str:
    """Return a token's text with its blanks made visible, and without what cannot be shown."""
    marks = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "↵"}
    return "".join(marks.get(one, one if one.isprintable() else "\N{REPLACEMENT CHARACTER}") for one in text)


def short(text: str) -> str:
    """Return what fits into a cell; a space before a word is no news there."""
    text = visible(text[1:] if text[:1] == " " and text.strip() else text)
    return text if len(text) <= TEXT_CHARACTERS else text[: TEXT_CHARACTERS - 1] + "…"


def spread(count: int, most: int) -> Sequence[int]:
    """Return at most `most` of `count` numbers from 0, at even distances, the last one among them."""
    step = -(-count // max(most, 1))
    return sorted(range(count - 1, -1, -step))


def _cell(trace: Trace, layer: int, column: int, final: int) -> str:
    guesses = trace.guesses(layer, trace.first + column)
    text, probability = guesses[0]
    all_of_them = ", ".join(f"{visible(other)} {chance:.0%}" for other, chance in guesses)
    bold = ";font-weight:bold" if int(trace.top_ids[layer, column, 0]) == final else ""
    colour = f"background-color:rgba({BLUE},{STRONGEST * probability:.2f})"
    return f'<td style="{CELL};{colour}{bold}" title="{escape(all_of_them)}">{escape(short(text))}</td>'


def _square(x: float, y: float, weight: float) -> str:
    size = SQUARE - 1
    return (
        f"<rect x='{x:.0f}' y='{y:.0f}' width='{size}' height='{size}' fill='{INK}' opacity='0.12'/>"
        f"<rect x='{x:.0f}' y='{y:.0f}' width='{size}' height='{size}' fill='rgb({BLUE})' opacity='{weight:.2f}'/>"
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {style} xml:space='preserve'>{escape(text)}</text>"


def _image(width: float, height: float, parts: Iterable[str], alt: str) -> str:
    size = f"width='{width:g}' height='{height:g}' viewBox='0 0 {width:g} {height:g}'"
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT} fill='{INK}'>{''.join(parts)}</svg>"
    data = base64.b64encode(svg.encode()).decode()
    style = "display:block;max-width:100%;height:auto;margin:4px 0"
    return f'<img alt="{escape(alt)}" style="{style}" src="data:image/svg+xml;base64,{data}">'
