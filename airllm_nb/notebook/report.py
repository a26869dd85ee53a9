"""What `%airllm load`, `status` and `devices` print: plain text that reads well and can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airllm_nb import demo
from airllm_nb.engine.home import cache_home
from airllm_nb.engine.memory import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airllm_nb import LayeredModel
    from airllm_nb.engine.devices import DeviceInfo
    from airllm_nb.engine.kept import Kept
    from airllm_nb.engine.plan import Plan


def one_line(model: LayeredModel) -> str:
    """Say what is loaded: ``SmolLM2-135M-Instruct · 30 layers, all resident · cpu · float32 · 538 MB · demo from the hub``."""
    dtype = str(model.dtype).removeprefix("torch.")
    shared = f", {format_size(model.plan.shared_nbytes)} shared" if model.plan.shared_nbytes else ""
    parts = [model.name, layers(model), model.device, dtype, f"{format_size(model.plan.total_nbytes)}{shared}"]
    return " · ".join(map(str, filter(None, [*parts, demo.origin(model.path)])))


def layers(model: LayeredModel | Plan) -> str:
    """Say how many layers there are, and which of them stay."""
    stay = sum(layer.resident for layer in model.layers)
    return count_layers(stay, len(model.layers) - stay)


def count_layers(resident: int, streamed: int) -> str:
    """Say it of numbers."""
    if not streamed:
        return f"{resident} layers, all resident"
    total = resident + streamed
    return f"{total} layers, {resident} resident, {streamed} streamed" if resident else f"{total} layers, all streamed"


def plan(decided: Plan, *, write: bool = True) -> str:
    """Describe a plan, and how fast it will run if that can be told; `write` as for `Plan.predict`."""
    prediction = decided.predict(write=write)
    return f"{decided}\nspeed     {prediction}" if prediction else str(decided)


def status(model: LayeredModel) -> str:
    """Describe the loaded model, where it computes and why, what stays in memory, and how fast it runs."""
    context = f"{model.context_length} tokens" if model.context_length else "no fixed length"
    return f"{plan(model.plan, write=False)}\ncontext   {context}"


def kept(entries: Sequence[Kept]) -> str:
    """List what was written to the disk."""
    if not entries:
        return f"Nothing is kept in {cache_home()}."
    sizes = [format_size(entry.nbytes) for entry in entries]
    width = max(map(len, sizes))
    lines = [f"{size:>{width}}  {entry.text}" for size, entry in zip(sizes, entries, strict=True)]
    total = format_size(sum(entry.nbytes for entry in entries))
    return "\n".join([*lines, f"{total} in {cache_home()}; %airllm cache --clear removes it, --clear NAME a part of it"])


def cleared(entries: Sequence[Kept]) -> str:
    """Say what was removed from the disk."""
    if not entries:
        return "Nothing of that name is kept; %airllm cache lists what is."
    return f"Removed: {'; '.join(entry.name for entry in entries)} ({format_size(sum(entry.nbytes for entry in entries))})."


def devices(infos: tuple[DeviceInfo, ...]) -> str:
    """List the devices, and for each one that cannot be used the reason. A missing GPU is no fault, and so has no ✗."""
    name = max(len(info.name) for info in infos) + 2
    label = max(len(info.label) for info in infos) + 2
    return "\n".join(f"{'✓' if info.usable else '-'} {info.name:{name}}{info.label:{label}}{info.reason}" for info in infos)
