"""Damage that any of the files can have: links, pipes, sizes, and JSON that is none."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from damage import ALL_JSON, INDEX, change_header, choose_tensor, header_of, kind, shards, write


@kind
def symlink_loops(folder, rng, seed):
    target = folder if seed == 9 else folder / [*ALL_JSON, *(path.name for path in shards(folder))][seed % 8]
    if target.is_dir():
        target.rename(folder.parent / "moved")
    else:
        target.unlink()
    other = target.with_name("loop")
    target.symlink_to(other)
    other.symlink_to(target)


@kind
def special_files(folder, rng, seed):
    """What is no file: opening a pipe would wait for ever, and zeros never end."""
    target = folder / ([shards(folder)[seed % 3].name] if seed < 5 else ALL_JSON)[(seed - 5) % 5 if seed >= 5 else 0]
    target.unlink()
    what = seed % 5
    if what == 0:
        os.mkfifo(target)
    elif what == 1:
        target.mkdir()
    elif what == 2:
        target.symlink_to("/dev/zero")
    elif what == 3:
        target.symlink_to("/proc/self/mem")
    else:
        where = Path.cwd()
        os.chdir(folder)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(target.name)
        os.chdir(where)


@kind
def pipes(folder, rng, seed):
    names = [
        *ALL_JSON,
        *(path.name for path in shards(folder)),
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
    ]
    target = folder / names[seed % len(names)]
    target.unlink(missing_ok=True)
    os.mkfifo(target)


@kind
def huge_files(folder, rng, seed):
    """Files of 8 GiB that are nearly all holes."""
    path = folder / ALL_JSON[seed % 5]
    content = path.read_bytes()
    path.write_bytes(content if seed < 5 else b"")
    os.truncate(path, 8 << 30)


@kind
def empty_files(folder, rng, seed):
    (folder / [*ALL_JSON, *(path.name for path in shards(folder))][seed % 8]).write_bytes(b"" if seed < 8 else b"\n")


@kind
def duplicate_keys(folder, rng, seed):
    if seed < 5:
        path = rng.choice(shards(folder))
        header, data = header_of(path)
        name = choose_tensor(header, rng)
        raw = json.dumps(header)
        raw = f'{{"{name}": {json.dumps(header[name])}, {raw[1:]}' if seed % 2 else raw[:-1] + f', "{name}": {{}}}}'
        write(path, raw.encode(), data)
        return
    path = folder / (INDEX if seed < 7 else "config.json")
    key = "weight_map" if seed < 7 else "rms_norm_eps"
    first, second = ("{}", json.dumps(json.loads(path.read_text())[key])) if seed < 7 else ("1e-6", "0.5")
    rest = path.read_text().rstrip().removesuffix("}")
    path.write_text(f'{rest}, "{key}": {first}, "{key}": {second}}}')


@kind
def invalid_utf8(folder, rng, seed):
    piece = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x80", b"\xf8\x88\x80\x80\x80"][seed % 5]
    if seed < 3:
        path = rng.choice(shards(folder))
        header, data = header_of(path)
        name = choose_tensor(header, rng)
        write(path, json.dumps(header).encode().replace(name.encode(), name.encode() + piece), data)
    elif seed == 3:
        change_header(folder, rng, lambda header, name: header.update({name + "\ud800": header.pop(name)}))
    else:
        path = folder / [*ALL_JSON[:4], "config.json", "tokenizer_config.json"][seed - 4]
        data = path.read_bytes()
        position = data.index(b'"') + 1
        path.write_bytes(data[:position] + piece + data[position:])


@kind
def deep_nesting(folder, rng, seed):
    depth = [100, 900, 990, 5_000, 1_000_000][seed % 5]
    if seed < 3:
        nested = b"[" * depth + b"]" * depth
        path = rng.choice(shards(folder))
        raw = json.dumps(header_of(path)[0]).encode()
        write(path, raw[:-1] + b', "__more__": ' + nested + b"}", header_of(path)[1])
        return
    path = folder / ("config.json" if seed != 9 else "tokenizer_config.json")
    key, opening, closing = ("a_config", '{"a_config":', "}") if seed % 2 else ("rope_scaling", '{"x":', "}")
    text = path.read_text().rstrip().removesuffix("}")
    path.write_text(f'{text}, "{key}": {opening * depth}1{closing * depth}}}')


@kind
def huge_numbers(folder, rng, seed):
    number = ["9" * 300, "9" * 5000, "1e400", "-1e400", "1" + "0" * 1_000_000][seed % 5]
    if seed < 5:
        path = rng.choice(shards(folder))
        header, data = header_of(path)
        name = choose_tensor(header, rng)
        header[name]["data_offsets"][1] = "NUMBER"
        write(path, json.dumps(header).replace('"NUMBER"', number).encode(), data)
    else:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        key = rng.choice([key for key in content if type(content[key]) is int])
        path.write_text(json.dumps(content | {key: "NUMBER"}).replace('"NUMBER"', number))
