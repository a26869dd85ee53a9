"""Ways to damage a checkpoint before it is loaded, by name: what they share. The ways are in the `damaged_` modules.

Each takes the folder, a random number generator, and the number of the case, 0 to 9.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

INDEX = "model.safetensors.index.json"
ALL_JSON = ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
KINDS: dict[str, Callable] = {}
OTHER_MODELS: set[str] = set()
"""Kinds after which the files may describe another model, as whole as the first: right is then what transformers computes."""
NEVER_RIGHT: set[str] = set()
"""Kinds that must be refused even if the answer would be right: what it is read from lies elsewhere."""
JUNK = [None, True, False, -1, 0, 1.5, 10**9, 10**30, "", "x", [], {}, [1], {"a": 1}, float("nan"), float("inf")]
"""What may stand in a JSON file where something else should."""


def kind(function=None, *, other_model=False, never_right=False):
    """Register a kind of damage."""

    def register(function):
        KINDS[function.__name__] = function
        if other_model:
            OTHER_MODELS.add(function.__name__)
        if never_right:
            NEVER_RIGHT.add(function.__name__)
        return function

    return register(function) if function else register


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def change_header(folder, rng, change):
    """Rewrite one shard with a header that `change(header, name)` has changed at a tensor."""
    path = rng.choice(shards(folder))
    header, data = header_of(path)
    name = choose_tensor(header, rng)
    changed = change(header, name)
    write(path, header if changed is None else changed, data)


def change_json(path, change):
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def choose_tensor(header, rng):
    return rng.choice([name for name in header if name != "__metadata__"])


def flip(path, rng, start, stop, count=1):
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
