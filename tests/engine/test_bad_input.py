"""Whatever is wrong with a checkpoint or a request: one AirLLMError that names the cause and the remedy."""

import gc
import json
import os
import struct
import threading

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from waiting import wait_for

from airllm_nb import LayeredModel, plan
from airllm_nb.errors import AirLLMError, CheckpointError, DeviceError, MemoryBudgetError, PromptError, UnsupportedError

INDEX = "model.safetensors.index.json"


def load(folder, **options):
    return LayeredModel.from_pretrained(folder, **({"device": "cpu", "dtype": "float32"} | options))


def rewrite(path, change):
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def missing_config(folder):
    (folder / "config.json").unlink()
    return CheckpointError, "no config.json"


def config_is_no_json(folder):
    (folder / "config.json").write_text("{model_type: llama")
    return CheckpointError, "config.json is damaged"


def missing_shard(folder):
    shards(folder)[1].unlink()
    return CheckpointError, f"{shards(folder)[0].name[:6]}.*is missing"


def truncated_shard(folder):
    path = shards(folder)[1]
    os.truncate(path, path.stat().st_size - 10)
    return CheckpointError, f"{path.name} has .* bytes .* truncated"


def empty_shard(folder):
    path = shards(folder)[1]
    os.truncate(path, 0)
    return CheckpointError, "truncated, or no safetensors file"


def huge_header(folder):
    path = shards(folder)[1]
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    return CheckpointError, "truncated, or no safetensors file"


def index_points_elsewhere(folder):
    rewrite(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "../x.safetensors"}))
    return CheckpointError, "names a file outside"


def index_and_shard_disagree(folder):
    rewrite(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": shards(folder)[0].name}))
    return CheckpointError, "which does not hold it"


def missing_tensor(folder):
    for path in shards(folder):
        tensors = load_file(path)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, path, {"format": "pt"})
    rewrite(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    return CheckpointError, "lacks weights .*model.norm.weight"


def wrong_shape(folder):
    rewrite(folder / "config.json", lambda config: config.update(intermediate_size=95))
    return CheckpointError, "has shape .* asks for"


def surplus_tensor(folder):
    rewrite(folder / "config.json", lambda config: config.update(num_hidden_layers=3))
    return CheckpointError, "no place for"


def unknown_architecture(folder):
    rewrite(folder / "config.json", lambda config: config.update(model_type="nosuchmodel"))
    return UnsupportedError, "does not know the architecture 'nosuchmodel'"


def no_causal_model(folder):
    rewrite(folder / "config.json", lambda config: config.update(model_type="vit"))
    return UnsupportedError, "cannot build this as a causal language model"


def remote_code(folder):
    rewrite(folder / "config.json", lambda config: config.update(model_type="mine", auto_map={"AutoConfig": "mine.Config"}))
    return UnsupportedError, "brings its own code"


def quantized(folder):
    rewrite(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    return UnsupportedError, r"quantized \(gptq\)"


def only_pickles(folder):
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return CheckpointError, "only pickled weights.*save_pretrained"


def no_weights(folder):
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    return CheckpointError, "model.safetensors is missing"


@pytest.mark.parametrize(
    "damage",
    [
        missing_config, config_is_no_json, missing_shard, truncated_shard, empty_shard, huge_header, index_points_elsewhere,
        index_and_shard_disagree, missing_tensor, wrong_shape, surplus_tensor, unknown_architecture, no_causal_model, remote_code,
        quantized, only_pickles, no_weights,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_damaged_checkpoint(damaged, damage):
    folder = damaged("llama")
    kind, message = damage(folder)
    with pytest.raises(AirLLMError, match=message) as caught:
        load(folder)
    assert type(caught.value) is kind
    shown = caught.value._render_traceback_()
    assert len(shown) == 2
    assert caught.value.remedy in shown[1]


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError):
        load(tmp_path / "nothing")


def test_cuda_where_there_is_none(checkpoint):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceError, match="CUDA cannot be used here: this PyTorch is built without CUDA|no NVIDIA|driver"):
        load(checkpoint(), device="cuda")


@pytest.mark.parametrize("option", [{"device": "tpu"}, {"device": "cuda:x"}, {"dtype": "int8"}, {"dtype": torch.int8}])
def test_unknown_device_or_dtype(checkpoint, option):
    with pytest.raises(DeviceError, match="There is no|cannot be used"):
        load(checkpoint(), **option)


def test_budget_below_the_least(checkpoint):
    least = plan(checkpoint(), device="cpu", dtype="float32").least
    with pytest.raises(MemoryBudgetError, match=r"at least .*(MB|kB) .*two largest layers.*Give memory="):
        load(checkpoint(), memory=least - 1)
    load(checkpoint(), memory=least).close()


@pytest.mark.parametrize("memory", ["lots", "-4GB", 0, "4XB", ""])
def test_budget_that_is_no_size(checkpoint, memory):
    with pytest.raises(MemoryBudgetError, match="is not a size"):
        load(checkpoint(), memory=memory)


def test_prompts_that_do_not_fit(checkpoint):
    with load(checkpoint()) as model:
        with pytest.raises(PromptError, match="has 129 tokens, .* context of 128"):
            model.generate(torch.zeros(1, 129, dtype=torch.long), max_new_tokens=1)
        with pytest.raises(PromptError, match="at most 8 new tokens"):
            model.generate(torch.zeros(1, 120, dtype=torch.long), max_new_tokens=9)
        with pytest.raises(PromptError, match="empty"):
            model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)
        assert model.generate(torch.zeros(1, 120, dtype=torch.long), max_new_tokens=8, min_new_tokens=8).shape == (1, 128)


def test_no_tokenizer_is_said_only_when_it_is_asked_for(checkpoint):
    with load(checkpoint()) as model:
        assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape[1] == 3
        with pytest.raises(CheckpointError, match="no tokenizer files"):
            _ = model.tokenizer


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def rewrite_in_place(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1000] + bytes(1000))


