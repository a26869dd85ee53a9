"""Checkpoints that bitsandbytes has quantized: hostile ones, and those that it writes itself. See also `test_published`."""

import json
import shutil

import pytest
import tiny_bitsandbytes as bitsandbytes
import tiny_published as published
import torch
import transformers
from test_published import Q, cast, read_all, reference, reshaped, tensors_of
from tiny import CONFIGS, LAYERS, make_checkpoint

from airllm_nb import LayeredModel, plan
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.published import unpacked
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

IDS = torch.arange(4, 20)[None]
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
FORMATS = {
    "nf4": (bitsandbytes.four_bits("nf4"), bitsandbytes.config(4)),
    "nested": (bitsandbytes.four_bits("nf4", nested=True), bitsandbytes.config(4, nested=True)),
    "int8": (bitsandbytes.eight_bits(), bitsandbytes.config(8)),
    "nf4, experts": (bitsandbytes.four_bits("nf4"), bitsandbytes.config(4), CONFIGS["mixtral"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that gives the folder of a quantized checkpoint. Read only."""
    folders = {}

    def get(case):
        if case not in folders:
            quantize, config, *raw = FORMATS[case]
            folders[case] = published.publish(tmp_path_factory.mktemp("bnb"), quantize, config, raw=raw[0] if raw else None)
        return folders[case][0]

    return get


@pytest.fixture
def damaged(made, tmp_path):
    """Return a function that gives a copy whose tensors and config were changed."""

    def get(case, change=lambda _: None, model=(), **fields):
        folder = shutil.copytree(made(case), tmp_path / "damaged")
        published.rewrite(folder, change)
        raw = json.loads((folder / "config.json").read_text()) | dict(model)
        raw["quantization_config"] |= fields
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return get


def load(path, **options):
    return LayeredModel.from_pretrained(path, device="cpu", dtype="float32", **options)


def says(**fields):
    """Return a change of what stands beside a weight; a field that is None goes."""

    def change(tensors):
        said = json.loads(bytes(tensors[STATE].tolist())) | fields
        tensors[STATE] = bitsandbytes.as_bytes({name: value for name, value in said.items() if value is not None})

    return change


def raw_state(raw):
    return lambda tensors: tensors.update({STATE: torch.tensor(list(raw), dtype=torch.uint8)})


VALID = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]'


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("nf4", lambda t: t.pop(Q), f"{Q} is missing"),
        *(("nf4", lambda t, end=end: t.pop(f"{Q}.{end}"), f"{Q}.{end} is missing") for end in ("absmax", "quant_map")),
        ("nf4", lambda t: t.pop(STATE), f"{STATE} is missing"),
        ("nested", lambda t: t.pop(f"{Q}.nested_absmax"), f"{Q}.nested_absmax is missing"),
        ("nf4", lambda t: t.update({f"{Q}.nested_absmax": torch.ones(1)}), "config.json says that factors are not quantized"),
        ("nf4", lambda t: t.update({Q: torch.zeros(64, 64)}), f"{Q} is float32, not quantized, and {Q}."),
        ("nf4", cast(f"{Q}.absmax", torch.float16), "is float16 and should be float32"),
        ("nested", cast(f"{Q}.absmax", torch.float32), "is float32 and should be uint8"),
        ("nf4", reshaped(f"{Q}.absmax", 63), f"has shape (63,), and {STATE} asks for (64,)"),
        ("nested", reshaped(f"{Q}.nested_absmax", 2), f"has shape (2,), and {STATE} asks for (1,)"),
        ("nested", reshaped(f"{Q}.nested_quant_map", 255), f"has shape (255,), and {STATE} asks for (256,)"),
        ("nf4", reshaped(f"{Q}.quant_map", 15), "has shape (15,), and config.json asks for (16,)"),
        ("nf4", reshaped(Q, 32, 64), f"has shape (32, 64), and {STATE} asks for (2048, 1)"),
        ("nf4", reshaped(Q, 2047, 1), f"has shape (2047, 1), and {STATE} asks for (2048, 1)"),
        ("nf4", reshaped(STATE, 5000), f"{STATE} has 5000 bytes, more than there is to say"),
        ("nf4", lambda t: t[f"{Q}.quant_map"].mul_(2), f"The quant_map of {Q} is not that of nf4"),
        ("nf4", lambda t: t[f"{Q}.quant_map"][3:4].fill_(torch.nan), f"The quant_map of {Q} is not that of nf4"),
        ("nested", lambda t: t[f"{Q}.nested_quant_map"][3:4].fill_(torch.inf), f"The nested_quant_map of {Q} is not finite"),
        *(("nf4", says(**fields), f"The quant_state of {Q} {said}") for fields, said in [
            ({"shape": [64]}, "says shape"), ({"shape": [-64, -64]}, "says shape"), ({"shape": [64, 64.0]}, "says shape"),
            ({"shape": "64"}, "says shape"), ({"shape": None}, "does not say shape"),
            ({"blocksize": -64}, "says blocksize '-64'"), ({"blocksize": True}, "says blocksize"),
            ({"blocksize": 63}, "says blocksize"), ({"dtype": "int8"}, "says dtype"),
            ({"dtype": ["bfloat16"]}, "says dtype"), ({"quant_type": "fp4"}, "says quant_type"), ({"more": 1}, "says more"),
            ({"nested_offset": 0.5}, "says nested_offset"),
        ]),
        ("nf4", says(shape=[32, 128]), f"Tensor {Q} has shape (32, 128), and config.json asks for (64, 64)"),
        *(("nested", says(**fields), f"The quant_state of {Q} {said}") for fields, said in [
            ({"nested_offset": float("nan")}, "says nested_offset 'nan'"), ({"nested_offset": 1e300}, "says nested_offset"),
            ({"nested_offset": 1}, "says nested_offset"), ({"nested_blocksize": 64}, "says nested_blocksize"),
            ({"nested_dtype": "float16"}, "says nested_dtype"), ({"nested_offset": None}, "does not say nested_offset"),
        ]),
        *(("nf4", raw_state(raw), f"The quant_state of {Q} is damaged") for raw in [
            b"", b"[]", b"\xff\xfe{}", b"[" * 4096, VALID, VALID + b', "blocksize": 128}',
        ]),
        ("nf4", raw_state(VALID + b', "x": ' + b"9" * 4000 + b"}"), f"The quant_state of {Q} says x '9999"),
        ("int8", lambda t: t.pop(Q.replace("weight", "SCB")), f"{Q.replace('weight', 'SCB')} is missing"),
        ("int8", reshaped(Q.replace("weight", "SCB"), 64, 1), "has shape (64, 1), and config.json asks for (64,)"),
        ("int8", cast(Q.replace("weight", "SCB"), torch.float16), "is float16 and should be float32"),
        ("int8", reshaped(f"{Q}_format", 2), "has shape (2,), and config.json asks for ()"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(damaged, case, change, said):
    with pytest.raises(CheckpointError) as error:
        load(damaged(case, change))
    assert said in error.value.cause
    assert error.value.remedy


@pytest.mark.parametrize(
    ("case", "fields", "said"),
    [
        ("nf4", {"load_in_8bit": True}, "load_in_4bit and load_in_8bit that contradict each other"),
        ("nf4", {"load_in_4bit": False}, "with neither load_in_4bit nor load_in_8bit"),
        ("nf4", {"_load_in_4bit": False}, "load_in_4bit and load_in_8bit that contradict each other"),
        ("nf4", {"load_in_4bit": 1}, "with load_in_4bit 1"),
        ("nf4", {"bnb_4bit_quant_type": "int4"}, 'with bnb_4bit_quant_type "int4"'),
        ("nf4", {"bnb_4bit_quant_type": None}, "and bnb_4bit_quant_type is not said"),
        ("nf4", {"bnb_4bit_use_double_quant": None}, "and bnb_4bit_use_double_quant is not said"),
        ("nf4", {"bnb_4bit_quant_storage": "int64"}, 'with bnb_4bit_quant_storage "int64"'),
        ("nf4", {"bnb_4bit_blocksize": 64}, "with bnb_4bit_blocksize 64"),
        ("int8", {"llm_int8_has_fp16_weight": True}, "with llm_int8_has_fp16_weight true"),
        ("int8", {"llm_int8_skip_modules": "lm_head"}, "with llm_int8_skip_modules"),
    ],
)
def test_what_a_config_says_and_we_do_not_know_is_refused(damaged, case, fields, said):
    with pytest.raises(UnsupportedError) as error:
        load(damaged(case, **fields))
    assert said in error.value.cause


def test_numbers_in_the_order_of_a_gpu_kernel_are_refused(damaged):
    with pytest.raises(UnsupportedError, match=r"do not lie row by row \(weight_format 2\)"):
        load(damaged("int8", lambda tensors: tensors[f"{Q}_format"].fill_(2)))


def test_a_model_that_has_its_matrices_transposed_is_refused(damaged):
    with pytest.raises(UnsupportedError, match="those of gpt2 are stored transposed"):
        load(damaged("nf4", model={"model_type": "gpt2"}))


def test_a_module_that_is_said_to_be_skipped_is_not_quantized(damaged):
    with pytest.raises(CheckpointError, match="q_proj is quantized, and config.json says that it is not"):
        load(damaged("nf4", llm_int8_skip_modules=["lm_head", "q_proj"]))


def test_a_kind_that_config_and_weights_do_not_agree_on_is_refused(damaged):
    with pytest.raises(CheckpointError, match=r"bitsandbytes__fp4 is missing"):
        load(damaged("nf4", bnb_4bit_quant_type="fp4"))


@pytest.mark.parametrize("case", FORMATS)
def test_planned_from_headers_alone(made, tmp_path, monkeypatch, case):
    """Shapes stand in bytes that were not read: they are those that the model asks for."""
    folder = made(case)
    headers = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        headers[path.name] = len(raw), raw[: 8 + int.from_bytes(raw[:8], "little")]
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "model.safetensors.index.json", tmp_path)
    here = plan(folder, device="cpu", dtype="float32")
    monkeypatch.setattr("airllm_nb.engine.hub.locate_headers", lambda *_, **__: (tmp_path, headers))
    remote = plan("org/name", device="cpu", dtype="float32")
    assert [layer.nbytes for layer in remote.layers] == [layer.nbytes for layer in here.layers]
    assert (remote.total_nbytes, remote.least) == (here.total_nbytes, here.least)
    assert remote.checkpoint_nbytes == here.checkpoint_nbytes == sum(tensor.nbytes for tensor in tensors_of(folder).values())
    here, remote = (plan(model, device="cpu", quantize="int8") for model in (folder, "org/name"))
    assert remote.total_nbytes == here.total_nbytes


def test_of_headers_alone_another_number_of_elements_is_refused(damaged, tmp_path, monkeypatch):
    folder = damaged("nf4", lambda tensors: tensors.update({Q: tensors[Q][:-1].clone()}))
    raw = (folder / "model.safetensors").read_bytes()
    headers = {"model.safetensors": (len(raw), raw[: 8 + int.from_bytes(raw[:8], "little")])}
    (tmp_path / "remote").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "remote")
    monkeypatch.setattr("airllm_nb.engine.hub.locate_headers", lambda *_, **__: (tmp_path / "remote", headers))
    with pytest.raises(AirLLMError, match=r"and config.json asks for \(64, 64\)"):
        plan("org/name", device="cpu")


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_what_is_unpacked_can_be_quantized_anew(made, tmp_path, monkeypatch, bits):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path))
    folder = made("nested")
    with torch.no_grad(), load(folder.with_name("plain"), quantize=bits) as model:
        expected = model(IDS).logits
    with torch.no_grad(), load(folder, quantize=bits) as model:
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("case", ["nested", "int8"])
def test_a_head_that_is_tied_or_quantized(tmp_path, case):
    quantize, config = FORMATS[case]

    def with_head(name, weight):
        if name != "lm_head.weight":
            return quantize(name, weight)
        tensors, meant = quantize("model.layers.0.lm_head.weight", weight)
        return {key.removeprefix("model.layers.0."): tensor for key, tensor in tensors.items()}, meant

    for kind, function, changes in (
        ("tied", quantize, {"tie_word_embeddings": True}),
        ("quantized", with_head, {"vocab_size": 272}),
    ):
        (tmp_path / kind).mkdir()
        quantized, plain = published.publish(tmp_path / kind, function, config, raw=CONFIGS["llama"], **changes)
        names = {name for name, entry in unpacked(Checkpoint(quantized)).items() if entry.unpack}
        assert ("lm_head.weight" in names) == (kind == "quantized")
        expected = reference(plain, torch.bfloat16, names)
        with torch.no_grad(), LayeredModel.from_pretrained(quantized, device="cpu", dtype="bfloat16") as model:
            assert torch.equal(model(IDS).logits, expected(IDS).logits)
    with pytest.raises(UnsupportedError, match="it is published in few bits itself"):
        load(quantized, quantize="int8+head")


PACKAGE = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, torch.bfloat16),
    "nf4, nested": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, torch.bfloat16),
    "nf4, float32": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, torch.float32),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["o_proj"]}, torch.float16),
    "stored as bfloat16": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
         "bnb_4bit_quant_storage": "bfloat16"}, torch.bfloat16,
    ),
    "int8": ({"load_in_8bit": True}, torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("sizes", [{"intermediate_size": 1040}, {"hidden_size": 36, "intermediate_size": 57}], ids=["", "edges"])
@pytest.mark.parametrize("case", PACKAGE)
def test_what_the_package_itself_writes_is_what_it_dequantizes(tmp_path, case, sizes):
    functional = pytest.importorskip("bitsandbytes").functional
    pytest.importorskip("accelerate")
    asked, dtype = PACKAGE[case]
    if "bnb_4bit_quant_storage" in asked and "hidden_size" in sizes:
        pytest.skip("no whole numbers of that dtype")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 18} if "hidden_size" in sizes else {}
    plain = make_checkpoint(tmp_path / "plain", raw=CONFIGS["llama"], dtype=dtype, **sizes, **heads)
    config = transformers.BitsAndBytesConfig(**asked)
    transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=dtype, device_map="cpu"
    ).save_pretrained(tmp_path / "quantized")
    stored, found = tensors_of(tmp_path / "quantized"), read_all(unpacked(Checkpoint(tmp_path / "quantized")), torch.float32)
    expected = {}
    for name, tensor in stored.items():
        if name.endswith(".SCB"):
            weight = name.replace("SCB", "weight")
            expected[weight] = functional.int8_vectorwise_dequant(stored[weight], tensor)
        elif "quant_state" in name:
            weight = name.partition(".quant_state")[0]
            beside = {key: value for key, value in stored.items() if key.startswith(f"{weight}.")}
            state = functional.QuantState.from_dict(beside, device="cpu")
            # As one row: where rows are no whole blocks, the CPU kernel of 0.50.2 takes the factors of other blocks.
            shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
            assert shape == found[weight].shape
            expected[weight] = functional.dequantize_4bit(stored[weight], state).view(shape)
    assert len(expected) >= (6 if "llm_int8_skip_modules" in asked else 7) * LAYERS
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name
