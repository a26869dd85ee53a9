"""What can be found out about this environment, and about a model in it, as data: ``%airllm doctor`` prints it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airllm_nb import __version__
from airllm_nb.compat import versions  # facts that need neither torch nor transformers: there may be none
from airllm_nb.engine.interrupts import interrupt_later
from airllm_nb.errors import AirLLMError, MemoryBudgetError, UnsupportedError
from airllm_nb.notebook.imports import import_engine

if TYPE_CHECKING:
    import torch

    from airllm_nb.engine.checkpoint import Checkpoint
    from airllm_nb.engine.sharing import Shared

PACKAGES = ("torch", "safetensors", "huggingface_hub", "tokenizers", "ipywidgets", "IPython", "ipykernel")
NOT_ALWAYS = {"ipywidgets": "only the picture of the layers needs it", "ipykernel": "only a notebook needs it"}
OUR_FAULT = "This is a fault of airllm_nb: please report it with this line."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    ok : bool
        Whether it is as it must be.
    subject : str
        What was looked at, in a word or two.
    text : str
        What was found.
    remedy : str
        What to do; empty if there is nothing to be done.
    """

    ok: bool
    subject: str
    text: str
    remedy: str = ""


def engine() -> list[Finding]:
    """Import all that a model needs; return what fails."""
    found: list[Finding] = []
    with _told(found, "import"):
        import_engine()
    if not found and versions.problem() is None:
        try:
            with interrupt_later():
                import transformers.modeling_utils  # noqa: F401  # transformers itself imports next to nothing
        except Exception as error:  # noqa: BLE001  # whatever it is, nothing can run
            remedy = "Run  %pip install -U transformers  and restart the kernel."
            found.append(Finding(False, "import", f"transformers cannot be imported: {_in_one_line(error)}", remedy))
    return found


def packages() -> list[Finding]:
    """Return the version of everything that matters, and what is missing or too old."""
    least = _least()
    return [
        Finding(True, "Python", platform.python_version()),
        Finding(True, "airllm_nb", __version__),
        transformers(),
        *(_package(name, least.get(name.lower())) for name in PACKAGES),
    ]


def memory(device: torch.device) -> list[Finding]:
    """Return every limit of the memory for weights on a device, and which one decides."""
    from airllm_nb.engine.memory import available, format_size, limits

    least, decisive = available(device)
    sizes = limits() | {decisive: least}
    return [Finding(True, name, format_size(size) + ("  ← decides" if name == decisive else "")) for name, size in sizes.items()]


def threads() -> Finding:
    """Return how many threads compute on the CPU, and why."""
    from airllm_nb.engine.threads import compute_threads

    count, reason = compute_threads()
    return Finding(True, "compute threads", f"{count}  ({reason})")


def where(device: str) -> tuple[list[Finding], torch.device]:
    """Return which device would be chosen, and why; the CPU if the one that is asked for cannot be used."""
    import torch

    from airllm_nb.engine.devices import select_device

    found: list[Finding] = []
    chosen = torch.device("cpu")
    with _told(found, "device"):
        chosen, reason = select_device(device)
        found.append(Finding(True, "device", f"{chosen}  ({reason})"))
    return found, chosen


def inexact() -> list[Finding]:
    """Return what the installed transformers cannot compute exactly, each with the version that can."""
    version = versions.installed()
    needs = [need for need in versions.TABLE if not need.met(version)]
    return [Finding(False, need.what, f"needs {versions.dotted(need.exact)}") for need in needs]


def of_model(
    model: str,
    *,
    device: str,
    dtype: str,
    memory: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    shared: Shared = False,
) -> list[Finding]:
    """Examine a model as far as its headers tell; whatever is wrong with it is a finding, not an exception.

    Parameters
    ----------
    model, device, dtype, memory, revision, trust_remote_code, shared
        As for `LayeredModel.from_pretrained`.
    """
    from airllm_nb.engine import hub
    from airllm_nb.engine.checkpoint import Checkpoint, read_config
    from airllm_nb.engine.gguf_checkpoint import open_checkpoint
    from airllm_nb.engine.planning import named

    found: list[Finding] = []
    with _told(found, "files"):
        folder, headers = hub.locate_headers(named(model)[1], revision=revision)
        if folder.is_dir():  # before its weights are looked at: of a GGUF file both come together
            found += _config(folder, read_config(folder), trust_remote_code=trust_remote_code)
        try:
            checkpoint = open_checkpoint(folder, headers)
        except UnsupportedError:  # of weights in few bits, as was told above
            if not folder.is_dir() or all(one.ok for one in found):
                raise
            checkpoint = Checkpoint(folder, headers)
        found += _place(checkpoint, device, dtype, shared)
        if all(one.ok for one in found):
            options = {"revision": revision, "trust_remote_code": trust_remote_code, "shared": shared}
            found += _fit(model, device=device, dtype=dtype, memory=memory, **options)
    return found


def transformers() -> Finding:
    """Return which transformers is installed, and whether it is one of those that are tested."""
    if (problem := versions.problem()) is not None:
        return Finding(False, "transformers", problem.cause, problem.remedy)
    version, first, last = versions.installed(), versions.TESTED[0], versions.TESTED[-1]
    place = "older" if version < versions.parse(first) else "newer" if version > versions.parse(last) else "inside"
    return Finding(True, "transformers", f"{versions.version_of('transformers')}  (tested: {first} to {last}; this is {place})")


