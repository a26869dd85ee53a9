"""Write the table that the guards use into the README: ``python tests/refresh_readme.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from airllm_nb.compat import versions

README = Path(__file__).parent.parent / "README.md"
BETWEEN = re.compile(r"(?<=<!-- versions -->\n).*?(?=<!-- /versions -->)", re.DOTALL)


def table() -> str:
    """Return the table as Markdown: one row for each family and feature, one column for each version that is tested."""
    return "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    yield f"| | exact from | {' | '.join(versions.TESTED)} |"
    yield "|---" * (len(versions.TESTED) + 2) + "|"
    for need in versions.TABLE:
        since = versions.dotted(need.exact) + (f", and before {versions.dotted(need.refused)}" if any(need.refused) else "")
        cells = ["✓" if need.met(_version(text)) else "refused" for text in versions.TESTED]
        yield f"| {need.what} | {since} | {' | '.join(cells)} |"


def _version(text: str) -> versions.Version:
    return tuple(map(int, text.split(".")))


if __name__ == "__main__":
    README.write_text(BETWEEN.sub(table(), README.read_text(encoding="utf-8")), encoding="utf-8")
