"""Every family on whatever transformers is installed: exactly what the newest version gives, or a refusal that says why.

The answers of the newest version are made on the spot where that is what is installed; in the environments of older ones
(see `tests/matrix.py`), ``AIRLLM_NB_ANSWERS`` names the folder where they have been made.
"""

import contextlib
import json
import os
from pathlib import Path

import families
import measured
import pytest
import torch
import transformers
from safetensors.torch import load_file

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import longrope, versions
from airllm_nb.compat.classic import classic
from airllm_nb.errors import UnsupportedError

INSTALLED = versions.installed()
NEWEST = versions.TESTED[-1]
CLOSE = 1e-4  # float32 logits of about 10: versions add up in different orders
DTYPE = "dtype" if INSTALLED >= (5,) else "torch_dtype"


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Return a function that gives the folder of a family: ``classic/``, ``v5/`` and ``expected.safetensors``."""
    made = os.environ.get("AIRLLM_NB_ANSWERS")

    def get(name):
        if made:
            return Path(made) / "families" / name
        if transformers.__version__ != NEWEST:
            pytest.skip(f"what is right is what transformers {NEWEST} gives: run tests/matrix.py")
        folder = tmp_path_factory.getbasetemp() / "families" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            families.make(folder, name)
        return folder

    return get


def answers(model):
    for kind in families.PROMPTS:
        ids = families.prompt(kind)
        with torch.no_grad():  # not around a yield: two of these run in turn, and would leave each other's mode behind
            logits = model(ids).logits
        yield f"{kind}.logits", logits
        yield f"{kind}.tokens", families.greedy(model, ids)
    if INSTALLED >= longrope.EXACT or versions.rope_type(getattr(model.config, "rope_scaling", None)) != "longrope":
        yield "padded.tokens", families.greedy(model, families.prompt("short"), families.PADDING)


@pytest.mark.parametrize("style", families.STYLES)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_exact_or_refused(family, name, style):
    folder = family(name) / style
    raw = json.loads((folder / "config.json").read_text())
    unmet = list(versions.unmet(classic(raw), INSTALLED))
    if unmet:
        with pytest.raises(UnsupportedError) as refusal:
            LayeredModel.from_pretrained(folder, device="cpu", dtype="float32")
        assert unmet[0].what in refusal.value.cause
        assert f'%pip install -U "transformers>={versions.dotted(unmet[0].exact)}"' in refusal.value.remedy
        return
    expected = load_file(folder.parent / "expected.safetensors")
    least = plan(folder, device="cpu", dtype="float32").least
    ways = [{"memory": least}, {}, {"shared": "insist"}]
    with contextlib.ExitStack() as stack:
        # The weights are the same in both styles, and which one a config had is forgotten when they come: all ways, but once.
        streamed, *others = (
            stack.enter_context(LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", **way))
            for way in (ways if style == "classic" else ways[:1])
        )
        # Before, transformers computes with copies, which begin elsewhere in a cache line than some tensors in their files.
        assert all(mapped.plan.shared_nbytes > 0 for mapped in others[1:]) or INSTALLED < versions.MAPS_FILES
        for (key, one), *more in zip(*map(answers, (streamed, *others)), strict=True):
            assert all(torch.equal(one, other) for _, other in more), key
            assert torch.allclose(one, expected[key], rtol=0, atol=CLOSE), f"{key}: {(one - expected[key]).abs().max()}"


@pytest.mark.parametrize("name", families.FAMILIES)
def test_bit_for_bit_what_the_installed_version_computes(family, name):
    """With a config.json that the installed version reads as it is, nothing may differ from its own ``from_pretrained``."""
    folder = family(name) / "classic"
    raw = json.loads((folder / "config.json").read_text())
    if any(versions.unmet(raw, INSTALLED)):
        pytest.skip("refused on this version")
    from airllm_nb.compat.config import in_words_of

    if in_words_of(raw, INSTALLED) is not raw:
        pytest.skip("this version needs a rewritten config.json")
    options = {DTYPE: torch.float32}
    if raw.get("attn_logit_softcapping") and transformers.__version__ != NEWEST:  # all else ignores it, see the README
        options["attn_implementation"] = "eager"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as ours:
        for (key, one), (_, other) in zip(answers(ours), answers(theirs), strict=True):
            assert torch.equal(one, other), key


@pytest.mark.skipif(transformers.__version__ not in versions.TESTED, reason="the notebook shows the tested versions")
def test_the_notebook_says_how_wrong_plain_transformers_is(family):
    said = json.loads(versions.MEASURED.read_text())[transformers.__version__]
    folder = {family(name).parent for name, _ in measured.CASES.values()}.pop()
    for title, found in measured.measure(folder).items():
        assert found["airllm_nb"] == said[title]["airllm_nb"]
        assert found["transformers"] == pytest.approx(said[title]["transformers"], abs=1e-3), title
