"""Small charts: bars as SVG in static HTML. No plotting library, no script, the same in a notebook, on GitHub and in exports."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

# An SVG is shown as an image, which cannot ask the theme: these read on white and on black alike.
INK = "#808080"
BAR = "#1b72c8"
WRONG = "#d1495b"
GOOD = "#3a9d5d"
FONT = "font-family='sans-serif' font-size='12'"
ROW, LABEL, WIDTH, NOTE = 20, 70, 620, 220
LETTER = 7.5
THREE_DIGITS = 100

Groups = Mapping[str, Mapping[str, tuple[float | None, str]]]


class BarChart:
    """Horizontal bars in groups that share one scale, as `bars` makes them; a notebook shows it where it ends a cell.

    Attributes
    ----------
    svg : str
        A whole ``<svg>`` element.
    text : str
        The same in words, for whoever sees no images.
    html : str
        The drawing as an image in HTML: that passes where a notebook is not trusted, which a plain SVG does not.
    """

    def __init__(self, svg: str, text: str) -> None:
        self.svg = svg
        self.text = text
        data = base64.b64encode(svg.encode()).decode()
        style = "display:block;max-width:100%;height:auto;margin:4px 0"
        self.html = f'<img alt="{escape(text)}" style="{style}" src="data:image/svg+xml;base64,{data}">'

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def bars(groups: Groups, caption: str, *, unit: str = "", wrong: bool = False) -> BarChart:
    """Draw horizontal bars in groups that share one scale.

    Parameters
    ----------
    groups : mapping of str to mapping of str to (float or None, str)
        Title of the group -> label of the bar -> its length (None where there is nothing to measure), and a note that stands
        behind it.
    caption : str
        What the lengths are.
    unit : str
        What stands behind each number.
    wrong : bool
        Lengths are errors: red, and green where there is none.

    Returns
    -------
    BarChart
    """
    left = max(LABEL, 8 + LETTER * max((len(label) for rows in groups.values() for label in rows), default=0))
    longest = max((length for rows in groups.values() for length, _ in rows.values() if length), default=1.0)
    parts: list[str] = []
    lines: list[str] = []
    top = 0
    for title, rows in groups.items():
        top += ROW + 6
        parts.append(_text(0, top, title, "font-weight='bold'"))
        lines.append(title)
        width = max(map(len, rows), default=0)
        for label, (length, note) in rows.items():
            top += ROW
            words = " · ".join(filter(None, (_number(length, unit), note)))
            colour = INK if length is None else BAR if not wrong else WRONG if length else GOOD
            parts.append(_text(left - 8, top, label, "text-anchor='end'"))
            bar = max((length or 0) * (WIDTH - left - NOTE) / longest, 2)
            parts.append(f"<rect x='{left:g}' y='{top - 11}' width='{bar:.1f}' height='13' rx='2' fill='{colour}'/>")
            parts.append(_text(left + bar + 6, top, words))
            lines.append(f"  {label:{width}}  {words}")
    top += ROW + 6
    parts.append(_text(left, top, caption, "font-style='italic'"))
    size = f"viewBox='0 0 {WIDTH} {top + 8}' width='{WIDTH}' height='{top + 8}'"
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' {FONT} fill='{INK}'>{''.join(parts)}</svg>"
    return BarChart(svg, "\n".join([*lines, f"({caption})"]))


def _number(length: float | None, unit: str) -> str:
    """Write a length with as many decimals as can mean something."""
    if length is None:
        return "fails"
    number = f"{length:.{0 if length >= THREE_DIGITS else 1}f}" if length else "0"
    return f"{number} {unit}".rstrip()


def _text(x: float, y: int, text: str, style: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y}' {style} xml:space='preserve'>{escape(text)}</text>"
