"""Small charts as SVG: no plotting library, no script, the same in a notebook, on GitHub and in exported HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

# An SVG is shown as an image, which cannot ask the theme: these read on white and on black alike.
INK = "#808080"
BAR = "#d1495b"
GOOD = "#3a9d5d"
FONT = "font-family='sans-serif' font-size='12'"
ROW, LABEL, WIDTH = 20, 70, 620


def bars(groups: Mapping[str, Mapping[str, tuple[float | None, str]]], unit: str) -> str:
    """Draw horizontal bars in groups that share one scale.

    Parameters
    ----------
    groups : mapping of str to mapping of str to (float or None, str)
        Title of the group -> label of the bar -> its length in `unit` (None where there is nothing to measure), and a note that
        stands behind it.
    unit : str
        What the lengths are, for the caption.

    Returns
    -------
    str
        A whole ``<svg>`` element; wrap it in ``IPython.display.SVG``.
    """
    longest = max((length for rows in groups.values() for length, _ in rows.values() if length), default=1.0)
    parts: list[str] = []
    top = 0
    for title, rows in groups.items():
        top += ROW + 6
        parts.append(_text(0, top, title, "font-weight='bold'"))
        for label, (length, note) in rows.items():
            top += ROW
            parts += _bar(top, label, length, note, (WIDTH - LABEL - 220) / longest)
    top += ROW + 6
    parts.append(_text(LABEL, top, unit, "font-style='italic'"))
    size = f"viewBox='0 0 {WIDTH} {top + 8}' width='{WIDTH}' height='{top + 8}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' {FONT} fill='{INK}'>{''.join(parts)}</svg>"


def _bar(y: int, label: str, length: float | None, note: str, scale: float) -> list[str]:
    """Return one row: label, bar, number and note."""
    width = max((length or 0) * scale, 2)
    shown = "fails" if length is None else f"{length:.1f}" if length else "0"
    colour = INK if length is None else BAR if length else GOOD
    return [
        _text(LABEL - 8, y, label, "text-anchor='end'"),
        f"<rect x='{LABEL}' y='{y - 11}' width='{width:.1f}' height='13' rx='2' fill='{colour}'/>",
        _text(LABEL + width + 6, y, f"{shown}{'   ' if note else ''}{note}"),
    ]


def _text(x: float, y: int, text: str, style: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y}' {style} xml:space='preserve'>{escape(text)}</text>"
