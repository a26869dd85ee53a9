"""What is kept of when things happened, and how it is drawn."""

import re
from xml.etree import ElementTree as ET

import pytest
from runs import Run

from airllm_nb.notebook import timechart, timeline
from airllm_nb.notebook.summary import LayerTotals


def test_a_pass_in_detail():
    run = Run(layers=2, streamed=(1,))
    run.go(1, read=0.5, waited=0.25, computed=1.0, other=0.125)
    kept = run.timeline
    [one] = kept.passes
    assert (one.begin, one.end) == (0.0, 2.375)
    assert one.computed == ((0, 0.0, 1.0), (1, 1.25, 2.25))
    assert one.waited == ((1, 1.0, 1.25),)
    assert kept.read == ((1, 0.75, 1.25),)
    assert kept.later == ()


def test_a_wait_too_short_to_notice_is_none():
    run = Run(layers=1, streamed=(0,))
    run.go(1, waited=1e-5)
    assert run.timeline.passes[0].waited == ()
    assert run.timeline.passes[0].computed


@pytest.mark.parametrize(("layers", "passes", "detailed"), [(30, 5, 5), (30, 100, 8), (126, 4096, 6), (1000, 50, 1)])
def test_it_stays_small_and_loses_no_pass(layers, passes, detailed):
    run = Run(layers=layers, streamed=range(0, layers, 40))
    run.go(passes, read=0.5, waited=0.25, computed=1.0)
    kept = run.timeline
    assert len(kept.passes) == detailed
    assert len(kept.later) <= timeline.STRETCHES
    assert detailed + sum(stretch.passes for stretch in kept.later) == passes
    assert len(kept.read) <= (detailed + 1) * layers
    streamed = len(range(0, layers, 40))
    for stretch in kept.later:
        assert stretch.compute_seconds == pytest.approx(stretch.passes * layers)
        assert stretch.waited_seconds == pytest.approx(stretch.passes * streamed * 0.25)
        assert stretch.read_seconds == pytest.approx(stretch.passes * streamed * 0.5)
        assert stretch.seconds == pytest.approx(stretch.compute_seconds + stretch.waited_seconds)


def test_what_goes_on_later_follows_at_once():
    run, whole = Run(layers=2, streamed=(1,)), Run(layers=2, streamed=(1,))
    for passes in (2, 3, 20):
        run.state.recorder.resume()
        run.go(passes, read=0.5, waited=0.25, computed=1.0)
        run.now += 1000.0 * passes  # as long as the user thinks
    assert run.timeline == whole.go(25, read=0.5, waited=0.25, computed=1.0).timeline


def test_an_interrupted_pass_counts_as_far_as_it_came():
    run = Run(layers=4)
    run.begin()
    run.compute(0, computed=1.0)
    run.end(completed=False)
    run.go(20, computed=1.0)
    kept = run.timeline
    assert [one.completed for one in kept.passes] == [False] + [True] * 7
    assert [len(one.computed) for one in kept.passes] == [1] + [4] * 7
    run.begin()
    run.end(completed=False)
    assert run.timeline == kept  # no token came of it


def test_nothing_happened():
    assert Run(layers=4).timeline == timeline.Timeline()


def strokes(svg, colour):
    """Return where each stroke of a colour begins, and how long it is to the right and downwards."""
    path = next((path for path in ET.fromstring(svg) if path.get("stroke") == colour and path.get("d")), None)
    found = re.findall(r"M([-\d.]+) ([-\d.]+)(h|v)([-\d.]+)", path.get("d")) if path is not None else []
    return [(float(x), float(y), float(size) if way == "h" else 0, float(size) if way == "v" else 0) for x, y, way, size in found]


def layer(index, read=0.0, waited=0.0, computed=0.0):
    return LayerTotals(index, f"layer.{index}", 1, not read, 1, 0, 0, read, waited, computed)


def test_bars_are_as_long_as_the_times():
    svg = timechart.layer_bars([layer(0, computed=2.0), layer(1, read=4.0, waited=1.0, computed=1.0)])
    read, computed, waited = (strokes(svg, colour) for colour in (timechart.READ, timechart.COMPUTE, timechart.WAIT))
    unit = computed[1][3]
    assert [bar[3] / unit for bar in computed] == pytest.approx([2, 1], abs=0.02)
    assert [bar[3] / unit for bar in read] == pytest.approx([-4], abs=0.02)  # upwards
    assert waited[0][3] == pytest.approx(unit, abs=0.1)
    assert waited[0][1] == pytest.approx(computed[1][1] + unit, abs=0.1)  # below what computed


def test_bars_stand_on_the_ground_where_nothing_was_read():
    svg = timechart.layer_bars([layer(index, computed=1.0) for index in range(3)])
    assert not strokes(svg, timechart.READ)
    assert all(height < 0 for _, _, _, height in strokes(svg, timechart.COMPUTE))


def test_lanes_show_what_happened_in_this_pass_alone():
    run = Run(layers=2, streamed=(1,))
    run.go(2, read=1.0, waited=0.5, computed=1.0)
    kept = run.timeline
    svg = timechart.pass_lanes(kept.passes[1], kept.read, longest=2.5)
    second = timechart.ROW_WIDTH / 2.5
    assert [x for x, *_ in strokes(svg, timechart.READ)] == pytest.approx([0.5 * second], abs=0.1)
    assert [x for x, *_ in strokes(svg, timechart.COMPUTE)] == pytest.approx([0, 1.5 * second], abs=0.1)
    assert [x for x, *_ in strokes(svg, timechart.WAIT)] == pytest.approx([second], abs=0.1)


def contrast(first, second):
    def luminance(colour):
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colour", [timechart.READ, timechart.WAIT, timechart.COMPUTE])
@pytest.mark.parametrize("page", ["#ffffff", "#111111", "#000000"])
def test_colours_can_be_seen_on_light_and_dark(colour, page):
    assert contrast(colour, page) >= 3
