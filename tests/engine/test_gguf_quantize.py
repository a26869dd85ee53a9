"""GGUF files that are quantized: what lies on a 4-bit grid already stays there."""

import gguf
import pytest
import torch
from gguf.quants import dequantize
from tiny_gguf import LAYERS, WIDE, make_gguf
from torch.nn.functional import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import gguf_files, versions
from airllm_nb.engine import gguf_grid
from airllm_nb.engine.packed import Int4, Int8
from airllm_nb.errors import AirLLMError, CheckpointError

pytestmark = pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="refused by this version of transformers")
IDS = torch.arange(4, 104)[None]
ON_GRID = ["Q4_0", "Q4_1", "Q4_K"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def load(path, **options):
    return LayeredModel.from_pretrained(path, **({"device": "cpu", "dtype": "float32"} | options))


def blocks(path, kind):
    reader = gguf.GGUFReader(path)
    return {tensor.name: tensor for tensor in reader.tensors if tensor.tensor_type.name == kind and len(tensor.shape) == 2}


@pytest.mark.parametrize("kind", ON_GRID)
def test_codes_are_kept_and_scales_rounded(tmp_path, kind):
    path = make_gguf(tmp_path / "llama.gguf", "llama", kind, width=WIDE, inner=WIDE)
    for name, tensor in blocks(path, kind).items():
        if not name.startswith("blk"):
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        raw = torch.from_numpy(tensor.data.copy()).view(-1)
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        packed = gguf_grid.repack(raw, tensor.tensor_type, shape)
        found = Int4(32).dense(packed, shape, torch.float32)
        if kind == "Q4_0":  # nothing is added to what is multiplied by the scale
            assert bool(((found - expected).abs() <= 2**-8 * expected.abs()).all())
        else:
            groups = expected.view(shape[0], -1, 32)
            largest = torch.maximum(groups.amax(-1) - groups.amin(-1), groups.abs().amax(-1))[..., None]
            assert bool(((found - expected).view(groups.shape).abs() <= 2**-7 * largest).all())
        # Codes of its own order, as PyTorch's kernel has them, are those of the file.
        order = torch.arange(shape[0]).flip(0)
        turned = gguf_grid.repack(raw, tensor.tensor_type, shape, order)
        assert torch.equal(Int4(32).dense(turned, shape, torch.float32), found.flip(0))


def reference(path):
    """Return transformers' model with what it makes of the file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = config.head_dim
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict(load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"], strict=False)
    return model


def divergence(expected, found):
    """Return the mean Kullback-Leibler divergence of next tokens, in nats."""
    expected, found = (log_softmax(logits[0].float(), dim=-1) for logits in (expected, found))
    return float((expected.exp() * (expected - found)).sum(dim=-1).mean())


@pytest.mark.parametrize(("architecture", "kind", "quantize"), [
    *(("llama", kind, "int4-32") for kind in ON_GRID), ("qwen2", "Q4_0", "int4-32"), ("gemma3", "Q4_0", "int4-32"),
    ("phi3", "Q4_1", "int4-32"), ("llama", "Q8_0", "int8"), ("llama", "Q4_0", "int8"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hardly_anything_is_lost(tmp_path, architecture, kind, quantize, dtype):
    path = make_gguf(tmp_path / "model.gguf", architecture, kind, width=WIDE, inner=WIDE)
    with torch.no_grad():
        expected = reference(path)(IDS).logits
        for memory in ("1GB", plan(path, device="cpu", dtype=dtype, quantize=quantize).least):
            with load(path, quantize=quantize, dtype=dtype, memory=memory) as model:
                assert sum(layer.resident for layer in model.layers) in (0, LAYERS)
                assert divergence(expected, model(IDS).logits) <= (1e-4 if quantize == "int4-32" else 5e-4)


def test_what_has_another_grid_is_rounded(tmp_path):
    path = make_gguf(
        tmp_path / "llama.gguf", "llama", "Q4_K", width=WIDE, inner=WIDE, kinds={"attn_v": "Q6_K", "ffn_down": "Q6_K"}
    )
    with torch.no_grad(), load(path, quantize="int4-32") as model:
        assert model(IDS).logits.isfinite().all()


def test_which_grids_are_kept():
    kinds = gguf.GGMLQuantizationType
    assert [kind.name for kind in kinds if gguf_grid.lies_on(kind, Int4(32))] == ON_GRID
    assert not any(gguf_grid.lies_on(kind, packing) for kind in kinds for packing in (Int4(64), Int8()))


def test_a_scale_that_is_none_is_refused(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama", "Q4_0")
    offset = int(blocks(path, "Q4_0")["blk.1.ffn_up.weight"].data_offset)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x7f")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be quantized: a weight is not finite"):
        load(path, quantize="int4-32")


@pytest.mark.parametrize("kind", ON_GRID)
def test_gptq_does_not_move_what_is_on_a_grid(tmp_path, kind):
    path = make_gguf(tmp_path / "llama.gguf", "llama", kind, width=WIDE, inner=WIDE)
    with pytest.raises(AirLLMError, match="are in 4 bits already, with the very groups of int4-32") as refused:
        plan(path, device="cpu", quantize="int4-32-gptq")
    assert refused.value.remedy == 'Load it with quantize="int4-32", which keeps their codes.'
    assert plan(path, device="cpu", quantize="int4-gptq").quantized
