"""``python -m airllm_nb.bench``: measure, print a table, write JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from airllm_nb.bench import machine
from airllm_nb.bench.checkpoint import SHAPES
from airllm_nb.bench.processes import Bench
from airllm_nb.bench.rows import ROWS, named
from airllm_nb.errors import AirLLMError


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows that are named, or all; returns how many could not be measured."""
    parser = argparse.ArgumentParser("python -m airllm_nb.bench", description=main.__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; d is all of d; all if none is named")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "airllm_nb_bench",
                        help="folder for the checkpoints, up to 34 GB, which are made if they are not there")  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, help="one shape for all rows, instead of each row's own")
    parser.add_argument("--tokens", type=int, default=5, help="tokens that count, of each run (5)")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON",
                        help="the Python that has llama-cpp-python, accelerate and airllm, for rows d (this one)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write what was found into this file")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.rows if not named(name)]:
        parser.error(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if chosen.tokens < 1:
        parser.error("at least one token has to count")
    if refused := _refused(chosen.root, chosen.json):
        parser.error(refused)
    rows = [row for name in chosen.rows for row in named(name)] or list(ROWS.values())
    found: dict[str, object] = {"machine": machine.describe()}
    bench, failed = Bench(chosen.root, chosen.tokens, chosen.shape, chosen.peers), 0
    print("| row | measure | goal | measured |\n|---|---|---|---|", flush=True)
    for row in rows:
        line = {"measure": row.what, "goal": row.goal, "at": "least" if row.most else "most", "unit": row.unit}
        try:
            value, details = row.measure(bench)
            found[row.name] = {**line, "value": value, "reached": row.reached(value), "details": details}
            result = f"**{value:.3f}**" if row.reached(value) else f"{value:.3f}"
        except AirLLMError as error:
            failed += 1
            found[row.name] = {**line, "not measured": str(error)}
            result = f"not measured: {error}"
        print(f"| {row.name} | {row.what} | {'≥' if row.most else '≤'} {row.goal} | {result} |", flush=True)
        if chosen.json:  # after each row: the next may be interrupted
            chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return failed


def _refused(root: Path, found: Path | None) -> str:
    """Return why a folder or a file cannot be written, if so: it is told before minutes are spent on measuring."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not any(root.glob("*/config.json")):  # one that has checkpoints need not be written
            with tempfile.TemporaryFile(dir=root):
                pass
    except OSError as error:
        return f"--root {root} cannot be written ({error.strerror})"
    try:
        if found:
            found.open("a", encoding="utf-8").close()  # what an earlier run has left stays until there is more
    except OSError as error:
        return f"--json {found} cannot be written ({error.strerror})"
    return ""


if __name__ == "__main__":
    sys.exit(main())
