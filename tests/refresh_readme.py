"""Write the table that the guards use into both READMEs: ``python tests/refresh_readme.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from airllm_nb.compat import versions

BETWEEN = re.compile(r"(?<=<!-- versions -->\n).*?(?=<!-- /versions -->)", re.DOTALL)


class Words(NamedTuple):
    """What the table says in one language; models and features are named as in the messages, in English."""

    exact_from: str
    and_before: str
    refused: str


README = Path(__file__).parent.parent / "README.md"
README_ZH = README.with_suffix(".zh-CN.md")
READMES = {
    README: Words("exact from", ", and before ", "refused"),
    README_ZH: Words("自此版本起精确", "，以及早于 ", "拒绝"),  # noqa: RUF001  # a Chinese comma
}


def table(words: Words) -> str:
    """Return the table as Markdown: one row for each family and feature, one column for each version that is tested."""
    return "\n".join(_rows(words)) + "\n"


def _rows(words: Words) -> Iterator[str]:
    yield f"| | {words.exact_from} | {' | '.join(versions.TESTED)} |"
    yield "|---" * (len(versions.TESTED) + 2) + "|"
    for need in versions.TABLE:
        since = versions.dotted(need.exact) + (f"{words.and_before}{versions.dotted(need.refused)}" if any(need.refused) else "")
        cells = ["✓" if need.met(_version(text)) else words.refused for text in versions.TESTED]
        yield f"| {need.what} | {since} | {' | '.join(cells)} |"


def _version(text: str) -> versions.Version:
    return tuple(map(int, text.split(".")))


if __name__ == "__main__":
    for path, words in READMES.items():
        path.write_text(BETWEEN.sub(table(words), path.read_text(encoding="utf-8")), encoding="utf-8")
