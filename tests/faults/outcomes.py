"""What became of each case, as a table: printed at the end of a run of pytest, and written down in README.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

PROPERTY = "faults"
SOAK = "soak"


class Tally:
    """The outcomes of the cases of one kind of fault."""

    def __init__(self, suite: str, kind: str) -> None:
        self.suite, self.kind = suite, kind
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []

    def add(self, outcome: str, said: str, where: object) -> None:
        """Count a case."""
        self.counts[outcome] += 1
        if outcome == "lost":
            self.lost.append(f"{self.kind}[{where}]: {said}")

    def close(self, record_property) -> None:
        """Tell the table, and fail if a case was lost."""
        record_property(
            PROPERTY, json.dumps([self.suite, self.kind, self.counts["refused"], self.counts["right"], len(self.lost)])
        )
        assert not self.lost, "\n".join(self.lost)


def table(rows: Iterable[tuple[str, str, int, int, int]]) -> list[str]:
    """Return the lines of a Markdown table, with a line for all of each suite."""
    rows = sorted(map(tuple, rows))
    lines = ["| fault | tried | refused clearly | right | lost |", "|---|--:|--:|--:|--:|"]
    for suite in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == suite]
        lines += [f"| {kind} | {sum(counts)} | {' | '.join(map(str, counts))} |" for _, kind, *counts in own]
        total = [sum(row[column] for row in own) for column in (2, 3, 4)]
        lines.append(f"| **{suite}: {len(own)} kinds** | **{sum(total)}** | " + " | ".join(f"**{n}**" for n in total) + " |")
    return lines


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table, and what the soak said; imported by tests/conftest.py: who prints may have loaded no other."""
    reports = [report for group in ("passed", "failed") for report in terminalreporter.stats.get(group, [])]
    for line in [value for report in reports for name, value in report.user_properties if name == SOAK]:
        terminalreporter.write_sep("=", "soak")
        terminalreporter.write_line(line)
    rows = [json.loads(value) for report in reports for name, value in report.user_properties if name == PROPERTY]
    if rows:
        terminalreporter.write_sep("=", "faults")
        for line in table(rows):
            terminalreporter.write_line(line)