def rewrite_in_secret(path):
    times = path.stat()
    rewrite_in_place(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path):
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    other.replace(path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("hurt", [truncate, rewrite_in_place, rewrite_in_secret, replace, remove])
def test_files_hurt_after_loading(damaged, hurt):
    """Streaming from them never kills the process and never gives other weights; with the files back, a new load works."""
    folder = damaged("llama")
    ids = torch.arange(9)[None]
    saved = {path: path.read_bytes() for path in shards(folder)}
    with load(folder, memory=plan(folder, device="cpu", dtype="float32").least) as model:
        expected = model(ids).logits
        for path in shards(folder):
            hurt(path)
        for _ in range(2):
            with pytest.raises(
                CheckpointError, match=r"(truncated|rewritten|removed) after the model was loaded.*Load the model again"
            ):
                for _ in range(3):  # what was read ahead before is still good, and may serve one layer
                    assert torch.equal(model(ids).logits, expected)
    for path, data in saved.items():
        path.write_bytes(data)
    with load(folder) as model:
        assert torch.equal(model(ids).logits, expected)


def test_files_hurt_after_loading_do_not_matter_to_what_stays(damaged):
    folder = damaged("llama")
    ids = torch.arange(9)[None]
    with load(folder) as model:
        expected = model(ids).logits
        for path in shards(folder):
            truncate(path)
        assert torch.equal(model(ids).logits, expected)


def test_closed_model(checkpoint):
    model = load(checkpoint(), memory=plan(checkpoint(), device="cpu", dtype="float32").least)
    model.close()
    model.close()
    with pytest.raises(AirLLMError, match="unloaded"):
        model(torch.zeros(1, 3, dtype=torch.long))


def test_nothing_is_left_behind(checkpoint):
    """Threads, descriptors and weights of closed, failed and forgotten models are gone."""
    folder = checkpoint()
    least = plan(folder, device="cpu", dtype="float32").least
    load(folder, memory=least)(torch.zeros(1, 3, dtype=torch.long))
    gc.collect()
    wait_for(lambda: not any(thread.name.startswith("airllm_nb-") for thread in threading.enumerate()))
    threads, files = threading.active_count(), psutil.Process().num_fds()
    for close in (True, False) * 3:
        model = load(folder, memory=least)
        model(torch.zeros(1, 3, dtype=torch.long))
        if close:
            model.close()
        del model
        gc.collect()
    wait_for(lambda: threading.active_count() == threads)
    assert psutil.Process().num_fds() == files


def test_gpt2_with_absolute_positions(tmp_path):
    """A prompt beyond the position table is an IndexError inside the model: it is refused before."""
    folder = make_checkpoint(tmp_path / "gpt2", "gpt2", n_positions=16)
    with load(folder) as model, pytest.raises(PromptError):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_the_prompt_counts_with_its_cache_and_every_way_to_ask_for_tokens(checkpoint):
    import transformers

    with load(checkpoint()) as model:
        ids = torch.zeros(1, 120, dtype=torch.long)
        for options in (
            {"max_length": 129},
            {"generation_config": transformers.GenerationConfig(max_new_tokens=9)},
            {"generation_config": transformers.GenerationConfig(max_length=129)},
        ):
            with pytest.raises(PromptError, match="at most 8 new tokens"):
                model.generate(ids, **options)
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(PromptError, match="has 129 tokens"):
            model(torch.zeros(1, 9, dtype=torch.long), past_key_values=cache)


def test_an_automatic_budget_names_its_limit(checkpoint, monkeypatch):
    monkeypatch.setenv("MEM_LIMIT", "1000")
    with pytest.raises(MemoryBudgetError, match=r"\. JupyterHub's MEM_LIMIT leaves 0 B.*choose a smaller model"):
        load(checkpoint())


def test_the_notebook_may_change_its_folder(checkpoint, monkeypatch, tmp_path):
    folder = checkpoint()
    monkeypatch.chdir(folder.parent)
    with load(f"./{folder.name}", memory=plan(folder, device="cpu", dtype="float32").least) as model:
        expected = model(torch.arange(5)[None]).logits
        monkeypatch.chdir(tmp_path)
        assert torch.equal(model(torch.arange(5)[None]).logits, expected)


def test_a_layered_model_never_trains(checkpoint):
    with load(checkpoint("gpt2")) as model:  # has dropout
        ids = torch.arange(5)[None]
        expected = model(ids).logits
        with pytest.raises(AirLLMError, match="does not train"):
            model.train()
        model._hf.train()  # by whoever holds the inner model
        assert model.eval() is model
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_does_not_matter(checkpoint, default):
    with load(checkpoint()) as model:
        expected = model(torch.arange(5)[None]).logits
    torch.set_default_device(default)
    try:
        model = load(checkpoint(), memory=plan(checkpoint(), device="cpu", dtype="float32").least)
    finally:
        torch.set_default_device(None)
    with model:
        assert torch.equal(model(torch.arange(5)[None]).logits, expected)


def test_other_threads_build_their_modules_as_ever(checkpoint):
    """Loading patches torch.nn for a moment: only for its own thread, and it is undone whatever loads beside it."""
    register = torch.nn.Module.register_parameter
    stop, devices = threading.Event(), set()

    def build():
        while not stop.is_set():
            devices.add(torch.nn.Linear(2, 2).weight.device.type)

    builder = threading.Thread(target=build)
    builder.start()
    loaders = [threading.Thread(target=lambda: [load(checkpoint()).close() for _ in range(5)]) for _ in range(3)]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join()
    stop.set()
    builder.join()
    assert torch.nn.Module.register_parameter is register
    assert devices == {"cpu"}
