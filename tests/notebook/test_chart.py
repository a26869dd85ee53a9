"""A chart is static HTML that an untrusted page shows, and says the same in words."""

import base64
from html import escape
from xml.etree import ElementTree as ET

from IPython.core.formatters import DisplayFormatter

from airllm_nb.notebook.chart import BAR, GOOD, INK, WRONG, bars

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = {"one <b>": {"a": (2094.13, "x < y"), "longer label": (10.0, "")}, "two": {"b": (0.0, ""), "c": (None, "no")}}


def drawn(chart):
    data = chart.html.partition("base64,")[2].partition('"')[0]
    return ET.fromstring(base64.b64decode(data))


def test_it_is_shown_as_an_image_in_html_and_as_words():
    chart = bars(GROUPS, "ms & more", unit="ms")
    data, _ = DisplayFormatter().format(chart)
    assert data["text/html"].startswith("<img ")
    assert escape(data["text/plain"]) in data["text/html"]  # for whoever cannot see it
    assert data["text/plain"].splitlines() == [
        "one <b>", "  a             2094 ms · x < y", "  longer label  10.0 ms", "two", "  b  0 ms", "  c  fails · no",
        "(ms & more)",
    ]  # fmt: skip
    words = [text.text for text in drawn(chart).iter(f"{SVG}text")]
    assert {"one <b>", "longer label", "2094 ms · x < y", "fails · no", "ms & more"} <= set(words)


def test_lengths_share_one_scale_and_end_within_the_picture():
    picture = drawn(bars(GROUPS, ""))
    rects = list(picture.iter(f"{SVG}rect"))
    widths = [float(rect.get("width")) for rect in rects]
    assert widths == [max(widths), 2, 2, 2]
    assert float(rects[0].get("x")) + widths[0] <= float(picture.get("width")) - 200  # where the words stand
    assert float(rects[0].get("x")) >= 7 * len("longer label")


def test_red_is_what_is_wrong():
    colours = [[rect.get("fill") for rect in drawn(bars(GROUPS, "", wrong=wrong)).iter(f"{SVG}rect")] for wrong in (False, True)]
    assert colours == [[BAR, BAR, BAR, INK], [WRONG, WRONG, GOOD, INK]]
