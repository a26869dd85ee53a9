"""Damage to the safetensors files and their index."""

from __future__ import annotations

import json
import os
import struct

import torch
from damage import INDEX, change_header, change_json, flip, header_of, kind, shards, write
from safetensors.torch import load_file, save_file


@kind
def truncated(folder, rng, seed):
    path = rng.choice(shards(folder))
    size = path.stat().st_size
    os.truncate(path, [0, 7, 8, 9, size - 1][seed] if seed < 5 else rng.randrange(size))


@kind
def longer(folder, rng, seed):
    with rng.choice(shards(folder)).open("ab") as file:
        file.write(rng.randbytes(1 << seed))


@kind(other_model=True)
def header_bits(folder, rng, seed):
    path = rng.choice(shards(folder))
    flip(path, rng, 8, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0], 1 + seed % 3)


@kind
def header_length_bits(folder, rng, seed):
    flip(rng.choice(shards(folder)), rng, 0, 8)


@kind
def header_length_huge(folder, rng, seed):
    path = rng.choice(shards(folder))
    size = path.stat().st_size
    length = [1 << 60, 1 << 63, (1 << 64) - 1, 1 << 31, 1 << 32, size, size - 7, size - 8, 50_000_000, 99_000_000][seed]
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    if seed >= 8:
        os.truncate(path, 10 << 30)  # with holes: it takes no room


