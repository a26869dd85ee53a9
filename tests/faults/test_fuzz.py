"""Half a minute each of ever new headers and config.json: refused as it should be, or what safetensors itself makes of it."""

import contextlib
import itertools
import json
import os
import random
from pathlib import Path

import safetensors
import torch
from fuzz import as_header, fuzz, mutate_bytes, mutate_json
from safetensors.torch import save
from tiny import CONFIGS

from airllm_nb.compat import classic as compat_classic
from airllm_nb.compat import config, wellformed
from airllm_nb.engine import checkpoint
from airllm_nb.errors import CheckpointError, UnsupportedError

SECONDS = float(os.environ.get("AIRLLM_NB_FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("AIRLLM_NB_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
FILES = [
    save({"a": torch.arange(6).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, {"format": "pt"}),
    save({"weight": torch.zeros(2, 2)}),
    save({}),
]


def parse(data):
    """Refuse a file, or find in it what safetensors finds."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data):
        return  # refused before it is parsed
    try:
        entries = checkpoint.parse_header(data[:start], len(data), Path("model.safetensors"))
    except CheckpointError:
        return
    end = start
    for entry in entries:
        assert entry.offset == end
        end += entry.nbytes
    assert end == len(data)
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:  # it refuses more, as metadata that are no text
        return
    ours = {entry.name: (list(entry.shape), data[entry.offset :][: entry.nbytes]) for entry in entries}
    assert ours == {name: (found["shape"], bytes(found["data"])) for name, found in theirs.items()}


def change_file(data, rng, corpus):
    """Change the bytes, or the header as JSON."""
    start = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, corpus)
    try:
        header = json.loads(data[8:start])
        others = [json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")]) for one in FILES]
        return as_header(mutate_json(header, rng, others, ["a", "b", "__metadata__", "dtype", "shape"])) + data[start:]
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng, corpus)


def test_headers():
    tried, kept, steps = fuzz(parse, FILES, change_file, [checkpoint], seconds=SECONDS, seed=SEED)
    assert tried > 100
    assert kept > len(FILES), (tried, steps)


def refuse(raw):
    with contextlib.suppress(UnsupportedError):
        config.refuse(raw)


def test_configs():
    corpus = [dict(raw) for raw in CONFIGS.values()]
    names = sorted(
        {*itertools.chain(*corpus), *wellformed.OBJECTS, *wellformed.SIZES, *wellformed.NUMBERS, "rope_theta", "a_config"}
    )
    names += ["quantization_config", "partial_rotary_factor", "rope_type", "type", "layer_types", "sliding_window", "factor"]

    def change(raw, rng, corpus):
        changed = mutate_json(raw, rng, corpus, names)
        return changed if isinstance(changed, dict) else {"model_type": changed}

    modules = [config, wellformed, compat_classic]
    tried, kept, steps = fuzz(refuse, corpus, change, modules, seconds=SECONDS, seed=SEED)
    assert tried > 100
    assert kept > len(corpus), (tried, steps)
