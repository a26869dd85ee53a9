"""The Chinese README says what the English one says: the same sections, commands, links and rows, in the same order."""

import re
from collections import Counter

import pytest
from refresh_readme import README, README_ZH

BLOCK = re.compile(r"^```.*?^```$|^ {4}[^\n]+$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)]+)\)|<img [^>]*src=\"([^\"]+)\"")


def unwrapped(text):
    """Join the lines of a paragraph, in which a command may be broken."""
    return re.sub(r"(?<!\n)\n(?![\n|#-])", " ", text)


def sections(path):
    """Split a README at its headings: (level of the heading, what stands below it) each, without the blocks of code."""
    text = BLOCK.sub("\n", path.read_text(encoding="utf-8"))
    marks, bodies = re.findall(r"^(#+) ", text, re.MULTILINE), re.split(r"^#+ .*$", text, flags=re.MULTILINE)[1:]
    return [(len(mark), unwrapped(body)) for mark, body in zip(marks, bodies, strict=True)]


ENGLISH, CHINESE = sections(README), sections(README_ZH)
NUMBERS = range(len(ENGLISH))


def test_the_headings_are_the_same_in_number_and_level():
    assert [level for level, _ in CHINESE] == [level for level, _ in ENGLISH]


def test_the_blocks_of_code_are_the_same():
    blocks = [BLOCK.findall(path.read_text(encoding="utf-8")) for path in (README, README_ZH)]
    assert blocks[0], "no block of code is found"
    assert blocks[1] == blocks[0]


@pytest.mark.parametrize("number", NUMBERS)
def test_each_section_has_the_same_commands(number):
    english, chinese = (Counter(INLINE.findall(text[number][1])) for text in (ENGLISH, CHINESE))
    assert chinese == english


@pytest.mark.parametrize("number", NUMBERS)
def test_each_section_has_the_same_links_rows_and_points(number):
    english, chinese = (text[number][1] for text in (ENGLISH, CHINESE))
    links = [Counter(first or second for first, second in LINK.findall(body)) for body in (english, chinese)]
    links[0][README_ZH.name] -= links[0][README_ZH.name]
    links[1][README.name] -= links[1][README.name]
    assert +links[1] == +links[0]
    for start in (r"^\| ", r"^- ", r"^\*\*"):
        assert len(re.findall(start, chinese, re.MULTILINE)) == len(re.findall(start, english, re.MULTILINE)), start


def test_they_lead_to_each_other():
    assert f"({README_ZH.name})" in README.read_text(encoding="utf-8").split("\n## ")[0]
    assert f"({README.name})" in README_ZH.read_text(encoding="utf-8").split("\n## ")[0]