@kind
def header_of_many_entries(folder, rng, seed):
    """A header that is as long as allowed, or nearly, and good JSON."""
    path = rng.choice(shards(folder))
    entry = ['"%d":{}', '"%d":[]', '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', '"%d":"x"', '"%d":[[]]'][seed % 5]
    size = 31 << 20 if seed == 9 else 1 << 20
    raw = "{" + ",".join(entry % number for number in range(size // (len(entry) + 6))) + "}"
    write(path, raw.encode(), b"")


@kind
def offsets_overlap(folder, rng, seed):
    def change(header, name):
        begin, end = header[name]["data_offsets"]
        shift = rng.choice([-1, 1]) * (1 + 2 * seed if seed % 2 else 128 * (1 + seed))  # odd bytes, or whole rows
        header[name]["data_offsets"] = [begin + shift, end + shift]

    change_header(folder, rng, change)


@kind
def offsets_out_of_range(folder, rng, seed):
    def change(header, name):
        offsets = header[name]["data_offsets"]
        number = rng.randrange(2)
        offsets[number] = [-1, 10**6, 1 << 32, 1 << 60, 1 << 63, 1 << 64, 10**30, -(1 << 63), 1.5, None][seed]

    change_header(folder, rng, change)


@kind(other_model=True)
def offsets_swapped(folder, rng, seed):
    """Two tensors of one size change places: it is another model, and nobody can tell."""

    def change(header, name):
        same = [other for other in header if other != "__metadata__" and header[other]["shape"] == header[name]["shape"]]
        other = rng.choice(same)
        header[name]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[name]["data_offsets"]

    change_header(folder, rng, change)


@kind(other_model=True)
def wrong_dtype(folder, rng, seed):
    dtype = ["F16", "F32", "I16", "U8", "F8_E4M3", "bf16", "", None, 7, "F4"][seed]
    change_header(folder, rng, lambda header, name: header[name].update(dtype=dtype))


@kind
def wrong_shape(folder, rng, seed):
    def change(header, name):
        shape = header[name]["shape"]
        header[name]["shape"] = [
            [*shape, 1], [*shape, 2], shape[:-1], [-size for size in shape], [0, *shape], "64", None, [1 << 62] * 3,
            [1] * 100_000 + shape, [(1 << 62) + 1] * 1_000_000,
        ][seed]  # fmt: skip

    change_header(folder, rng, change)


@kind
def header_entries(folder, rng, seed):
    """Entries that are no entries, or have surplus or missing parts."""

    def change(header, name):
        entry = header[name]
        header[name] = [
            None, [], "x", {}, {"dtype": entry["dtype"]}, [entry], entry["data_offsets"], {**entry, "data_offsets": [0]},
            {**entry, "data_offsets": {"begin": 0, "end": 1}}, {**entry, "shape": {"0": 64}},
        ][seed]  # fmt: skip

    change_header(folder, rng, change)


@kind
def header_is_no_object(folder, rng, seed):
    path = rng.choice(shards(folder))
    raw = [b"", b"[]", b"null", b"7", b'"x"', b"{", b"{}", b"\xff\xfe{}", b" " * 1000, b"\0" * 1000][seed]
    write(path, raw, header_of(path)[1])


@kind(other_model=True)
def nan_weights(folder, rng, seed):
    path = rng.choice(shards(folder))
    tensors = load_file(path)
    weight = tensors[rng.choice(sorted(tensors))]
    values = [float("nan"), float("inf"), -float("inf"), 1e38, -0.0]
    weight.view(-1)[rng.randrange(weight.numel())] = values[seed % 5]
    save_file(tensors, path, {"format": "pt"})


@kind(other_model=True)
def data_bits(folder, rng, seed):
    path = rng.choice(shards(folder))
    size = path.stat().st_size
    flip(path, rng, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0], size, 1 + seed)


@kind(other_model=True)
def zeroed_blocks(folder, rng, seed):
    path = rng.choice(shards(folder))
    data = bytearray(path.read_bytes())
    start = rng.randrange(0, len(data), 512)
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


@kind
def missing_tensor(folder, rng, seed):
    path = rng.choice(shards(folder))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    if seed % 2:
        change_json(folder / INDEX, lambda index: index["weight_map"].pop(name) and None)


@kind
def extra_tensor(folder, rng, seed):
    path = rng.choice(shards(folder))
    tensors = load_file(path)
    layer = rng.randrange(4)
    name = [
        "x", "model.layers.4.mlp.up_proj.weight", f"model.layers.{layer}.mlp.up_proj.bias", "model.layers.-1.mlp.up_proj.weight",
        f"model.layers.{layer}.mlp.up_proj.weight ", f"model.layers.0{layer}.mlp.up_proj.weight", "\N{SNOWMAN}", "../x", "a\nb",
        "model.norm",
    ][seed]  # fmt: skip
    save_file(tensors | {name: torch.ones(3)}, path, {"format": "pt"})
    if seed % 2:
        change_json(folder / INDEX, lambda index: index["weight_map"].update({name: path.name}))


@kind
def index_disagrees(folder, rng, seed):
    names = [path.name for path in shards(folder)]

    def change(index):
        tensors = index["weight_map"]
        name = rng.choice(sorted(tensors))
        other = rng.choice([file for file in names if file != tensors[name]])
        if seed < 4:
            tensors[name] = other
        elif seed < 6:
            tensors[name] = "model-00009-of-00009.safetensors"
        elif seed < 8:
            tensors["model.layers.9.mlp.up_proj.weight"] = other
        else:
            index["weight_map"] = {key: file for key, file in tensors.items() if file != other}

    change_json(folder / INDEX, change)


@kind
def index_is_none(folder, rng, seed):
    content = [[], None, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}, 7, "x"]
    if seed == 9:
        (folder / INDEX).unlink()
    else:
        (folder / INDEX).write_text(json.dumps(content[seed]))


@kind(never_right=True)
def path_traversal(folder, rng, seed):
    """The index names files elsewhere; in three cases they are there, and hold what they should."""
    path = rng.choice(shards(folder))
    outside = folder.parent / "outside.safetensors"
    bad = [
        "../outside.safetensors", str(outside), "./../outside.safetensors", "", ".", "..", "a/b", "\0", "x" * 300, f"{path.name}/"
    ]  # fmt: skip
    if seed < 3:
        path.rename(outside)

    def change(index):
        tensors = index["weight_map"]
        index["weight_map"] = {name: bad[seed] if file == path.name else file for name, file in tensors.items()}

    change_json(folder / INDEX, change)


@kind
def shards_mixed_up(folder, rng, seed):
    first, second = rng.sample(shards(folder), 2)
    if seed < 5:
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    else:
        first.write_bytes(second.read_bytes())
