"""Quantized layers: the logits of transformers with the weights that are meant, whatever stays in memory."""

import json
import os

import pytest
import torch
from tiny import CONFIGS, LAYERS, budgets, make_checkpoint
from transformers import AutoModelForCausalLM

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.engine import memory, packed_cache, pressure, probe, sharing
from airllm_nb.engine.packed_weight import PackedWeight
from airllm_nb.engine.quantize import packing_of
from airllm_nb.engine.rounding import nearest
from airllm_nb.errors import AirLLMError, CheckpointError, SharingError, UnsupportedError

IDS = torch.randint(0, 256, (1, 5), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(0, 256, (1, 120), generator=torch.Generator().manual_seed(2))
NAMES = ["int8", "int4", "int4-32"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "quantized"


def load(folder, quantize="int4", **options):
    return LayeredModel.from_pretrained(folder, **({"device": "cpu", "dtype": "float32"} | options), quantize=quantize)


def meant(folder, name):
    """Return transformers' own model with the weights that the packed ones mean."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    packing, packed = packing_of(name), 0
    for layer in model.base_model.layers:
        for module in layer.modules():
            if type(module) is torch.nn.Linear and packing.refusal(tuple(module.weight.shape)) is None:
                codes = nearest(module.weight.detach(), packing)
                module.weight.data = packing.dense(codes, tuple(module.weight.shape), torch.float32)
                packed += 1
    assert packed >= LAYERS
    return model


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "mistral"])
def test_logits_are_those_of_the_weights_that_are_meant(checkpoint, kind, name, keep):
    folder = checkpoint(kind)
    expected = meant(folder, name)
    memory = budgets(plan(folder, device="cpu", dtype="float32", quantize=name))[keep]
    with torch.no_grad(), load(folder, name, memory=memory) as model:
        stay = sum(layer.resident for layer in model.layers)
        assert {"all": stay == LAYERS, "half": 0 < stay < LAYERS, "none": stay == 0}[keep]
        for _ in range(2):
            few, reference = model(IDS).logits, expected(IDS).logits
            assert (few - reference).norm() < 0.02 * reference.norm()  # the kernels compute in bfloat16
            assert torch.equal(model(LONG).logits, expected(LONG).logits)  # so many rows do not take them


def test_layers_become_smaller_and_the_rest_stays(checkpoint):
    folder = checkpoint("llama")
    whole = plan(folder, device="cpu", dtype="bfloat16")
    for name, most in (("int8", 0.75), ("int4", 0.55)):
        small = plan(folder, device="cpu", dtype="bfloat16", quantize=name)
        assert small.always_nbytes == whole.always_nbytes
        assert sum(layer.nbytes for layer in small.layers) < most * sum(layer.nbytes for layer in whole.layers)
        assert small.checkpoint_nbytes == whole.checkpoint_nbytes


def test_the_plan_says_what_is_packed_and_what_is_not(checkpoint, home, monkeypatch):
    monkeypatch.setattr(probe, "WEIGHTS", 4_000_000)  # not of interest here, and of such small matrices 256 MB are very many
    monkeypatch.setattr(probe, "_memory", {})
    text = str(plan(checkpoint("llama"), device="cpu", quantize="int4"))
    assert "int4-64: 24 matrices of the layers, 4.50 bits a weight; 4 stay as they are" in text
    assert "down_proj.weight: 64 x 96 are no multiples of 16 x 64" in text
    assert "to be written first" in text
    assert not home.exists()  # planning writes nothing
    least = plan(checkpoint("llama"), device="cpu", dtype="float32", quantize="int4").least
    with load(checkpoint("llama"), memory=least) as model:
        assert "to be written first" not in str(model.plan)
        assert model.plan.predict(write=False) is not None  # it knows the new files


def test_packed_layers_are_written_once(checkpoint, home):
    folder, written = checkpoint("llama"), []

    def times():
        return {path.name: path.stat().st_mtime_ns for path in home.glob("*/*.safetensors")}

    with load(folder, progress=written.append) as model:
        first = model(IDS).logits
    before = times()
    assert len(before) == LAYERS
    texts = {event.text for event in written if type(event).__name__ == "Fetching"}
    assert len(texts) == 1
    assert "Quantizing" in texts.pop()
    with load(folder, progress=written.append) as model:
        assert torch.equal(model(IDS).logits, first)
    assert times() == before
    (one, *_) = home.glob("*/*.safetensors")
    one.unlink()
    with load(folder) as model:  # only that one is made again
        assert torch.equal(model(IDS).logits, first)
    assert {name for name, time in times().items() if before[name] != time} == {one.name}
    about = json.loads(next(home.glob("*/about.json")).read_text())
    assert about["quantization"] == "int4-64"


@pytest.mark.parametrize("damage", ["truncated", "other header", "longer"])
def test_a_damaged_file_is_made_again(checkpoint, home, damage):
    folder = checkpoint("llama")
    with load(folder) as model:
        expected = model(IDS).logits
    path = sorted(home.glob("*/*.safetensors"))[1]
    raw = path.read_bytes()
    path.write_bytes(
        {"truncated": raw[:-1], "longer": raw + b"x", "other header": raw.replace(b"layers.1.", b"layers.2.", 1)}[damage]
    )
    with load(folder) as model:
        assert torch.equal(model(IDS).logits, expected)
    assert path.read_bytes() == raw


def test_another_checkpoint_gets_files_of_its_own(damaged, home):
    folder = damaged("llama", shards="1GB")
    with load(folder) as model:
        before = model(IDS).logits
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5000:-4000] = bytes(1000)
    path.write_bytes(raw)
    with load(folder) as model:
        assert not torch.equal(model(IDS).logits, before)
    assert len(list(home.iterdir())) == 2


def test_an_interrupt_leaves_whole_files_only(checkpoint, home):
    folder = checkpoint("llama")
    with load(folder) as model:
        expected = model(IDS).logits
    for path in home.glob("*/*.safetensors"):
        path.unlink()

    def stop(event):
        if getattr(event, "file", "").endswith("layers.2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, progress=stop)
    assert sorted(path.name for path in home.glob("*/*") if path.suffix != ".json" and path.name != ".lock") == [
        "layer-000.safetensors", "layer-001.safetensors",
    ]  # fmt: skip
    with load(folder) as model:
        assert torch.equal(model(IDS).logits, expected)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(checkpoint, home, monkeypatch):
    def full(_descriptor):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(AirLLMError, match="No space left on device.*without quantize"):
            load(checkpoint("llama"))
    assert not [path for path in home.glob("*/*") if path.suffix in (".part", ".safetensors")]
    with LayeredModel.from_pretrained(checkpoint("llama"), device="cpu") as model:  # still usable unquantized
        assert model(IDS).logits.isfinite().all()


def test_too_little_room_is_seen_before_anything_is_written(checkpoint, home, monkeypatch):
    usage = packed_cache.shutil.disk_usage(home.parent.parent)._replace(free=1000)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(AirLLMError, match=r"cannot be written to .*: No space left on device"):
        load(checkpoint("llama"))
    assert not list(home.glob("*/*.safetensors"))


def test_weights_that_are_no_numbers_are_refused(damaged):
    folder = damaged("llama", shards="1GB")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8 : 8 + length])["model.layers.1.self_attn.q_proj.weight"]["data_offsets"]
    place = 8 + length + begin
    path.write_bytes(raw[:place] + b"\xc0\x7f" + raw[place + 2 :])  # NaN in bfloat16
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight cannot be quantized: a weight is not finite"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["int3", "int4-48", "4", "", "INT4", 4, True])
def test_what_is_no_quantization_is_refused(checkpoint, name):
    with pytest.raises(AirLLMError, match="There is no quantization"):
        plan(checkpoint("llama"), quantize=name)


def test_routers_are_left_as_they_are(checkpoint):
    """Experts that are linear layers of their own, as before version 5, are packed; their stacks: `test_packed_experts`."""
    folder = checkpoint("mixtral")
    with torch.no_grad(), load(folder, "int8") as model:
        if versions.installed() < (5,):
            assert torch.equal(model(LONG).logits, meant(folder, "int8")(LONG).logits)
        routers = [weight for name, weight in model.named_parameters() if name.endswith(".gate.weight")]
        assert len(routers) == LAYERS
        assert not any(isinstance(weight, PackedWeight) for weight in routers)
        assert any(isinstance(weight, PackedWeight) for weight in model.parameters())


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"gpt2"}))
def test_every_kind_generates(checkpoint, kind):
    with load(checkpoint(kind), dtype="bfloat16") as model:
        ids = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=257)
        assert ids.shape == (1, 9)


def test_a_model_of_which_nothing_can_be_packed_is_refused(checkpoint):
    """Those of GPT-2 are no linear layers."""
    with pytest.raises(UnsupportedError, match="Nothing of this model can be quantized"):
        plan(checkpoint("gpt2"), quantize="int8")


def test_another_checkpoint_with_the_same_times_gets_files_of_its_own(damaged, tmp_path):
    one = damaged("llama", shards="1GB")
    other = make_checkpoint(tmp_path / "other" / "damaged", "llama", shards="1GB", rms_norm_eps=1e-6)
    weights = one / "model.safetensors", other / "model.safetensors"
    (other / "config.json").write_bytes((one / "config.json").read_bytes())
    raw = weights[0].read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    noise = torch.randn((len(raw) - header) // 2, generator=torch.Generator().manual_seed(5)).mul(0.2).bfloat16()
    weights[1].write_bytes(raw[:header] + noise.view(torch.uint8).numpy().tobytes())
    for path in weights:
        os.utime(path, ns=(1, 1))
    with load(one) as model:
        expected = model(IDS).logits
    with load(other) as model:
        assert not torch.equal(model(IDS).logits, expected)


def test_layers_are_shared_only_where_nobody_could_change_them(checkpoint, home, monkeypatch):
    monkeypatch.setattr(sharing, "_danger", lambda path: "you own it" if home in path.parents else "")
    folder = checkpoint("llama")
    with pytest.raises(SharingError, match="they are not here yet, and would be files of yours"):
        load(folder, shared=True)
    with load(folder) as model:
        expected = model(IDS).logits
    with pytest.raises(SharingError, match=r"layer-000.* cannot be shared: you own it"):
        load(folder, shared=True)
    with load(folder, shared="insist", dtype="bfloat16") as model:
        assert model.plan.shared_nbytes > sum(layer.nbytes for layer in model.layers) / 2
        found = model(IDS).logits.float()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_layers_begin_to_stream_when_memory_becomes_short(checkpoint, monkeypatch):
    for name, value in (("ENOUGH", 10**15), ("SHORT", 10**15), ("INTERVAL", 0.0)):
        monkeypatch.setattr(pressure, name, value)
    missing = [0]
    monkeypatch.setattr(memory, "limits", lambda **_: {"available memory": 10**15 - missing[0]})
    with load(checkpoint("llama"), memory="1GB", progress=lambda _event: None) as model:
        model.progress = [].append
        expected = model(IDS).logits
        assert all(layer.resident for layer in model.layers)
        missing[0] = model.layers[0].nbytes
        model(IDS)
        missing[0] = 0
        assert not all(layer.resident for layer in model.layers)
        for _ in range(2):
            assert torch.equal(model(IDS).logits, expected)


def test_measured_kernels_and_quantized_layers_exclude_each_other(checkpoint):
    with pytest.raises(AirLLMError, match="Quantized layers have kernels of their own"):
        plan(checkpoint("llama"), device="cpu", quantize="int8", kernels="measured")


def test_a_home_that_nobody_has_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", "~no-such-user/x")
    with pytest.raises(AirLLMError, match="There is no folder ~no-such-user/x"):
        load(checkpoint("llama"))