def _package(name: str, least: str | None) -> Finding:
    version = versions.version_of(name)
    if version is None:
        note = f": {NOT_ALWAYS[name]}" if name in NOT_ALWAYS else ""
        return Finding(False, name, f"not installed{note}", f"Run  %pip install {name}  and restart the kernel.")
    if least and versions.parse(version) < versions.parse(least):
        remedy = f'Run  %pip install -U "{name}>={least}"  and restart the kernel.'
        return Finding(False, name, f"{version}, and airllm_nb needs {least}", remedy)
    return Finding(True, name, version)


def _least() -> dict[str, str]:
    """Return the least version of each package that the installed airllm_nb asks for."""
    try:
        requirements = importlib.metadata.requires("airllm_nb") or []
    except importlib.metadata.PackageNotFoundError:  # only copied
        return {}
    found = (re.match(r"([\w-]+)[^;]*>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1].replace("-", "_"): match[2] for match in found if match}


def _config(folder: Path, raw: dict[str, Any], *, trust_remote_code: bool) -> list[Finding]:
    """Tell whether the installed transformers computes this config.json exactly, and whether it is rewritten for that."""
    from airllm_nb.compat import config

    found: list[Finding] = []
    with _told(found, "config.json"), config.quiet():
        found += [Finding(False, "exact", error.cause, error.remedy) for error in config.refusals(raw)]
        if not found:
            config.load_config(folder, raw, trust_remote_code=trust_remote_code)
    if found:
        return found
    installed, kind = versions.installed_text(), raw.get("model_type")
    if trust_remote_code and raw.get("auto_map"):
        return [Finding(True, "exact", "as exact as the checkpoint's own code, which computes it: no guard looks into that")]
    compared = any(need.concerns(part) for need in versions.FAMILIES for part in config.language_parts(raw))
    text = f"{installed} computes {kind} exactly" if compared else f"nothing is known against {kind} on {installed}"
    found.append(Finding(True, "exact", text + ("" if compared else "; it is not among the families that are compared")))
    understood = config.in_words_of(raw, versions.installed())
    if understood is not raw:
        author = f"written by transformers {raw['transformers_version']}, " if raw.get("transformers_version") else ""
        text = f"{author}rewritten in memory for {versions.version_of('transformers')}: {_difference(raw, understood)}"
        found.append(Finding(True, "config.json", text))
    return found


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the fields that a rewritten config.json has in place of others, and those with another value."""
    before, after = _flat(old), _flat(new)
    gone, come = ([name for name in one if name not in other] for one, other in ((before, after), (after, before)))
    other = [name for name in before if name in after and before[name] != after[name]]
    replaced = (
        " → ".join(", ".join(names) for names in (gone, come) if names) if come else ", ".join(f"no {name}" for name in gone)
    )
    return "; ".join(filter(None, (replaced, f"another {', '.join(other)}" if other else "")))


def _flat(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        if name.endswith("_config") and isinstance(value, dict):
            fields |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            fields[prefix + name] = value
    return fields


def _place(checkpoint: Checkpoint, device: str, dtype: str, shared: Shared) -> list[Finding]:
    """Tell which device and dtype would be chosen, and why."""
    from airllm_nb.engine.memory import format_size
    from airllm_nb.engine.planning import choose
    from airllm_nb.engine.sharing import require_shareable

    found, chosen = where(device)
    with _told(found, "shared"):
        require_shareable(checkpoint, chosen, shared)
        with _told(found, "dtype"):
            _, number, (_, reason) = choose(checkpoint, chosen, dtype, shared)
            found.append(Finding(True, "dtype", f"{str(number).removeprefix('torch.')}  ({reason})"))
    return [*found, Finding(True, "weights", f"{format_size(checkpoint.nbytes)} on disk")]


def _fit(model: str, **options: Any) -> list[Finding]:
    """Tell whether a model that can be computed fits, and what of it stays in memory."""
    from airllm_nb import plan
    from airllm_nb.compat.config import quiet
    from airllm_nb.engine.memory import format_size
    from airllm_nb.notebook import report

    found: list[Finding] = []
    with _told(found, "weights"), quiet():
        try:
            decided = plan(model, **options)
        except MemoryBudgetError as error:
            return [Finding(False, "memory", error.cause, error.remedy)]
        used, budget, least = map(format_size, (decided.used_nbytes, decided.budget, decided.least))
        found.append(Finding(True, "memory", f"{used} of {budget}  ({decided.reasons[-1]}); at least {least}"))
        if decided.sharing:
            found.append(Finding(True, "shared", decided.sharing))
        read = f"; {format_size(decided.streamed_nbytes)} read from disk per token" if decided.streamed_nbytes else ""
        found.append(Finding(True, "layers", report.layers(decided) + read))
    return found


@contextlib.contextmanager
def _told(found: list[Finding], subject: str) -> Iterator[None]:
    """Make a finding of what goes wrong, expected or not: a doctor who faints helps nobody."""
    try:
        yield
    except AirLLMError as error:
        found.append(Finding(False, subject, error.cause, error.remedy))
    except Exception as error:  # noqa: BLE001
        found.append(Finding(False, subject, _in_one_line(error), OUR_FAULT))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
