"""Checkpoints that others have quantized: what transformers makes of them when it dequantizes, whatever stays in memory."""

import json
import shutil

import pytest
import tiny_bitsandbytes as bitsandbytes
import tiny_published as published
import torch
import transformers
from safetensors.torch import load_file
from tiny import CONFIGS, LAYERS

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.published import unpacked
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.weights import ALIGN, GroupReader
from airllm_nb.errors import CheckpointError, UnsupportedError

IDS = torch.arange(4, 20)[None]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 32]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
channel, whole, group = (lambda _, columns: (1, columns)), (lambda *shape: shape), (lambda *_: (1, 32))
config = published.compressed_config
CASES = {
    "fp8": (published.fp8((16, 32)), FP8, {}),
    "fp8, edges": (published.fp8((40, 24)), FP8 | {"weight_block_size": [40, 24]}, {}),
    "fp8, bfloat16 factors": (published.fp8((16, 32), factor=torch.bfloat16), FP8 | {"scale_fmt": "ue8m0"}, {}),
    "fp8, one factor": (published.fp8(None, static=True), FP8 | {"weight_block_size": None, "activation_scheme": "static"}, {}),
    "fp8, default block": (published.fp8((128, 128)), {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}, {}),
    "fp8, experts": (published.fp8((16, 32)), FP8, {"raw": CONFIGS["mixtral"]}),
    "float, channels": (published.compressed("float", 8, channel), config("float-quantized", "float", 8, "channel"), {}),
    "float, one factor": (
        published.compressed("float", 8, whole, scale=(1,)), config("float-quantized", "float", 8, "tensor"), {}
    ),
    "float, blocks": (
        published.compressed("float", 8, lambda *_: (40, 24)),
        config("float-quantized", "float", 8, "block", block_structure=[40, 24]), {},
    ),
    "int8, channels": (published.compressed("int", 8, channel), config("int-quantized", "int", 8, "channel"), {}),
    "int8, zero points, experts": (
        published.compressed("int", 8, channel, symmetric=False), config("int-quantized", "int", 8, "channel", symmetric=False),
        {"raw": CONFIGS["mixtral"]},
    ),
    "naive int4": (published.compressed("int", 4, group), config("naive-quantized", "int", 4, "group", group_size=32), {}),
    "packed int4": (
        published.compressed("int", 4, group, packed=True), config("pack-quantized", "int", 4, "group", group_size=32), {}
    ),
    "packed int4, zero points": (
        published.compressed("int", 4, group, packed=True, symmetric=False, factor=torch.float32),
        config("pack-quantized", "int", 4, "group", group_size=32, symmetric=False), {},
    ),
    "packed int8, float16": (
        published.compressed("int", 8, channel, packed=True, symmetric=False, factor=torch.float16),
        config("pack-quantized", "int", 8, "channel", symmetric=False), {"dtype": torch.float16},
    ),
    "gptq": (published.gptq(32), GPTQ, {"dtype": torch.float16}),
    "gptq, any order": (published.gptq(32, any_order=True), GPTQ | {"desc_act": True}, {"raw": CONFIGS["mixtral"]}),
    "gptq, one group": (
        published.gptq(96, factor=torch.bfloat16), GPTQ | {"group_size": -1}, {"hidden_size": 96, "head_dim": 24}
    ),
    "gptq, 8 bits": (
        published.gptq(32, bits=8, any_order=True, factor=torch.bfloat16), GPTQ | {"bits": 8, "desc_act": True}, {}
    ),
    "gptq, second version": (published.gptq(32, less=0), GPTQ | {"checkpoint_format": "gptq_v2"}, {}),
    "gptq, second version, 8 bits": (
        published.gptq(64, bits=8, less=0), GPTQ | {"bits": 8, "group_size": 64, "format": "gptq_v2"}, {"intermediate_size": 128}
    ),
    "awq": (published.awq(32), AWQ, {"dtype": torch.float16}),
    "nf4": (bitsandbytes.four_bits("nf4"), bitsandbytes.config(4), {}),
    "nf4, nested, experts": (
        bitsandbytes.four_bits("nf4", nested=True), bitsandbytes.config(4, nested=True), {"raw": CONFIGS["mixtral"]}
    ),
    "nf4, nested, stored as bfloat16": (
        bitsandbytes.four_bits("nf4", nested=True, storage=torch.bfloat16),
        bitsandbytes.config(4, nested=True, bnb_4bit_quant_storage="bfloat16"), {"intermediate_size": 1040},
    ),
    "fp4, float16, edges": (
        bitsandbytes.four_bits("fp4", 128, dtype=torch.float16), bitsandbytes.config(4, "fp4"),
        {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 18, "intermediate_size": 57},
    ),
    "nf4, float32": (bitsandbytes.four_bits("nf4", 4096, dtype=torch.float32), bitsandbytes.config(4), {}),
    "LLM.int8()": (bitsandbytes.eight_bits(), bitsandbytes.config(8), {"dtype": torch.float16}),
    "LLM.int8(), older": (
        bitsandbytes.eight_bits(order=None), {"load_in_8bit": True, "llm_int8_threshold": 6.0}, {"raw": CONFIGS["mixtral"]}
    ),
    "mxfp4": (published.mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, {"raw": published.GPT_OSS}),
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a function that gives the folders of a quantized checkpoint and of its twin. Read only."""
    folders = {}

    def get(case):
        if case not in folders:
            quantize, config, options = CASES[case]
            if options.get("raw", {}).get("model_type") == "gpt_oss" and versions.installed() < (4, 57):
                pytest.skip("refused by this version of transformers")
            folders[case] = published.publish(tmp_path_factory.mktemp("published"), quantize, config, **options)
        return folders[case]

    return get


def load(path, **options):
    return LayeredModel.from_pretrained(path, **({"device": "cpu", "dtype": "float32"} | options))


def reference(path, dtype, dequantized=()):
    """Return transformers' model; what it would have dequantized lies in memory of its own, not where the file has it."""
    named = {"dtype" if versions.installed() >= (5,) else "torch_dtype": dtype}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **named).eval()
    for name, parameter in model.named_parameters():
        if name in dequantized:
            parameter.data = parameter.data.clone()
    return model


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_all(checkpoint, dtype):
    reader = Reader(checkpoint)
    found = {name: torch.empty(entry.shape, dtype=dtype) for name, entry in checkpoint.items()}
    for name, entry in checkpoint.items():
        GroupReader(checkpoint, reader).read([entry], found[name], keep_cached=True)
    reader.close()
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_weight_is_unpacked_as_it_is_defined(made, case, dtype):
    quantized, plain = made(case)
    meant = tensors_of(plain)
    found = read_all(unpacked(Checkpoint(quantized)), dtype)
    assert found.keys() == meant.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, meant[name].to(dtype)), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streaming"])
