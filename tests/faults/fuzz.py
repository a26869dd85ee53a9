"""A small fuzzer, guided by coverage: it changes the inputs that it has, and keeps what reaches a step that none has reached.

Its own, and not a package: atheris is bound to single versions of Python and takes the whole process. For parsers of some
hundred lines, tracing their lines costs little.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

JUNK = [
    None, True, False, -1, 0, 1, 1.5, 2**31, 2**63, 10**30, "", "x", "\ud800", [], {}, [1], [0, 0], {"a": 1}, float("nan"),
    float("inf"),
]  # fmt: skip


class Coverage:
    """Which steps from line to line, within some files, a call has taken."""

    def __init__(self, modules: list[Any]) -> None:
        self._files = {module.__file__ for module in modules}
        self.steps: set[tuple[str, int, int]] = set()
        self._last = 0

    def _trace(self, frame: Any, _event: str, _arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: Any, event: str, _arg: Any) -> Any:
        if event == "line":
            self.steps.add((frame.f_code.co_filename, self._last, frame.f_lineno))
            self._last = frame.f_lineno
        return self._line

    def of(self, call: Callable[[], object]) -> set[tuple[str, int, int]]:
        """Return the steps of a call; what it raises is raised."""
        self.steps, self._last = set(), 0
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(before)
        return self.steps


def fuzz(
    target: Callable[[Any], object], corpus: list[Any], mutate: Callable[[Any, random.Random, list[Any]], Any],
    modules: list[Any], *, seconds: float, seed: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Call `target` with ever new inputs for some seconds. What it raises is a fault, and is raised with the input.

    Returns
    -------
    int, int, int
        How many inputs were tried, how many were kept, and how many steps they reach.
    """
    rng, coverage = random.Random(seed), Coverage(modules)
    known: set[tuple[str, int, int]] = set()
    corpus, tried, end = list(corpus), 0, time.monotonic() + seconds
    for given in corpus:
        known |= coverage.of(lambda given=given: target(given))
    while time.monotonic() < end:
        given = mutate(copy.deepcopy(rng.choice(corpus)), rng, corpus)
        tried += 1
        try:
            steps = coverage.of(lambda given=given: target(given))
        except BaseException as error:
            raise AssertionError(f"seed {seed}, input {given!r}: {type(error).__name__}: {error}") from error
        if not steps <= known:
            known |= steps
            corpus.append(given)
    return tried, len(corpus), len(known)


def mutate_json(value: Any, rng: random.Random, corpus: list[Any], names: list[str]) -> Any:
    """Change a JSON value at one to four places: another value, a new name, a part of another input."""
    for _ in range(rng.randint(1, 4)):
        holders = [holder for holder in _holders(value) if holder]
        if not holders:
            return rng.choice(JUNK)
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match rng.randrange(5):
            case 0:
                holder[key] = copy.deepcopy(rng.choice(JUNK))
            case 1:
                other = rng.choice([*_holders(rng.choice(corpus)), *JUNK])
                holder[key] = copy.deepcopy(other)
            case 2 if isinstance(holder, dict):
                holder[rng.choice(names)] = copy.deepcopy(rng.choice([*JUNK, holder[key]]))
            case 3:
                del holder[key]
            case _ if type(holder[key]) is int:
                holder[key] += rng.choice([-1, 1, 2, 8, -8, 1 << 32])
    return value


def mutate_bytes(data: bytes, rng: random.Random, corpus: list[bytes]) -> bytes:
    """Flip, cut, double or join pieces."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        stop = min(len(changed), start + rng.randint(1, 16))
        match rng.randrange(4):
            case 0 if start < len(changed):
                changed[start] ^= 1 << rng.randrange(8)
            case 1:
                del changed[start:stop]
            case 2:
                changed[start:start] = changed[start:stop] * rng.choice([1, 2, 1000])
            case _:
                other = rng.choice(corpus)
                changed[start:stop] = other[start:stop]
    return bytes(changed)


def _holders(value: Any) -> list[Any]:
    """Return all objects and arrays in a JSON value."""
    if isinstance(value, dict | list):
        return [value, *(held for part in (value.values() if isinstance(value, dict) else value) for held in _holders(part))]
    return []


def as_header(value: Any) -> bytes:
    """Return the first bytes of a safetensors file with such a header."""
    raw = json.dumps(value).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw
