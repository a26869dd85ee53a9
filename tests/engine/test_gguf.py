"""GGUF files: the numbers of transformers' own unpacking and naming, whatever stays in memory."""

import os
import shutil

import gguf
import pytest
import torch
import transformers
from tiny_gguf import LAYERS, WIDE, make_gguf, unpackable

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import gguf_files, versions
from airllm_nb.errors import CheckpointError

pytestmark = pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="refused by this version of transformers")
IDS = torch.arange(4, 20)[None]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def reference(path, dtype=torch.float32):
    """Return transformers' model with what transformers makes of the file; its `from_pretrained` needs accelerate for that."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = config.head_dim  # as llama.cpp; that of Gemma's published sizes is the default
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    if missing:
        model.tie_weights()
    for parameter in model.parameters():  # buffers stay float32, as in from_pretrained
        parameter.data = parameter.data.to(dtype)
    return model


def load(path, **options):
    return LayeredModel.from_pretrained(path, **({"device": "cpu", "dtype": "float32"} | options))


@pytest.mark.parametrize("architecture", gguf_files.ARCHITECTURES)
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streaming"])
def test_logits_are_those_of_transformers(tmp_path, architecture, streams):
    path = make_gguf(tmp_path / f"{architecture}.gguf", architecture)
    expected = reference(path)
    memory = plan(path, device="cpu", dtype="float32").least if streams else "1GB"
    with torch.no_grad(), load(path, memory=memory) as model:
        assert sum(layer.resident for layer in model.layers) == (0 if streams else LAYERS)
        for _ in range(2):
            assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert model.tokenizer("\u0105\u0106", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("architecture", gguf_files.ARCHITECTURES)
def test_names_are_those_of_transformers(tmp_path, architecture):
    """Without asking each module: the time of that grows with the square of the layers."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    path = make_gguf(tmp_path / "model.gguf", architecture)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name))
    tables = []
    with pytest.MonkeyPatch.context() as patch:
        make = gguf.get_tensor_name_map
        patch.setattr(gguf, "get_tensor_name_map", lambda *args: tables.append(args) or make(*args))
        found = gguf_files.parameters(model, architecture)
    assert len(tables) == 1
    assert found == get_gguf_hf_weights_map(model, gguf_files.processor(model, architecture))


@pytest.mark.parametrize("kind", unpackable())
def test_every_quantization_that_the_package_unpacks(tmp_path, kind):
    path = make_gguf(tmp_path / "llama.gguf", "llama", kind, width=WIDE, inner=WIDE)
    expected = reference(path)(IDS).logits
    assert expected.isfinite().all()
    assert expected.std() > 0
    with torch.no_grad(), load(path) as model:
        assert torch.equal(model(IDS).logits, expected)
    least = plan(path, device="cpu", dtype="float32").least
    with torch.no_grad(), load(path, memory=least) as model:
        assert torch.equal(model(IDS).logits, expected)


def test_no_quantization_is_forgotten():
    """What llama.cpp's own tool writes: https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md."""
    usual = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
             "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"}  # fmt: skip
    assert usual <= set(unpackable())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_several_quantizations_in_one_file(tmp_path, architecture, tied):
    """As Q4_K_M has them."""
    kinds = {"token_embd": "Q6_K", "output.weight": "Q6_K", "attn_v": "Q6_K", "blk.1.ffn_down": "Q6_K", "attn_k": "F16"}
    path = make_gguf(tmp_path / "mixed.gguf", architecture, "Q4_K", width=WIDE, inner=WIDE, kinds=kinds, tied=tied)
    expected = reference(path)(IDS).logits
    for memory in ("1GB", plan(path, device="cpu", dtype="float32").least):
        with torch.no_grad(), load(path, memory=memory) as model:
            assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("head", [None, 32], ids=["as wide", "wider heads"])  # as Mistral Nemo has them
def test_mistral_by_the_name_of_llama(tmp_path, head):
    fields = {"general.name": "Mistral 7B Instruct v0.3", "llama.context_length": 32768, "llama.rope.freq_base": 1e6}
    path = make_gguf(tmp_path / "mistral.gguf", "llama", "Q4_0", fields=fields, head=head)
    as_llama = reference(path)
    config = transformers.MistralConfig(
        **{**as_llama.config.to_dict(), "model_type": "mistral", "architectures": None}, sliding_window=None
    )
    as_mistral = transformers.MistralForCausalLM(config).eval()
    as_mistral.load_state_dict(as_llama.state_dict())
    with torch.no_grad(), load(path) as model:
        assert model.config.model_type == "llama"
        assert torch.equal(model(IDS).logits, as_llama(IDS).logits)
        assert torch.equal(model(IDS).logits, as_mistral(IDS).logits)


def test_in_bfloat16_as_transformers_rounds_it(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama", "Q4_0")
    expected = reference(path, torch.bfloat16)
    with torch.no_grad(), load(path, dtype="bfloat16") as model:
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_small_files_are_written_once(tmp_path, home):
    path = make_gguf(tmp_path / "llama.gguf", "llama")
    with load(path) as model:
        (folder,) = (home / "gguf").iterdir()
        assert model.path == folder
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert "config.json" in before
    with load(path):
        assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_small_files_that_were_removed_are_written_again(tmp_path, home):
    path = make_gguf(tmp_path / "llama.gguf", "llama")
    with load(path) as model:
        expected = model(IDS).logits
    (folder,) = (home / "gguf").iterdir()
    for name in gguf_files.SMALL_FILES:
        (folder / name).unlink()
        with load(path) as model:
            assert torch.equal(model(IDS).logits, expected)
            assert model.tokenizer.vocab_size


def test_another_header_gives_other_small_files_whatever_its_time(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama")
    other = make_gguf(tmp_path / "other.gguf", "llama", fields={"llama.rope.freq_base": 500.0})
    before = path.stat()
    with load(path) as model:
        assert model.config.rope_parameters["rope_theta"] == 10000.0
    shutil.copyfile(other, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with load(path) as model:
        assert model.config.rope_parameters["rope_theta"] == 500.0


def test_words_are_split_as_the_file_says(tmp_path):
    """As the published tokenizer of SmolLM: each digit alone, and no digit with the space before it."""
    texts = ["a 2024 b", "  1", "12"]
    for split, expected in (
        ("smollm", [["a", "Ġ", "2", "0", "2", "4", "Ġb"], ["ĠĠ", "1"], ["1", "2"]]),
        ("gpt-2", [["a", "Ġ2024", "Ġb"], ["Ġ", "Ġ1"], ["12"]]),
    ):
        with load(make_gguf(tmp_path / f"{split}.gguf", "llama", fields={"tokenizer.ggml.pre": split})) as model:
            splitter = model.tokenizer.backend_tokenizer.pre_tokenizer
            assert [[word for word, _ in splitter.pre_tokenize_str(text)] for text in texts] == expected


def test_a_file_that_changes_is_noticed(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama")
    with load(path, memory=plan(path, device="cpu", dtype="float32").least) as model:
        model(IDS)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"llama\.gguf was (replaced|truncated)"):
            for _ in range(3):
                model(IDS)
