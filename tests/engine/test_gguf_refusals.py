"""GGUF files that are refused: damaged, foreign, or such as transformers would read otherwise than they were meant."""

import contextlib
import math
import shutil
import struct

import gguf
import pytest
from tiny_gguf import WIDE, make_gguf

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import gguf_files, versions
from airllm_nb.compat.gguf_exact import require_exact
from airllm_nb.engine.gguf_checkpoint import GGUFCheckpoint
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

pytestmark = pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="refused by this version of transformers")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))


def refusal(path, kind=AirLLMError):
    with pytest.raises(kind) as caught:
        plan(path, device="cpu")
    with pytest.raises(kind):
        LayeredModel.from_pretrained(path, device="cpu")
    assert caught.value.remedy
    return caught.value.cause


@pytest.fixture
def whole(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama", "Q4_0")
    return path, path.read_bytes()


def position(raw, name):
    """Return where the tensor's description has its dimensions."""
    return raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def test_what_is_no_gguf_file(whole):
    path, _ = whole
    for content in (b"", b"GG", b"x" * 1000, b"PK\x03\x04" + bytes(1000)):
        path.write_bytes(content)
        assert refusal(path, CheckpointError) == "llama.gguf is no GGUF file."


def test_truncated_anywhere(whole):
    path, raw = whole
    header = raw.index(b"output_norm.weight")
    for size in (*range(4, header, header // 40), len(raw) - 100, len(raw) - 3000):
        path.write_bytes(raw[:size])
        assert refusal(path, CheckpointError).startswith("llama.gguf is truncated: ")


@pytest.mark.parametrize("version", [0, 1, 4, 1 << 31])
def test_unknown_version(whole, version):
    path, raw = whole
    path.write_bytes(raw[:4] + struct.pack("<I", version) + raw[8:])
    assert f"is a GGUF file of version {version}; known are 2 and 3" in refusal(path, CheckpointError)


def test_other_order_of_bytes(whole):
    path, raw = whole
    path.write_bytes(raw[:4] + raw[4:8][::-1] + raw[8:])
    assert "another order of bytes" in refusal(path, UnsupportedError)


@pytest.mark.parametrize(
    ("number", "called"),
    [
        (9999, "quantization 9999"),
        (4, "quantization 4"),
        (gguf.GGMLQuantizationType.Q8_K, "Q8_K"),
        (gguf.GGMLQuantizationType.I32, "I32"),
    ],
)
def test_unknown_quantization(whole, number, called):
    path, raw = whole
    at = position(raw, b"blk.1.ffn_up.weight") + 4 + 2 * 8
    path.write_bytes(raw[:at] + struct.pack("<I", number) + raw[at + 4 :])
    cause = refusal(path, UnsupportedError)
    assert cause.startswith(f"llama.gguf holds blk.1.ffn_up.weight as {called}, which the package gguf ")


def test_rows_that_are_no_multiple_of_a_block(whole):
    path, raw = whole
    at = position(raw, b"blk.1.ffn_up.weight") + 4
    path.write_bytes(raw[:at] + struct.pack("<Q", 63) + raw[at + 8 :])
    assert (
        refusal(path, CheckpointError)
        == "llama.gguf is damaged: blk.1.ffn_up.weight has rows of 63 numbers, and Q4_0 blocks of 32."
    )


@pytest.mark.parametrize("change", [-2048, 32, 2048])
def test_a_tensor_in_the_place_of_another(whole, change):
    path, raw = whole
    at = position(raw, b"blk.1.ffn_up.weight") + 4 + 2 * 8 + 4
    (offset,) = struct.unpack("<Q", raw[at : at + 8])
    path.write_bytes(raw[:at] + struct.pack("<Q", offset + change) + raw[at + 8 :])
    assert refusal(path, CheckpointError).startswith("llama.gguf is damaged: blk.1.ffn_up.weight begins at byte ")


@pytest.mark.parametrize("word", [b"general.architecture", b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"])
@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1])
def test_lengths_that_no_file_has(whole, word, length):
    path, raw = whole
    begin = position(raw, word) + 4 + (0 if word == b"general.architecture" else 4)
    path.write_bytes(raw[:begin] + struct.pack("<Q", length) + raw[begin + 8 :])
    assert refusal(path, CheckpointError).startswith("llama.gguf is ")


def test_every_byte_of_the_header(whole):
    """Whatever one of them is, there is a model or a refusal."""
    path, raw = whole
    tensors = raw.index(b"token_embd.weight") - 8
    for at in (*range(24), *range(tensors, tensors + 120)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        with contextlib.suppress(AirLLMError):
            plan(path, device="cpu")


def test_what_transformers_would_drop(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama", extra="blk.0.attn_sinks.weight")
    assert "holds blk.0.attn_sinks.weight, which transformers does not read" in refusal(path, UnsupportedError)


@pytest.mark.parametrize("architecture", ["qwen2moe", "qwen3moe", "gpt-oss", "mistral3", "starcoder2", "gemma3n", "clip"])
def test_other_architectures_are_refused_by_name(tmp_path, architecture):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert f"of the architecture {architecture}; GGUF files are read of gemma2, gemma3, llama," in refusal(path, UnsupportedError)


@pytest.mark.parametrize(
    ("architecture", "fields", "what"),
    [
        ("llama", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "yarn, but not the original context"),
        ("qwen2", {"qwen2.rope.scaling.type": "su", "qwen2.rope.scaling.factor": 2.0}, "scaled (su, by 2)"),
        ("gemma3", {"gemma3.rope.scaling.type": "none", "gemma3.rope.scaling.factor": 8.0}, "scaled (none, by 8)"),
        ("phi3", {"phi3.attention.sliding_window": 47}, "a sliding window of 47 tokens"),
        ("phi3", {"phi3.rope.dimension_count": 12}, "a rotary embedding of 12 of the 16 numbers of a head"),
        ("gemma2", {"gemma2.attn_logit_softcapping": 25.0}, "attn_logit_softcapping 25.0"),
        ("llama", {"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3", {"gemma3.attention.sliding_window": 0}, "layers without a sliding window only"),
        ("llama", {"llama.expert_count": 8}, "8 experts in each layer"),
        ("llama", {"llama.attention.scale": 0.25}, "attention.scale 0.25"),
        ("llama", {"llama.attention.causal": False}, "the field llama.attention.causal (False)"),
        ("gemma3", {"gemma3.rope.freq_base_swa": 5000.0}, "the field gemma3.rope.freq_base_swa (5000.0)"),
        ("qwen3", {"qwen3.never_heard_of": 1}, "the field qwen3.never_heard_of (1)"),
        ("llama", {"tokenizer.ggml.pre": "command-r"}, "a tokenizer that splits words as command-r"),
        ("phi3", {"tokenizer.ggml.add_space_prefix": False}, "a tokenizer that puts no space before a text"),
        ("gemma2", {"tokenizer.ggml.add_space_prefix": True}, "a tokenizer that puts a space before a text"),
        ("phi3", {"tokenizer.ggml.remove_extra_whitespaces": True}, "a tokenizer with remove_extra_whitespaces"),
        ("llama", {"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind bert"),
        ("llama", {"general.name": "mistral"}, 'the very name "mistral"'),
        ("llama", {"general.name": "Mistral 7B Instruct v0.1", "llama.context_length": 32768}, "a sliding window of 4096 tokens"),
    ],
)  # fmt: skip
def test_what_transformers_would_compute_otherwise(tmp_path, architecture, fields, what):
    path = make_gguf(tmp_path / "other.gguf", architecture, fields=fields)
    assert what in refusal(path, UnsupportedError)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("attention.sliding_window", "x", "is 'x'"), ("attention.key_length", 16.0, "is 16.0"),
        ("attention.scale", math.nan, "is nan"), ("attention.layer_norm_rms_epsilon", math.inf, "is inf"),
        ("rope.freq_base", math.nan, "is nan"), ("expert_count", True, "is True"),
        ("context_length", None, "it does not say"), ("attention.layer_norm_rms_epsilon", None, "it does not say"),
        ("block_count", None, "it does not say"), ("embedding_length", None, "it does not say"),
    ],
)  # fmt: skip
def test_fields_that_are_missing_or_none_of_their_kind(tmp_path, field, value, what):
    cause = refusal(make_gguf(tmp_path / "llama.gguf", "llama", fields={f"llama.{field}": value}), CheckpointError)
    assert what in cause
    assert f"llama.{field}" in cause


@pytest.mark.parametrize("field", ["attention.sliding_window", "attention.scale", "attention.head_count_kv", "rope.scaling.type"])
def test_a_list_in_the_place_of_one_value(tmp_path, field):
    """As a file has it whose layers differ: nothing tells what they are."""
    path = make_gguf(tmp_path / "llama.gguf", "llama", fields={f"llama.{field}": [2, 2]})
    assert refusal(path, UnsupportedError).startswith(f"llama.gguf has a list of llama.{field}, which")


@pytest.mark.parametrize("field", ["qwen2.rope.freq_base", "mistral.attention.layer_norm_rms_epsilon"])
def test_fields_of_another_architecture(tmp_path, field):
    """transformers takes them for the file's own: of two, the one that comes last."""
    path = make_gguf(tmp_path / "llama.gguf", "llama", fields={field: 7.0})
    assert f"transformers would obey its field {field}, too" in refusal(path, UnsupportedError)


def test_a_header_that_no_memory_holds(tmp_path):
    """A list in a file with a hole: a terabyte that takes a few blocks on the disk."""
    length = 1 << 40
    with (tmp_path / "large.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 0, length))
        file.truncate(length + 4096)
    assert "its header has more than 67108864 bytes" in refusal(tmp_path / "large.gguf", CheckpointError)


def test_a_file_that_is_replaced_while_transformers_reads_it(tmp_path, monkeypatch):
    """Else the config of the new one would be kept for the old one, and be taken when that is back."""
    path = make_gguf(tmp_path / "llama.gguf", "llama")
    write = gguf_files.write_small_files

    def meanwhile(*args):
        make_gguf(path, "llama", fields={"llama.rope.freq_base": 7.0})
        write(*args)

    monkeypatch.setattr(gguf_files, "write_small_files", meanwhile)
    with pytest.raises(CheckpointError, match=r"llama.gguf was replaced or rewritten while it was read"):
        plan(path, device="cpu")
    assert not list((tmp_path / "home" / "gguf").iterdir())


def test_what_lies_beside_the_file_counts_for_nothing(tmp_path):
    def small_files(path):
        (folder,) = {GGUFCheckpoint(path).folder}
        found = {file.name: file.read_bytes() for file in folder.iterdir()}
        shutil.rmtree(folder)
        return found

    path = make_gguf(tmp_path / "llama.gguf", "llama")
    alone = small_files(path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rope_theta": 3.0}')
    assert small_files(path) == alone


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("phi3", {"phi3.attention.sliding_window": 128}),
        ("gemma2", {"gemma2.attn_logit_softcapping": 50.0, "gemma2.attention.sliding_window": 47}),
        ("llama", {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0}),
        ("llama", {"general.name": "Mistral 7B Instruct v0.3", "llama.context_length": 32768, "llama.rope.freq_base": 1e6}),
        ("llama", {"llama.expert_count": 0}),
        ("llama", {"llama.attention.causal": True, "llama.tensor_data_layout": "Meta AI original pth"}),
        ("gemma3", {"tokenizer.ggml.add_space_prefix": False}),
        ("gemma3", {"gemma3.rope.freq_base_swa": 10000.0}),
        ("qwen2", {"tokenizer.ggml.pre": "qwen2"}),
    ],
)
def test_what_changes_nothing_is_read(tmp_path, architecture, fields):
    assert plan(make_gguf(tmp_path / "same.gguf", architecture, fields=fields), device="cpu")


def test_stacks_of_matrices(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama", "Q8_0", width=WIDE, inner=WIDE)
    raw = path.read_bytes()
    at = position(raw, b"blk.1.ffn_up.weight")
    assert raw[at : at + 4] == struct.pack("<I", 2)
    path.write_bytes(raw[:at] + struct.pack("<I", 5) + raw[at + 4 :])
    assert refusal(path, CheckpointError) == "llama.gguf is damaged: blk.1.ffn_up.weight has 5 dimensions."


@pytest.mark.parametrize(("base", "context", "refused"), [(1e4, 32768, True), (1e6, 32768, False), (1e4, 4096, False)])
def test_a_relative_of_mistral_is_known_by_its_shape(base, context, refused):
    """Zephyr, for one: a model of another name, tuned from the version with the window."""
    fields = {"embedding_length": 4096, "feed_forward_length": 14336, "attention.head_count_kv": 8, "attention.head_count": 32,
              "rope.freq_base": base, "context_length": context, "block_count": 32,
              "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    said = {"general.name": "zephyr", **tokenizer} | {f"llama.{key}": value for key, value in fields.items()}
    with pytest.raises(UnsupportedError, match="a sliding window of 4096") if refused else contextlib.nullcontext():
        require_exact("zephyr.gguf", "llama", said)
