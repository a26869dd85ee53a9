"""Takes each guard away in turn, and shows that the suite then fails: python tests/faults/disable_guards.py [part of a name]."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from guards import GUARDS, VARIABLE

HERE = Path(__file__).parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-pno:cacheprovider", "--tb=no"]


def main() -> int:
    wanted = {name: guard for name, guard in GUARDS.items() if sys.argv[1:] == [] or sys.argv[1] in name}
    unneeded = []
    print("| guard | stands in | without it fails |\n|---|---|---|")
    for name, guard in wanted.items():
        run = subprocess.run(
            [*PYTEST, HERE / guard.file, "-k", guard.tests],
            env=os.environ | {VARIABLE: name, "AIRLLM_NB_PATIENCE": "20"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        failed = run.returncode == 1
        print(f"| {name} | `{guard.module}` | {f'`{guard.file}` `{guard.tests}`' if failed else '**nothing**'} |", flush=True)
        if not failed:
            unneeded.append(name)
            print(run.stdout[-2000:], run.stderr[-2000:], file=sys.stderr)
    return len(unneeded)


if __name__ == "__main__":
    raise SystemExit(main())
