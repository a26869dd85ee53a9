"""What tells the packed layers of one model from all others."""

from __future__ import annotations

import contextlib
import hashlib
import platform

from airllm_nb.compat import versions
from airllm_nb.engine import calibration
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.packed import Int4, layout
from airllm_nb.engine.quantize import Quantized
from airllm_nb.engine.reader import Reader

VERSION = 2
"""Counted up when the same weights would be packed in another way."""
DIGITS = 16
PAGE = 4096


def key(quantized: Quantized, checkpoint: Checkpoint) -> str:
    """Return what tells the packed layers of one model from all others.

    The checkpoint's own tensors, the state of its files and a page from the middle of each tensor, the model's weights as the
    installed transformers names them and makes them, and how this CPU's kernel wants them. (From headers alone, a plan cannot
    know it all.)
    """
    wants = layout() if isinstance(quantized.packing, Int4) else ""
    digest = hashlib.sha256(f"{VERSION} {quantized.packing} {wants} {platform.machine()}".encode())
    digest.update((checkpoint.folder / "config.json").read_bytes())
    if isinstance(quantized.packing, Int4) and quantized.packing.rounding == "gptq":
        digest.update(calibration.TEXT.read_bytes())
    for path, state in sorted(checkpoint.states.items()):
        digest.update(f"{path.name} {state.size} {state.mtime_ns} {state.ctime_ns} {state.inode}".encode())
    for entry in checkpoint.values():
        digest.update(f"{entry.name} {entry.dtype} {entry.shape} {entry.offset}".encode())
    for layer in quantized.original.layers:
        for recipe in layer.group.recipes:
            by = versions.installed_text() if recipe.convert else ""
            digest.update(f"{recipe.sources} {[*recipe.targets]} {by}".encode())
    for layer in quantized.skeleton.layers:
        for weight in layer.group.weights.values():
            digest.update(f"{weight.name} {weight.dtype} {weight.shape} {weight.meant and weight.meant.dtype}".encode())
    if checkpoint.states:
        with contextlib.closing(Reader(checkpoint)) as reader:
            for entry in checkpoint.values():
                page = memoryview(bytearray(min(PAGE, entry.nbytes)))
                reader.read(entry.file, entry.offset + (entry.nbytes - len(page)) // 2, page, keep_cached=True)
                digest.update(page)
    return digest.hexdigest()[:DIGITS]