def test_logits_are_those_of_the_plain_twin(made, case, dtype, streams):
    quantized, plain = made(case)
    expected = reference(plain, dtype, {name for name, entry in unpacked(Checkpoint(quantized)).items() if entry.unpack})
    memory = plan(quantized, device="cpu", dtype=dtype).least if streams else "1GB"
    with torch.no_grad(), load(quantized, dtype=dtype, memory=memory) as model:
        assert not streams or not any(layer.resident for layer in model.layers)
        for _ in range(2):
            assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert not hasattr(model.config, "quantization_config")


def dequantized_by_transformers(tensors, dtype):
    """Return the fp8 weights as transformers' own operation gives them."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    operation = getattr(fp8, "Fp8Dequantize", None)
    if not hasattr(operation, "_dequantize_one"):
        pytest.skip("this version of transformers dequantizes otherwise, or not at all")
    return {
        name: operation(None)._dequantize_one(tensor, tensors[f"{name}_scale_inv"], output_dtype=dtype)
        for name, tensor in tensors.items()
        if f"{name}_scale_inv" in tensors
    }


@pytest.mark.parametrize("case", ["fp8", "fp8, bfloat16 factors", "fp8, one factor", "fp8, default block", "fp8, experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_what_transformers_dequantizes(made, case, dtype):
    quantized, _ = made(case)
    expected = dequantized_by_transformers(tensors_of(quantized), dtype)
    found = read_all(unpacked(Checkpoint(quantized)), dtype)
    assert len(expected) >= 7 * LAYERS
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", [case for case, (_, config, _) in CASES.items() if "config_groups" in config])
def test_compressed_tensors_itself_gives_the_same_numbers(made, case):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantized, _ = made(case)
    described = json.loads((quantized / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(described).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(described["format"])
    stored, found = tensors_of(quantized), read_all(unpacked(Checkpoint(quantized)), torch.float32)
    stems = [name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")]
    assert len(stems) >= 7 * LAYERS
    for stem in stems:
        beside = {f"weight{name.removeprefix(stem)}": tensor for name, tensor in stored.items() if name.startswith(stem)}
        assert torch.equal(found[stem], compressor.decompress(beside, scheme)["weight"].float()), stem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mxfp4_is_what_transformers_dequantizes(tmp_path, dtype):
    """Every byte with every exponent, those that overflow and the one that stands for no number among them."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    name = "model.layers.0.mlp.experts.down_proj"
    published.save_sharded(tmp_path, [{f"{name}_blocks": blocks}, {f"{name}_scales": scales}])
    (tmp_path / "config.json").write_text(json.dumps(published.GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}))
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    found = read_all(unpacked(Checkpoint(tmp_path)), dtype)[name]
    assert torch.equal(found.nan_to_num(-1e4), expected.nan_to_num(-1e4))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("case", CASES)
