"""What the peers do while they are measured: a script for a Python that has them, and need not have airllm_nb.

``PYTHON peers.py prepare PEER '{...}'`` writes the files that a peer wants to read, once, and prints where they are;
``PYTHON peers.py measure PEER '{...}'`` generates, and prints as its last line what JSON can hold.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import Stamps, generate, plain, prompt_ids, read_bytes  # type: ignore[import-not-found]  # lies beside this script

Found = dict[str, Any]


def keep(folder: Path) -> Path:
    """Return the checkpoint itself: nothing else is read."""
    return folder


def write_gguf(folder: Path) -> Path:
    """Write a Llama's GGUF file in float16 beside its folder, unless it is there. Holds one tensor in memory at a time."""
    import gguf
    import numpy as np

    path = folder.with_name(f"{folder.name}-f16.gguf")
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, heads, kv_heads = (config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")  # any will do, but our own engine refuses a file without one
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"<{number}>" for number in range(3, config["vocab_size"]))])
    writer.add_token_merges(["a b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    kinds: dict[str, Any] = {}
    for name, tensor in _tensors(folder):
        kinds[name] = kind = np.dtype(np.float32 if tensor.ndim == 1 else np.float16)  # as llama.cpp's own converter does
        known = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(known, tensor.shape, kind, tensor.numel() * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(folder):
        rotated = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        if rotated:  # llama.cpp turns neighbours, transformers the two halves of a head
            tensor = tensor.view(rotated, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        writer.write_tensor_data(tensor.float().numpy().astype(kinds[name]))
    writer.close()
    return unfinished.rename(path)


def write_q4_0(folder: Path) -> Path:
    """Have llama.cpp quantize that file to its Q4_0, unless it has done so."""
    import ctypes

    from llama_cpp import llama_cpp as library

    path = folder.with_name(f"{folder.name}-q4_0.gguf")
    if path.exists():
        return path
    source, unfinished = write_gguf(folder), path.with_suffix(".part")
    options = library.llama_model_quantize_default_params()
    options.ftype = library.LLAMA_FTYPE_MOSTLY_Q4_0
    if library.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(options)):
        raise RuntimeError("llama.cpp does not quantize")
    return unfinished.rename(path)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                yield name, tensors.get_tensor(name)


def llama_cpp(path: str, tokens: int, *, repacked: bool = False, **_options: Any) -> Found:
    """Decode with llama.cpp, which maps the file; its repacked copies of the weights would not fit under a limit."""
    import ctypes

    import numpy as np
    from llama_cpp import llama_cpp as library

    quiet = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    options = library.llama_model_default_params()
    options.n_gpu_layers = 0
    options.load_mode = library.LLAMA_LOAD_MODE_MMAP
    options.use_extra_bufts = repacked
    model = library.llama_model_load_from_file(path.encode(), options)
    settings = library.llama_context_default_params()
    settings.n_ctx = 512
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = library.llama_init_from_model(model, settings)
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    ids, stamps, read = prompt_ids(), Stamps(), read_bytes()
    text: list[int] = []
    for _ in range(tokens + 1):
        batch = (ctypes.c_int * len(ids))(*ids)
        if library.llama_decode(context, library.llama_batch_get_one(batch, len(ids))):
            raise RuntimeError("llama.cpp does not decode")
        logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (vocabulary,))
        ids = [int(logits.argmax())]
        text += ids
        stamps(None, None)
    return {"seconds": stamps.seconds, "read": (read_bytes() - read) // (tokens + 1), "ids": text}


def disk_offload(folder: Path, tokens: int, memory: int, **_options: Any) -> Found:
    """Generate with transformers and accelerate: `memory` bytes of the model stay, the rest is read when it computes."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="offload-") as spare:
        model = plain(str(folder), device_map="auto", max_memory={"cpu": memory}, offload_folder=spare)
        read = read_bytes()
        seconds = generate(model, tokens)
        away = sum(place == "disk" for place in model.hf_device_map.values())
        read = (read_bytes() - read) // (tokens + 1)
        return {"seconds": seconds, "read": read, "parts": len(model.hf_device_map), "on disk": away, "memory": memory}


def split(folder: Path) -> Path:
    """Have AirLLM split the checkpoint into a file for each layer, beside its folder, unless it has done so."""
    path = folder.with_name(f"{folder.name}-airllm")
    path.mkdir(exist_ok=True)
    _airllm(folder, path)
    return path / "splitted_model"


def airllm(path: str, folder: Path, tokens: int, **_options: Any) -> Found:
    """Generate with AirLLM, with its reading ahead."""
    model = _airllm(folder, Path(path).parent)
    read = read_bytes()
    seconds = generate(model, tokens)
    return {"seconds": seconds, "read": (read_bytes() - read) // (tokens + 1)}


def _airllm(folder: Path, path: Path) -> Any:
    from airllm.airllm_base import AirLLMBaseModel

    class WithoutTokenizer(AirLLMBaseModel):  # type: ignore[misc]  # the checkpoint has none, and the ids are given
        def get_tokenizer(self, **_: Any) -> None:
            pass

    return WithoutTokenizer(str(folder), device="cpu", layer_shards_saving_path=str(path))


class Peer(NamedTuple):
    """A peer: the package that must be there, what writes the files that it reads, what generates."""

    package: str
    prepare: Callable[[Path], Path]
    measure: Callable[..., Found]


PEERS = {
    "llama.cpp": Peer("llama-cpp-python", write_gguf, llama_cpp),
    "llama.cpp Q4_0": Peer("llama-cpp-python", write_q4_0, functools.partial(llama_cpp, repacked=True)),
    "transformers": Peer("accelerate", keep, disk_offload),
    "AirLLM": Peer("airllm", split, airllm),
}


def main(step: str, name: str, folder: str, **options: Any) -> Found:
    """Take one step with one peer; a peer that is not installed is an answer too."""
    peer = PEERS[name]
    needed = (peer.package, "safetensors", "gguf" if name.startswith("llama.cpp") else "transformers")
    versions = {package: _version(package) for package in needed}
    if missing := [package for package, version in versions.items() if not version]:
        return {"error": [f"{missing[0]} is not installed.", f"Install it for {sys.executable}, or choose with --peers."]}
    if step == "prepare":
        return {"path": str(peer.prepare(Path(folder)))}
    return {**peer.measure(folder=Path(folder), **options), "version": f"{peer.package} {versions[peer.package]}"}


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:3], **json.loads(sys.argv[3]))))
