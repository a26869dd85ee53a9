"""What ``%airllm doctor`` prints: whether a model can run here, then everything that this depends on."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from airllm_nb.compat import versions
from airllm_nb.notebook import findings
from airllm_nb.notebook.findings import Finding

WIDTH = 100


def text(model: str | None, *, device: str, **options: Any) -> str:
    """Examine this environment, and a model in it; the first lines are the answer.

    Parameters
    ----------
    model : str or None
        Hub id, local folder, or ``"demo"``; without one, only the environment is examined.
    device, **options
        What `findings.of_model` takes.
    """
    if broken := findings.engine():
        return "\n\n".join([_answer(model, broken), _section("versions", findings.packages())])
    found = [findings.transformers()]
    blocks = _environment(device)
    if model is None:
        found += findings.where(device)[0]
    elif found[0].ok:  # or nothing is worth fetching
        found = findings.of_model(model, device=device, **options)
        blocks.insert(0, _section("model", found))
    return "\n\n".join([_answer(model, found), *blocks])


def _answer(model: str | None, found: Sequence[Finding]) -> str:
    wrong = next((one for one in found if not one.ok), None)
    if wrong is not None:
        who = f"{model} cannot" if model else "No model can"
        answer = Finding(False, "", f"{who} run here: {wrong.text}", wrong.remedy)
    elif model is not None:
        answer = Finding(True, "", f"{model} can run here.")
    else:
        answer = Finding(True, "", "Models can run here; %airllm doctor MODEL tells of a certain one.")
    return "\n".join(_marked(answer, 0))


def _environment(device: str) -> list[str]:
    from airllm_nb.engine.devices import devices
    from airllm_nb.notebook import report

    blocks = [
        _section("versions", findings.packages()),
        f"devices\n{report.devices(devices())}",
        _section("processor", [findings.threads()]),
        _section("memory", findings.memory(findings.where(device)[1])),
    ]
    if versions.problem() is None and (inexact := findings.inexact()):
        blocks.append(_section(f"refused, because {versions.installed_text()} does not compute it exactly", inexact))
    return blocks


def _section(title: str, found: Sequence[Finding]) -> str:
    width = max(len(one.subject) for one in found) + 2
    return "\n".join([title, *(line for one in found for line in _marked(one, width))])


def _marked(one: Finding, width: int) -> Iterator[str]:
    """Yield the lines of a finding: a mark, what was looked at, what was found, and below it what to do."""
    indent = " " * (2 + width)
    yield from _wrapped(f"{'✓' if one.ok else '✗'} {one.subject:{width}}", one.text, indent)
    if one.remedy:
        yield from _wrapped(f"{indent}→ ", one.remedy, f"{indent}  ")


def _wrapped(first: str, text: str, indent: str) -> list[str]:
    """Break a text into lines, but never a command within it, which stands between double spaces: it is there to be copied."""
    whole = re.sub(r"(?<=  )%\S.*?(?=  )", lambda command: command[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        whole, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\0", " ") for line in lines]