def test_transformers_itself_gives_the_same_logits(made, case):
    pytest.importorskip("accelerate", reason="from_pretrained needs it for quantized checkpoints")
    if "load_in_8bit" in CASES[case][1]:
        pytest.skip("bitsandbytes multiplies otherwise")
    if "config_groups" in CASES[case][1]:
        pytest.importorskip("compressed_tensors")
    if versions.installed() < (5, 23) or case in {"fp8, edges", "int8, zero points, experts"} or "gptq" in case or case == "awq":
        pytest.skip("transformers does not dequantize this")
    quantized, _ = made(case)
    expected = reference(quantized, torch.bfloat16)
    with torch.no_grad(), load(quantized, dtype="bfloat16") as model:
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("case", ["fp8", "mxfp4"])
def test_a_plan_has_packed_bytes_on_disk_and_unpacked_ones_in_memory(made, case):
    quantized, plain = made(case)
    ours, theirs = plan(quantized, device="cpu", dtype="bfloat16"), plan(plain, device="cpu", dtype="bfloat16")
    assert abs(ours.total_nbytes - theirs.total_nbytes) < ALIGN * len(tensors_of(plain))  # each begins where its file has it
    assert ours.checkpoint_nbytes == sum(tensor.nbytes for tensor in tensors_of(quantized).values())
    least = plan(quantized, device="cpu", dtype="bfloat16", memory=ours.least)
    on_disk = sum(tensor.nbytes for name, tensor in tensors_of(quantized).items() if ".layers." in name)
    assert sum(entry.nbytes for entry in least.work.streamed) == on_disk
    assert least.streamed_nbytes == sum(least.work.read) == (on_disk if least.experts is None else sum(least.work.read))


def test_planned_from_headers_alone(made, tmp_path):
    quantized, _ = made("fp8")
    shutil.copy(quantized / "config.json", tmp_path)
    shutil.copy(quantized / "model.safetensors.index.json", tmp_path)
    headers = {}
    for path in quantized.glob("*.safetensors"):
        raw = path.read_bytes()
        headers[path.name] = len(raw), raw[: 8 + int.from_bytes(raw[:8], "little")]
    remote, local = unpacked(Checkpoint(tmp_path, headers)), unpacked(Checkpoint(quantized))
    assert [(entry.name, entry.shape, entry.offset) for entry in remote.values()] == [
        (entry.name, entry.shape, entry.offset) for entry in local.values()
    ]


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_what_is_unpacked_can_be_quantized_anew(made, tmp_path, monkeypatch, bits):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path))
    quantized, plain = made("fp8")
    with torch.no_grad(), load(plain, quantize=bits) as model:
        expected = model(IDS).logits
    with torch.no_grad(), load(quantized, quantize=bits) as model:
        assert torch.equal(model(IDS).logits, expected)


