"""Which parameters stack experts, and that a conversion which only joins tensors is known as one."""

import families
import pytest
import torch
from tiny import make_checkpoint

from airllm_nb.compat import experts, keys, versions
from airllm_nb.engine import skeleton
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.expert_stacks import split
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.weights import GroupReader

FUSED = versions.installed() >= (5,)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function that gives a family's checkpoint, and its model without weights."""
    made = {}

    def get(name):
        if name not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp(name), raw=families.FAMILIES[name], dtype=torch.float32)
            made[name] = Checkpoint(folder), skeleton.build(folder, Checkpoint(folder), torch.float32, CPU)
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "layers", "per_token"), [("mixtral", 4, 2), ("qwen3-moe", 4, 2), ("gpt-oss", 4, 2), ("llama", 0, None)]
)
def test_stacks(build, name, layers, per_token):
    if any(versions.unmet(families.FAMILIES[name], versions.installed())):
        pytest.skip("refused on this version")
    checkpoint, built = build(name)
    found = experts.stacks(built.model)
    assert [path.rpartition(".")[2] for module in found for path in module] == ["gate_up_proj", "down_proj"] * (
        layers if FUSED else 0
    )
    assert experts.per_token(built.model.config) == per_token
    lean, stacks = split(built, checkpoint)
    assert len(stacks) == (2 * layers if FUSED else 0)
    assert (lean is built) == (not stacks)
    for layer, whole in zip(lean.layers, built.layers, strict=True):
        assert whole.group.weights.keys() - layer.group.weights.keys() == {
            s.name for s in stacks if s.name in whole.group.weights
        }


@pytest.mark.skipif(not FUSED, reason="transformers 4 fuses nothing")
def test_a_class_without_the_mark_keeps_its_layers_whole(build):
    checkpoint, built = build("llama4")
    assert experts.stacks(built.model) == []
    assert split(built, checkpoint) == (built, ())


@pytest.mark.skipif(not FUSED, reason="transformers 4 fuses nothing")
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_what_is_joined_is_what_transformers_converts(build, name):
    checkpoint, built = build(name)
    groups = GroupReader(checkpoint, Reader(checkpoint))
    joined = 0
    for layer in built.layers:
        views = layer.group.views(buffer := torch.empty(layer.group.nbytes, dtype=torch.uint8))
        groups.fill(layer.group, buffer, keep_cached=True)
        for recipe in layer.group.recipes:
            if recipe.joined:
                sources = {}
                for source in recipe.sources:
                    sources[source] = torch.empty(checkpoint[source].shape)
                    groups.read([checkpoint[source]], sources[source], keep_cached=True)
                for target, tensor in recipe.convert(sources).items():
                    assert torch.equal(views[target], tensor)
                    joined += 1
    assert joined >= 6


def test_only_joining_is_joining():
    shapes = {"a": 2, "b": 2}
    assert keys._joined(lambda t: {"x": torch.stack([t["b"], t["a"]])}, shapes) == ("b", "a")
    assert keys._joined(lambda t: {"x": torch.cat([t["a"], t["b"]])}, shapes) == ("a", "b")
    assert keys._joined(lambda t: {"x": torch.cat([t["a"], t["b"]], dim=1)}, shapes) is None
    assert keys._joined(lambda t: {"x": torch.stack([t["a"].T, t["b"].T])}, shapes) is None
    assert keys._joined(lambda t: {"x": t["a"]}, shapes) is None
    assert keys._joined(lambda t: {"x": torch.cat([t["a"], t["a"], t["b"]])}, shapes) is None
    assert keys._joined(lambda t: {"x": torch.cat([t["a"], t["b"]]) + 1}, shapes) is None
    assert keys._joined(lambda t: {"x": t["a"].view(3, 5)}, shapes) is None


def test_what_moves_nothing_of_the_smallest_tensors_is_no_joining():
    def interleave(tensors):
        return {"x": tensors["a"].unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)}

    def rope(heads):
        def permute(tensors):
            rows, columns = tensors["a"].shape
            return {"x": tensors["a"].view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)}

        return permute

    two = torch.arange(8).view(2, 4)
    for convert in (interleave, rope(1)):
        assert torch.equal(convert({"a": two})["x"], two)
        assert keys._joined(convert, {"a": 2}) is None
    assert keys._joined(rope(4), {"a": 2}) is keys._joined(rope(6), {"a": 2}) is None
