"""Where a run's time went, as SVG: a bar for each layer, a lane for each pass.

The pictures hold no text, which could not take the theme's colour. They are read above the line (or in the upper lane), computed
below it; a thin line is waiting. So nothing rests on colour alone, and each colour has a contrast of 3:1 on white and on black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from airllm_nb.notebook.summary import LayerTotals
    from airllm_nb.notebook.timeline import Pass, Span, Stretch

READ = "#dd6f00"
WAIT = "#808080"
COMPUTE = "#1b72c8"

BARS_WIDTH, BARS_HEIGHT = 720, 84
WIDEST_SLOT = 24  # a few layers do not become a few broad bars
ROW_WIDTH, ROW_HEIGHT = 480, 16
READ_LANE, COMPUTE_LANE = (3.5, 5), (11.5, 7)  # middle and thickness
ONLY_LANE = (ROW_HEIGHT / 2, 7)  # where nothing is read
THIN = 2

Interval = tuple[float, float]


def layer_bars(layers: Sequence[LayerTotals]) -> str:
    """Draw a bar for each layer, from left to right: read upwards, computed and then waited downwards.

    Where nothing was read the bars stand on the ground instead.
    """
    read = max((layer.read_seconds for layer in layers), default=0.0)
    ran = max((layer.compute_seconds + layer.waited_seconds for layer in layers), default=0.0)
    height = BARS_HEIGHT if read else BARS_HEIGHT // 2
    slot = min(WIDEST_SLOT, BARS_WIDTH / max(len(layers), 1))
    scale = (height - 3) / ((read + ran) or 1.0)
    middle = read * scale + 1 if read else height - 1
    down = 1 if read else -1
    bars: dict[str, list[str]] = {READ: [], COMPUTE: [], WAIT: []}
    for index, layer in enumerate(layers):
        x = (index + 0.5) * slot
        y = middle + down
        bars[READ].append(_upright(x, middle - 1, -layer.read_seconds * scale))
        bars[COMPUTE].append(_upright(x, y, down * layer.compute_seconds * scale))
        bars[WAIT].append(_upright(x, y + down * layer.compute_seconds * scale, down * layer.waited_seconds * scale))
    width = slot * len(layers)
    thick = slot * 0.62
    parts = [_path(bars[READ], READ, thick), _path(bars[COMPUTE], COMPUTE, thick), _path(bars[WAIT], WAIT, max(thick / 4, 1))]
    parts.append(_path([f"M0 {middle:.1f}h{width:.1f}"], WAIT, 1))
    return _svg(width, height, parts)


def pass_lanes(one: Pass, read: Sequence[Span], longest: float) -> str:
    """Draw one pass from left to right: what was read meanwhile, and below it which layers computed and were waited for."""
    scale = ROW_WIDTH / (longest or 1.0)
    middle, thick = COMPUTE_LANE if read else ONLY_LANE
    inside = ((max(begin, one.begin) - one.begin, min(end, one.end) - one.begin) for _, begin, end in read)
    return _svg(
        ROW_WIDTH,
        ROW_HEIGHT,
        [
            _lane(((begin, end) for begin, end in inside if begin < end), *READ_LANE, READ, scale),
            _lane(_since(one.begin, one.computed), middle, thick, COMPUTE, scale),
            _lane(_since(one.begin, one.waited), middle, THIN, WAIT, scale),
        ],
    )


def stretch_lanes(stretch: Stretch, longest: float) -> str:
    """Draw the mean of some passes as `pass_lanes` does, everything of a kind in one piece."""
    scale = ROW_WIDTH / (longest or 1.0) / stretch.passes
    middle, thick = COMPUTE_LANE if stretch.read_seconds else ONLY_LANE
    computed = stretch.compute_seconds
    return _svg(
        ROW_WIDTH,
        ROW_HEIGHT,
        [
            _lane([(0.0, min(stretch.read_seconds, stretch.seconds))], *READ_LANE, READ, scale),
            _lane([(0.0, computed)], middle, thick, COMPUTE, scale),
            _lane([(computed, computed + stretch.waited_seconds)], middle, THIN, WAIT, scale),
        ],
    )


def sample(kind: str) -> str:
    """Draw a small sample of ``"read"``, ``"wait"`` or ``"compute"`` for a legend."""
    thick, colour = {"read": (10, READ), "wait": (THIN + 1, WAIT), "compute": (10, COMPUTE)}[kind]
    return _svg(12, 12, [_path(["M1 6h10"], colour, thick)])


def _since(start: float, spans: Iterable[Span]) -> Iterator[Interval]:
    return ((begin - start, end - start) for _, begin, end in spans)


def _lane(intervals: Iterable[Interval], y: float, thick: float, colour: str, scale: float) -> str:
    """Draw intervals along a lane; what would be narrower than a third of a pixel is drawn as one with its neighbour."""
    pieces: list[list[float]] = []
    for begin, end in intervals:
        left, right = begin * scale, min(end * scale, ROW_WIDTH)
        if pieces and left - pieces[-1][1] < 1 / 3 and min(right - left, pieces[-1][1] - pieces[-1][0]) < THIN:
            pieces[-1][1] = max(right, pieces[-1][1])
        else:
            pieces.append([left, right])
    gap = 0.5  # between layers that follow each other at once
    shown = ((left, max(right - left - (gap if right - left > THIN else 0), 0.3)) for left, right in pieces if right > left)
    return _path([f"M{left:.1f} {y:g}h{width:.1f}" for left, width in shown], colour, thick)


def _upright(x: float, y: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}v{height:.1f}" if abs(height) >= 0.05 else ""  # noqa: PLR2004  # what rounds to nothing


def _path(strokes: Iterable[str], colour: str, thick: float) -> str:
    drawn = "".join(strokes)
    return f"<path d='{drawn}' stroke='{colour}' stroke-width='{thick:.3g}'/>" if drawn else ""


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    size = f"width='{width:g}' height='{height:g}' viewBox='0 0 {width:g} {height:g}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} fill='none'>{''.join(parts)}</svg>"