@pytest.fixture
def damaged(made, tmp_path):
    """Return a function that gives a copy of a quantized checkpoint whose tensors and config were changed."""

    def get(case, change=lambda _: None, config=None, **fields):
        folder = shutil.copytree(made(case)[0], tmp_path / "damaged")
        published.rewrite(folder, change)
        raw = json.loads((folder / "config.json").read_text())
        raw["quantization_config"] = (raw["quantization_config"] if config is None else config) | fields
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return get


Q = "model.layers.1.self_attn.q_proj.weight"
STEM = Q.removesuffix(".weight")
DOWN = "model.layers.1.mlp.experts.down_proj"


def changed(**fields):
    groups = config("pack-quantized", "int", 4, "group", group_size=32)["config_groups"]
    groups["group_0"]["weights"] |= fields
    return groups


def reshaped(name, *shape):
    return lambda tensors: tensors.update({name: tensors[name].reshape(-1)[:1].expand(shape).contiguous()})


def cast(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("fp8", lambda t: t.pop(f"{Q}_scale_inv"), f"{Q}_scale_inv is missing, which belongs to {Q}"),
        ("fp8", lambda t: t.pop(Q), f"{Q} is missing, which belongs to {Q}_scale_inv"),
        ("fp8", cast(Q, torch.bfloat16), f"{Q} is bfloat16, not quantized, and {Q}_scale_inv belongs to it"),
        ("fp8", cast(Q, torch.float8_e5m2), f"{Q} is float8_e5m2, not quantized"),
        ("fp8", cast(f"{Q}_scale_inv", torch.uint8), "is uint8 and should be float32 or bfloat16 or float16"),
        ("fp8", reshaped(f"{Q}_scale_inv", 4, 3), r"has shape (4, 3), and config.json asks for (4, 2)"),
        ("fp8", reshaped(f"{Q}_scale_inv", 1), r"has shape (1,), and config.json asks for (4, 2)"),
        ("fp8", reshaped(Q, 64), "should be a matrix"),
        ("fp8, one factor", reshaped(f"{Q}_scale_inv", 64, 1), "has shape (64, 1), and config.json asks for () or (1,)"),
        ("fp8, one factor", lambda t: t.pop(Q), f"{Q} is missing"),
        ("int8, channels", lambda t: t.pop(f"{Q}_scale"), f"{Q}_scale is missing, which belongs to {Q}"),
        ("int8, channels", cast(Q, torch.float8_e4m3fn), f"{Q} is float8_e4m3fn, not quantized"),
        ("int8, channels", reshaped(f"{Q}_scale", 1), "has shape (1,), and config.json asks for (64, 1)"),
        ("int8, channels", lambda t: t.update({f"{Q}_zero_point": torch.zeros(64, 1)}), "says that there are none (symmetric)"),
        ("float, one factor", reshaped(f"{Q}_scale", 64, 1), "has shape (64, 1), and config.json asks for () or (1,)"),
        ("packed int4", lambda t: t.pop(f"{Q}_shape"), f"{Q}_shape is missing"),
        ("packed int4", cast(f"{Q}_packed", torch.int64), f"{Q}_packed is int64, not quantized"),
        ("packed int4", reshaped(f"{Q}_packed", 64, 7), "56 columns of a weight are no whole groups of 32"),
        ("packed int4", reshaped(f"{Q}_packed", 60, 8), "has shape (64, 2), and config.json asks for (60, 2)"),
        ("packed int4", lambda t: t.update({Q: torch.zeros(64, 64)}), f"{Q} is there twice, plain and quantized"),
        ("packed int4", lambda t: t.update({f"{Q}_shape": torch.tensor([64, 60])}), f"{Q}_shape says [64, 60], and the numbers"),
        ("packed int4, zero points", lambda t: t.pop(f"{Q}_zero_point"), f"{Q}_zero_point is missing"),
        ("packed int4, zero points", reshaped(f"{Q}_zero_point", 64, 2), "has shape (64, 2), and config.json asks for (8, 2)"),
        ("gptq", lambda t: t.pop(f"{STEM}.g_idx"), f"{STEM}.g_idx is missing"),
        ("gptq", lambda t: t.pop(f"{STEM}.qweight"), f"{STEM}.qweight is missing"),
        ("gptq", cast(f"{STEM}.scales", torch.float32), "is float32 and should be float16 or bfloat16"),
        ("gptq", reshaped(f"{STEM}.qzeros", 2, 64), "has shape (2, 64), and config.json asks for (2, 8)"),
        ("gptq", reshaped(f"{STEM}.qweight", 7, 64), "56 inputs in groups of 32"),
        ("gptq", lambda t: t[f"{STEM}.g_idx"].fill_(1), f"The g_idx of {STEM}.qweight is not what config.json says"),
        ("gptq, any order", lambda t: t[f"{STEM}.g_idx"].fill_(2), f"The g_idx of {STEM}.qweight is not what config.json says"),
        ("gptq, any order", lambda t: t[f"{STEM}.g_idx"].fill_(-1), f"The g_idx of {STEM}.qweight is not what config.json says"),
        ("awq", lambda t: t.pop(f"{STEM}.qzeros"), f"{STEM}.qzeros is missing"),
        ("awq", reshaped(f"{STEM}.qweight", 64, 7), "has shape (2, 8), and config.json asks for (2, 7)"),
        ("awq", lambda t: t.update({f"{STEM}.weight": torch.zeros(64, 64)}), f"{Q} is there twice, plain and quantized"),
        ("mxfp4", lambda t: t.pop(f"{DOWN}_scales"), f"{DOWN}_scales is missing"),
        ("mxfp4", lambda t: t.pop(f"{DOWN}_blocks"), f"{DOWN}_blocks is missing"),
        ("mxfp4", cast(f"{DOWN}_scales", torch.int8), "is int8 and should be uint8"),
        ("mxfp4", reshaped(f"{DOWN}_scales", 4, 64, 4), "has shape (4, 64, 4), and config.json asks for (4, 64, 3)"),
        ("mxfp4", reshaped(f"{DOWN}_blocks", 4, 64, 3, 8), "has shape (4, 64, 3, 8), and config.json asks for (4, 64, 3, 16)"),
        ("mxfp4", reshaped(f"{DOWN}_blocks", 4, 64, 48), "is no stack of experts of gpt-oss"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(damaged, case, change, said):
    with pytest.raises(CheckpointError) as error:
        load(damaged(case, change))
    assert said in error.value.cause


@pytest.mark.parametrize(
    ("case", "fields", "said"),
    [
        ("fp8", {"activation_scheme": "odd"}, 'with activation_scheme "odd"'),
        ("fp8", {"fmt": "e5m2"}, 'with fmt "e5m2"'),
        ("fp8", {"scale_fmt": "int"}, 'with scale_fmt "int"'),
        ("fp8", {"expert_dtype": "fp4"}, 'with expert_dtype "fp4"'),
        ("fp8", {"modules_to_convert": ["embed"]}, "with modules_to_convert"),
        ("fp8", {"modules_to_not_convert": "lm_head"}, "with modules_to_not_convert"),
        ("fp8", {"weight_block_size": [16]}, "with weight_block_size [16]"),
        ("fp8", {"weight_block_size": [16, 0]}, "with weight_block_size [16, 0]"),
        ("fp8", {"weight_block_size": [True, 16]}, "with weight_block_size [true, 16]"),
        ("fp8", {"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
        ("fp8", {"sparsity_config": {"format": "dense"}}, "with sparsity_config"),
        ("fp8", {"quant_method": "mxfp4"}, "quantized (mxfp4) with activation_scheme"),
        ("fp8", {"quant_method": "aqlm"}, "quantized (aqlm), which this engine does not read"),
        ("fp8", {"quant_method": ["fp8"]}, "quantized (['fp8'])"),
        ("packed int4", {"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
        ("packed int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity_config"),
        ("packed int4", {"quantization_status": "frozen"}, 'with quantization_status "frozen"'),
        ("packed int4", {"format": "marlin-24"}, 'with format "marlin-24"'),
        ("packed int4", {"transform_config": {"config_groups": {"u": {}}}}, "with transform_config"),
        ("packed int4", {"config_groups": {}}, "with config_groups that do not say how"),
        ("packed int4", {"config_groups": {"group_0": {"targets": ["Linear"]}}}, "with config_groups that do not say how"),
        *(("packed int4", {"config_groups": changed(**fields)}, said) for fields, said in [
            ({"actorder": "group"}, "with config_groups"),
            ({"dynamic": True}, "with config_groups"),
            ({"nonsense": 1}, "with config_groups"),
            ({"num_bits": 3}, "with weights of num_bits 3, type int"),
            ({"type": "float"}, "with weights of num_bits 4, type float"),
            ({"strategy": "channel"}, "with weights of num_bits 4, type int, symmetric True, strategy channel, group_size 32"),
            ({"strategy": None}, "with weights of"),
            ({"group_size": -1}, "with weights of"),
            ({"block_structure": [1, 2]}, "with weights of"),
            ({"symmetric": False, "strategy": "tensor", "group_size": None}, "with weights of"),
        ]),
        ("packed int4", {"config_groups": changed() | {"group_1": changed(num_bits=8)["group_0"]}}, "in different ways"),
        ("float, channels", {"config_groups": config("", "float", 8, "channel", symmetric=False)["config_groups"]}, "weights of"),
        ("gptq", {"bits": 3}, "with bits 3"),
        ("gptq", {"checkpoint_format": "gptq_p"}, 'with checkpoint_format "gptq_p"'),
        ("gptq", {"checkpoint_format": "gptq_v2", "format": "gptq"}, "checkpoint_format and format contradict each other"),
        ("gptq", {"dynamic": {"-:.*down": {}, "+:.*up": {"bits": 8}}}, "with dynamic"),
        ("gptq", {"rotation": "hadamard"}, 'with rotation "hadamard"'),
        ("awq", {"desc_act": True}, "with desc_act true"),
        ("gptq", {"desc_act": None}, "and desc_act is not said"),
        ("gptq", {"group_size": 0}, "with group_size 0"),
        ("awq", {"version": "gemv"}, 'with version "gemv"'),
        ("awq", {"zero_point": False}, "with zero_point false"),
        ("awq", {"bits": True}, "with bits true"),
        ("mxfp4", {"rotation": 1}, "quantized (mxfp4) with rotation 1"),
    ],
)  # fmt: skip
def test_what_a_config_says_and_we_do_not_know_is_refused(damaged, case, fields, said):
    with pytest.raises(UnsupportedError) as error:
        load(damaged(case, **fields))
    assert said in error.value.cause
    assert "Use the checkpoint with bfloat16" in error.value.remedy


MODULES = {"-:.*layers\\.9\\..*": {}, "lm_head": {}}
PACKAGES = {
    "GPTQModel 4.0": ("gptq", {"hyb_act": False, "pack_dtype": "int32", "lm_head": False, "checkpoint_format": "gptq"}),
    "GPTQModel 5.6": ("gptq", {"dynamic": MODULES, "format": "gptq", "checkpoint_format": "gptq", "pack_impl": "cpu"}),
    "GPTQModel 7": ("gptq", {"dynamic": MODULES, "method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "meta": {}}),
    "GPTQModel 7, awq": (
        "awq", {"method": "awq", "format": "gemm", "checkpoint_format": "gemm", "desc_act": False, "sym": False, "lm_head": False,
                "pack_dtype": "int32", "meta": {"a": 1}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_fields_that_packages_write_beside_change_nothing(made, damaged, package):
    case, fields = PACKAGES[package]
    expected = read_all(unpacked(Checkpoint(made(case)[0])), torch.float32)
    found = read_all(unpacked(Checkpoint(damaged(case, **fields))), torch.float32)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_config_that_contradicts_its_weights_is_refused(damaged):
    with pytest.raises(CheckpointError, match=r"q_proj is quantized, and config.json says that it is not"):
        load(damaged("fp8", modules_to_not_convert=["lm_head", "self_attn.q_proj"]))


def test_plain_weights_that_are_said_to_be_quantized_are_refused(made, tmp_path):
    folder = shutil.copytree(made("fp8")[1], tmp_path / "plain")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": FP8}))
    with pytest.raises(UnsupportedError, match=r"quantized \(fp8\), says config.json, and none of its tensors is"):
        load(folder)


def test_gptq_of_a_model_that_has_its_matrices_transposed_is_refused(tmp_path):
    """A square matrix would have the shape that it should have."""

    def quantize(name, weight):
        if not name.endswith("attn.c_proj.weight"):
            return None
        tensors, meant = published.gptq(32)(f".layers.{name}", weight.T)
        return {key.removeprefix(".layers."): tensor for key, tensor in tensors.items()}, meant.T

    quantized, _ = published.publish(tmp_path, quantize, GPTQ, raw=CONFIGS["gpt2"])
    with pytest.raises(UnsupportedError, match="those of gpt2 are stored transposed"):
        load(quantized)


def test_mxfp4_of_another_model_is_refused(made, tmp_path):
    folder = shutil.copytree(made("fp8")[0], tmp_path / "other")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UnsupportedError, match="which is read of gpt_oss, and this is 'llama'"):
        load(folder)


def test_code_of_its_own_gets_no_unpacked_weights(damaged):
    folder = damaged("fp8")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(UnsupportedError, match="brings its own code, and weights that are quantized"):
        load(folder, trust_remote_code=True)


def test_factors_that_are_no_numbers_are_unpacked_to_none(damaged):
    def change(tensors):
        tensors[f"{Q}_scale_inv"][1, 0] = torch.nan

    found = read_all(unpacked(Checkpoint(damaged("fp8", change))), torch.float32)
    assert torch.equal(found[Q].isnan().nonzero(), torch.cartesian_prod(torch.arange(16, 32), torch.arange(32)))


def test_an_empty_matrix_is_unpacked_to_nothing(damaged):
    def change(tensors):
        tensors["model.layers.9.x.weight"] = torch.empty(0, 32, dtype=torch.float8_e4m3fn)
        tensors["model.layers.9.x.weight_scale_inv"] = torch.empty(0, 1)

    found = read_all(unpacked(Checkpoint(damaged("fp8", change))), torch.float32)
    assert found["model.layers.9.x.weight"].shape == (0, 32)


def test_a_file_with_factors_that_changes_is_noticed(made, tmp_path):
    folder = shutil.copytree(made("fp8")[0], tmp_path / "changing")
    with load(folder, memory=plan(folder, device="cpu", dtype="float32").least) as model:
        model(IDS)
        path = folder / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors was (replaced|truncated)"):
            for _ in range(3):
                model(IDS)


@pytest.mark.parametrize("stored", ["same", "other factors"])
def test_a_tied_head_is_one_only_if_its_factors_are_too(made, tmp_path, stored):
    """Both are stored: transformers ties them where they are equal, and only there."""
    plain, quantize = made("fp8")[1], published.fp8((16, 32))
    meant = tensors_of(plain)
    tensors = {}
    for name, weight in meant.items():
        found = quantize("model.layers.0.x.weight", weight) if weight.dim() == 2 else None
        tensors |= {name: weight} if found is None else dict(zip((name, f"{name}_scale_inv"), found[0].values(), strict=True))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    factors = tensors["model.embed_tokens.weight_scale_inv"]
    tensors["lm_head.weight_scale_inv"] = factors.clone() if stored == "same" else factors * 2
    published.save_sharded(tmp_path, [tensors])
    raw = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True, "quantization_config": FP8}))
    with torch.no_grad(), load(tmp_path) as model:
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert torch.equal(head, embedding if stored == "same" else embedding * 2)
        assert (head.data_ptr() == embedding.data_ptr()) == (stored == "same")


def test_a_zero_point_that_readers_take_differently_is_refused(damaged):
    with pytest.raises(UnsupportedError, match="is 15, which is 16 to some readers and 0 to others"):
        load(damaged("gptq", lambda tensors: tensors[f"{STEM}.qzeros"].fill_(-1)))


def with_biases(value):
    """Return a change that gives each quantized layer a bias, as AutoGPTQ before 0.5 did."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name.replace("scales", "bias")] = torch.full(tensors[name].shape[1:], value, dtype=torch.float16)

    return change


@pytest.mark.parametrize("case", ["gptq", "gptq, any order"])
def test_biases_of_zeros_that_a_model_has_no_place_for_are_left_out(made, damaged, tmp_path, monkeypatch, case):
    with torch.no_grad(), load(made(case)[0]) as model:
        expected = model(IDS).logits
    folder = damaged(case, with_biases(0.0))
    with torch.no_grad(), load(folder) as model:
        assert torch.equal(model(IDS).logits, expected)
    raw = (folder / "model.safetensors").read_bytes()
    headers = {"model.safetensors": (len(raw), raw[: 8 + int.from_bytes(raw[:8], "little")])}
    (tmp_path / "remote").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "remote")
    monkeypatch.setattr("airllm_nb.engine.hub.locate_headers", lambda *_, **__: (tmp_path / "remote", headers))
    assert plan("org/name", device="cpu").total_nbytes == plan(folder, device="cpu").total_nbytes


@pytest.mark.parametrize("value", [2.0**-24, torch.nan])
def test_other_biases_that_a_model_has_no_place_for_are_refused(damaged, value):
    with pytest.raises(CheckpointError, match=r"tensors that its model has no place for: .*\.bias"):
        load(damaged("gptq", with_biases(value)))


def test_a_bias_of_zeros_beside_a_plain_weight_or_of_another_size_is_refused(damaged):
    for name, size in (("model.norm.bias", 64), (f"{STEM}.bias", 63)):
        folder = damaged("gptq", lambda tensors, name=name, size=size: tensors.update({name: torch.zeros(size)}))
        with pytest.raises(CheckpointError, match=f"has no place for: {name}"):
            load(folder)
        shutil.rmtree(folder)


def test_a_bias_that_the_model_has_is_one_whatever_it_is(tmp_path):
    quantized, plain = published.publish(tmp_path, published.gptq(32), GPTQ, raw=CONFIGS["qwen2"])
    assert f"{STEM}.bias" in tensors_of(quantized)
    published.rewrite(quantized, lambda tensors: tensors[f"{STEM}.bias"].zero_())
    weights = tensors_of(plain)
    weights[f"{STEM}.bias"].zero_()
    published.save_file(weights, plain / "model.safetensors", {"format": "pt"})
    with torch.no_grad(), load(plain) as model:
        expected = model(IDS).logits
    with torch.no_grad(), load(quantized) as model:
        assert torch.equal(model(IDS).logits, expected)


def test_a_quantized_head_is_unpacked_and_not_packed_again(tmp_path):
    def quantize(name, weight):
        if (found := published.fp8((16, 32))(name.replace("lm_head", "model.layers.0.lm_head"), weight)) is None:
            return None
        return {key.replace("model.layers.0.lm_head", "lm_head"): tensor for key, tensor in found[0].items()}, found[1]

    quantized, plain = published.publish(tmp_path, quantize, FP8, vocab_size=272)
    expected = reference(plain, torch.bfloat16)
    with torch.no_grad(), load(quantized, dtype="bfloat16") as model:
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    with pytest.raises(UnsupportedError, match="it is published in few bits itself"):
        load(quantized, quantize="int8+head")


def test_float8_that_nobody_tells_how_to_unpack_is_refused(damaged):
    """A stack of experts, whose factors have another name; and a tensor of a checkpoint that says nothing of it."""

    def stack(tensors):
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = tensors[Q][None].clone()
        tensors["model.layers.0.mlp.experts.gate_up_proj_scale_inv"] = torch.ones(1, 1, 1)

    with pytest.raises(UnsupportedError, match=r"gate_up_proj(_scale_inv)? .* is quantized in a way that is not read"):
        load(folder := damaged("fp8", stack))
    shutil.rmtree(folder)
    folder = damaged("fp8", lambda tensors: tensors.pop(f"{Q}_scale_inv"))
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match="is quantized in a way that is not read"):
        load(folder)
