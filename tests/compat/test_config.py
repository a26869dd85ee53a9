"""From config.json to transformers' config: what is refused, what is rewritten, and that nothing in the file can do harm."""

import json
import sys
import time

import pytest
import tiny

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import config, versions
from airllm_nb.compat.classic import classic, fit_to, inexpressible
from airllm_nb.compat.wellformed import faults
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

INSTALLED = versions.installed()
LLAMA, MISTRAL = tiny.CONFIGS["llama"], tiny.CONFIGS["mistral"]
V4, V5 = (4, 57, 6), (5, 0, 0)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


def kind(model_type, **fields):
    return {"model_type": model_type, **fields}


# What a version computes wrongly, or does not have

REFUSED = [  # config.json, a version that is refused, one that is not, what the refusal names
    (kind("qwen2", rope_scaling=LINEAR), (4, 43, 4), (4, 45), "a scaled rotary embedding of Qwen2"),
    (kind("qwen2", rope_scaling={"type": "yarn", "factor": 4.0}), (4, 48, 3), (4, 51, 3), "yarn's rotary embedding"),
    (kind("qwen2", rope_parameters=YARN), (4, 48, 3), (4, 51, 3), "yarn's rotary embedding"),
    (kind("llava", text_config=kind("qwen2", rope_parameters=YARN)), (4, 48, 3), (4, 51, 3), "yarn's rotary embedding"),
    (kind("gemma3", text_config=kind("gemma3_text")), (4, 50, 3), (4, 51, 3), "Gemma 3"),
    (kind("gemma2"), (4, 48, 3), (4, 51, 3), "Gemma 2"),
    (kind("deepseek_v3", rope_scaling=YARN), (4, 55, 4), (4, 56), "yarn of DeepSeek-V3"),
    (kind("deepseek_v2", topk_method="group_limited_greedy"), (5, 0), (5, 14), "the experts in groups"),
    (kind("deepseek_v2", topk_method="group_limited_greedy"), (5, 13), (4, 57, 6), "the experts in groups"),
    (kind("olmo3", rope_parameters=LINEAR), (5, 0), (5, 14), "OLMo 3"),
    (kind("phi3", partial_rotary_factor=0.5), (4, 48, 3), (4, 51), "Phi-4-mini"),
    (kind("phi3", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), (4, 48, 3), (4, 51), "Phi-4-mini"),
    (kind("phi3", sliding_window=8, max_position_embeddings=16), (4, 45, 2), (4, 48), "sliding windows of Phi-3"),
    (kind("starcoder2", sliding_window=8), (4, 45, 2), (4, 48), "sliding windows of Phi-3 and StarCoder2"),
    (kind("qwen2", sliding_window=8, use_sliding_window=True), (4, 51, 3), (4, 53), "sliding windows of Qwen2"),
    (kind("qwen3", sliding_window=8, use_sliding_window=True), (4, 51, 3), (4, 53), "sliding windows of Qwen2 and Qwen3"),
    (kind("qwen2_moe", sliding_window=8, use_sliding_window=True), (4, 57, 6), (5, 0), "sliding windows of Qwen2-MoE"),
    (kind("llama", rope_scaling=LINEAR | {"rope_type": "dynamic"}), (5, 12), (5, 14), "a dynamic rotary embedding"),
    (kind("llama", rope_parameters=LINEAR | {"rope_type": "dynamic"}), (5, 0), (4, 57, 6), "a dynamic rotary embedding"),
    (kind("llama", rope_scaling=LONGROPE), (4, 50, 3), (4, 51), "longrope outside of Phi-3"),
    (kind("gemma3_text", use_bidirectional_attention=True), (4, 56), (4, 57), "in both directions"),
    (kind("phi3", rope_scaling=LONGROPE | {"factor": 4.0}), (4, 57, 6), (5, 0), "longrope with a factor of its own"),
    (kind("phi3", rope_scaling=LONGROPE | {"attention_factor": 2.0}), (4, 57, 6), (5, 0), "longrope with a factor of its own"),
    (
        kind("llama", original_max_position_embeddings=16, max_position_embeddings=32, rope_scaling=LONGROPE | {"factor": 4.0}),
        (4, 57, 6),
        (5, 0),
        "longrope with a factor of its own",
    ),
    (kind("gemma2", layer_types=["full_attention", "sliding_attention"]), (4, 52, 4), (4, 53), "an unusual order of layer_types"),
    (kind("cohere2", sliding_window_pattern=2, layer_types=["full_attention"] * 2), (4, 52, 4), (4, 53), "an unusual order"),
    (kind("llama", head_dim=24, num_attention_heads=4, hidden_size=64), (4, 44, 2), (4, 45), "heads of Llama and Mistral"),
    (kind("llama4", text_config=kind("llama4_text")), (4, 53, 3), (4, 56, 2), "the attention of Llama 4"),
]
HARMLESS = [
    kind("phi3", sliding_window=16, max_position_embeddings=16, partial_rotary_factor=1.0),
    kind("starcoder2", sliding_window=None),
    kind("qwen2", sliding_window=8, use_sliding_window=False),
    kind("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    kind("llama", rope_scaling=None, rope_parameters=None),
    kind("llama", head_dim=16, num_attention_heads=4, hidden_size=64),
    kind("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    kind("phi3", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0}),
]


@pytest.mark.parametrize(("raw", "wrong", "exact", "what"), REFUSED, ids=str)
def test_refused_where_wrong_and_only_there(raw, wrong, exact, what):
    with pytest.raises(UnsupportedError) as refusal:
        config.refuse(raw, wrong)
    assert what in refusal.value.cause
    assert f"transformers {versions.dotted(wrong)} " in refusal.value.cause
    assert refusal.value.remedy.startswith('Run  %pip install -U "transformers>=')
    assert refusal.value.remedy.endswith('"  and restart the kernel.')
    assert list(config.refusals(raw, exact)) == []


@pytest.mark.parametrize("raw", HARMLESS, ids=str)
@pytest.mark.parametrize("version", [(4, 43, 4), V4, V5, (5, 23)], ids=versions.dotted)
def test_what_is_harmless_is_not_refused(raw, version):
    assert list(config.refusals(raw, version)) == []


def test_the_remedy_is_a_version_that_is_not_refused():
    for raw, wrong, _, _ in REFUSED:
        for need in versions.unmet(classic(raw), wrong):
            assert need not in list(versions.unmet(classic(raw), need.exact))


def test_every_reason_is_told():
    raw = kind("deepseek_v2", rope_scaling=YARN, quantization_config={"quant_method": "aqlm"})
    told = [refusal.cause for refusal in config.refusals(raw, (4, 50))]
    assert len(told) == 4
    for cause, words in zip(told, ("(aqlm)", "DeepSeek-V2 exactly", "outside of Llama", "yarn of DeepSeek-V2"), strict=True):
        assert words in cause


# The words of version 5 in those of version 4

CLASSIC = [  # as version 5 writes it, the fields of version 4 that it means
    (kind("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": None}),
    (kind("llama", rope_parameters={**LINEAR, "rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    (kind("llama", dtype="bfloat16"), {"torch_dtype": "bfloat16"}),
    (kind("gemma", hidden_act="relu"), {"hidden_act": "relu", "hidden_activation": "relu"}),
    (kind("gemma", hidden_act="gelu"), {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}),
    (kind("gemma", hidden_act="relu", hidden_activation="gelu"), {"hidden_activation": "relu"}),
    (kind("gemma", hidden_activation="relu"), {"hidden_activation": "gelu_pytorch_tanh"}),
    (kind("llama", rope_theta=1e4, rope_parameters={**LINEAR, "rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    (kind("llama", rope_theta=1e4, rope_scaling={**LINEAR, "rope_theta": 5e5}), {"rope_theta": 5e5}),
    (kind("glm", rope_scaling={**LINEAR, "partial_rotary_factor": 0.5}), {"partial_rotary_factor": 0.5}),
    (kind("llama", rope_scaling={"rope_type": "longrope", "original_max_position_embeddings": 16}),
     {"original_max_position_embeddings": 16}),
    (kind("llama", rope_scaling={**LINEAR, "type": "dynamic"}), {"rope_scaling": LINEAR}),
    (kind("llama", original_max_position_embeddings=32, rope_scaling=YARN),
     {"rope_scaling": YARN | {"original_max_position_embeddings": 32}}),
    (kind("llama", original_max_position_embeddings=16, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
     {"rope_scaling": YARN}),
    (kind("gpt_neox", rotary_emb_base=1e4, rope_parameters={"rope_theta": 2e4}), {"rotary_emb_base": 2e4}),
    (kind("gpt_neox", rope_parameters={"rope_theta": 2e4, "partial_rotary_factor": 0.5}),
     {"rotary_pct": 0.5, "rotary_emb_base": 2e4}),
    (kind("qwen3_moe", num_local_experts=4), {"num_experts": 4}),
    (kind("phi", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), {"partial_rotary_factor": 0.5}),
    (kind("phi3", rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "original_max_position_embeddings": 16}),
     {"original_max_position_embeddings": 16}),
    (kind("gemma3_text", rope_parameters={"full_attention": {**LINEAR, "rope_theta": 1e6},
                                          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
     {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR}),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "fields"), CLASSIC, ids=str)
def test_what_version_5_wrote_is_said_in_words_of_version_4(raw, fields):
    before = json.dumps(raw)
    found = classic(raw)
    assert {name: found.get(name) for name in fields} == fields
    assert "rope_parameters" not in found
    assert classic({"model_type": "any", "text_config": raw})["text_config"] == found  # parts too
    assert classic(found) == found
    assert json.dumps(raw) == before


def test_what_is_classic_stays():
    raw = LLAMA | {"rope_theta": 5e5, "rope_scaling": LINEAR, "torch_dtype": "bfloat16"}
    assert classic(raw) == raw


@pytest.mark.parametrize("model_type", ["cohere2", "gemma3_text"])
def test_patterns_of_windows_in_both_forms(model_type):
    types = ["sliding_attention", "full_attention"] * 2
    assert classic(kind(model_type, layer_types=types))["sliding_window_pattern"] == 2
    assert classic(kind(model_type, sliding_window_pattern=2, num_hidden_layers=4))["layer_types"] == types
    all_slide = ["sliding_attention"] * 4
    assert classic(kind(model_type, layer_types=all_slide))["sliding_window_pattern"] == 5
    assert "sliding_window_pattern" not in classic(kind(model_type, layer_types=types[::-1]))


FULL, SLIDING = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
INEXPRESSIBLE = [
    (kind("olmo3", rope_parameters={"full_attention": FULL, "sliding_attention": SLIDING}), "another rope_theta for the layers"),
    (kind("gemma3_text", rope_parameters={"full_attention": FULL, "sliding_attention": SLIDING | LINEAR}), "a scaled rotary"),
    (kind("any", rope_parameters={"main": FULL, "compress": SLIDING}), "rotary embeddings for main and compress"),
]


@pytest.mark.parametrize(("raw", "what"), INEXPRESSIBLE, ids=str)
def test_what_version_4_has_no_words_for(raw, what):
    assert what in inexpressible(raw)
    for whole in (raw, kind("llava", text_config=raw)):
        (refusal,) = (one for one in config.refusals(whole, V4) if what in one.cause)
        assert '%pip install -U "transformers>=5.0"' in refusal.remedy
        assert not any(what in one.cause for one in config.refusals(whole, (5, 23)))


@pytest.mark.parametrize(
    "raw",
    [
        kind("llama"), kind("llama", rope_parameters=None), kind("llama", rope_parameters=LINEAR),
        kind("gemma3_text", rope_parameters={"full_attention": FULL | LINEAR, "sliding_attention": SLIDING}),
        kind("olmo3", rope_parameters={"full_attention": FULL, "sliding_attention": FULL}),
    ],
    ids=str,
)  # fmt: skip
def test_what_version_4_has_words_for(raw):
    assert inexpressible(raw) is None


def test_yarn_means_the_same_on_every_version():
    """Where versions differ in which of two contexts they start from, the two are made one, and what they derive is given."""
    raw = LLAMA | {"max_position_embeddings": 128, "rope_scaling": YARN | {"factor": 8.0}}
    old = fit_to(raw, (4, 50), strict=False)
    assert old["max_position_embeddings"] == 16
    assert old["rope_scaling"] == {"rope_type": "yarn", "factor": 8.0, "attention_factor": pytest.approx(1.2079, abs=1e-4)}
    assert fit_to(raw, V4, strict=False) == raw  # factor = 128 / 16
    other = fit_to(raw | {"rope_scaling": YARN}, V4, strict=False)
    assert (other["max_position_embeddings"], other["rope_scaling"]["attention_factor"]) == (16, pytest.approx(1.1386, abs=1e-4))
    given = fit_to(raw | {"rope_scaling": YARN | {"attention_factor": 1.5}}, V4, strict=False)
    assert given["rope_scaling"]["attention_factor"] == 1.5
    deepseek = fit_to(raw | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, V4, strict=False)
    assert deepseek["rope_scaling"]["attention_factor"] == 1.0


@pytest.mark.parametrize(
    "raw", [LLAMA, LLAMA | {"rope_scaling": None}, LLAMA | {"rope_scaling": LINEAR}, LLAMA | {"rope_scaling": {"type": "yarn"}}],
    ids=str,
)  # fmt: skip
def test_what_needs_no_fitting_stays(raw):
    assert fit_to(raw, (4, 43, 4), strict=False) == raw


def test_old_classes_accept_in_rope_scaling_just_what_was_there_in_the_beginning():
    raw = kind("phi", rope_scaling=LINEAR | {"extra": 1})
    assert fit_to(raw, (4, 43, 4), strict=True)["rope_scaling"] == {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_window_that_is_switched_off_is_taken_away_where_the_mask_obeys_it(model_type):
    off = kind(model_type, sliding_window=8, use_sliding_window=False)
    assert fit_to(off, (4, 51, 3), strict=False)["sliding_window"] is None
    assert fit_to(kind(model_type), (4, 49), strict=False)["sliding_window"] is None  # else it would be 4096
    assert fit_to(off, (4, 52), strict=False) == off
    on = off | {"use_sliding_window": True}
    assert fit_to(on, (4, 51, 3), strict=False) == on


def test_a_width_that_a_scaled_embedding_asks_for_is_written():
    assert fit_to(MISTRAL | {"rope_scaling": LINEAR}, V4, strict=False)["head_dim"] == 16
    assert "head_dim" not in fit_to(MISTRAL, V4, strict=False)


def test_what_the_installed_version_understands_is_not_touched():
    assert config.in_words_of(LLAMA, V4) is LLAMA
    modern = LLAMA | {"rope_parameters": {"rope_theta": 5e5}}
    assert config.in_words_of(modern, (5, 23)) is modern
    assert config.in_words_of(modern, V4)["rope_theta"] == 5e5
    assert config.in_words_of(kind("qwen3_moe", num_local_experts=4), V5)["num_experts"] == 4


# A file that is not what it should be

ROPE = "config.json asks for a rotary embedding of type 'foo', which transformers"
BAD = [  # fields, the beginning of the cause; everything else is said for all versions
    ({"rope_scaling": {"rope_type": "foo", "factor": 2.0}}, ROPE),
    ({"rope_scaling": {"type": "foo", "factor": 2.0}}, ROPE),
    ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, ROPE),
    ({"rope_scaling": "linear"}, 'config.json has rope_scaling "linear", which must be an object or null.'),
    ({"rope_scaling": ["linear", 2.0]}, 'config.json has rope_scaling ["linear", 2.0], which must be an object'),
    ({"rope_scaling": 2.0}, "config.json has rope_scaling 2.0, which must be an object"),
    ({"rope_scaling": False}, "config.json has rope_scaling false, which must be an object"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, 'config.json has rope_scaling.rope_type ["linear"], which must be a name.'),
    ({"rope_scaling": LINEAR | {"factor": "2"}}, 'config.json has rope_scaling.factor "2", which must be a number.'),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": "16"}},
     'config.json has rope_scaling.original_max_position_embeddings "16", which must be a number.'),
    ({"rope_scaling": {"rope_type": "linear"}}, ""),
    ({"rope_parameters": [1]}, "config.json has rope_parameters [1], which must be an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": 3}}}, "config.json has rope_parameters.full_attention.rope_type 3,"),
    ({"model_type": 5}, "config.json has model_type 5, which must be a name."),
    ({"model_type": ["llama"]}, 'config.json has model_type ["llama"], which must be a name.'),
    ({"model_type": {}}, "config.json has model_type {}, which must be a name."),
    ({"model_type": None}, "config.json does not say what kind of model this is"),
    ({"model_type": ""}, "transformers "),
    ({"num_hidden_layers": 0}, "config.json has num_hidden_layers 0, which must be a whole number from 1 to 10000."),
    ({"num_hidden_layers": -1}, "config.json has num_hidden_layers -1, which must be"),
    ({"num_hidden_layers": "4"}, 'config.json has num_hidden_layers "4", which must be'),
    ({"num_hidden_layers": 4.5}, "config.json has num_hidden_layers 4.5, which must be"),
    ({"num_hidden_layers": True}, "config.json has num_hidden_layers true, which must be"),
    ({"num_hidden_layers": None}, "config.json has num_hidden_layers null, which must be"),
    ({"num_hidden_layers": 10**9}, "config.json has num_hidden_layers 1000000000, which must be"),
    ({"model_type": "mixtral", "num_local_experts": 10**9}, "config.json has num_local_experts 1000000000, which must be"),
    ({"vocab_size": None}, "config.json has vocab_size null, which must be"),
    ({"vocab_size": 10**13}, "config.json has vocab_size 10000000000000, which must be"),
    ({"num_attention_heads": 0}, "config.json has num_attention_heads 0, which must be"),
    ({"num_attention_heads": "4"}, 'config.json has num_attention_heads "4", which must be'),
    ({"head_dim": {"a": 1}}, 'config.json has head_dim {"a": 1}, which must be a number.'),
    ({"max_position_embeddings": "128"}, 'config.json has max_position_embeddings "128", which must be a number.'),
    ({"hidden_size": 66}, ""),
    ({"hidden_act": "foo"}, ""),
    ({"text_config": [1]}, "config.json has text_config [1], which must be an object"),
    ({"text_config": {"model_type": ["llama"]}}, 'config.json has model_type ["llama"], which must be a name.'),
    ({"vision_config": {"model_type": []}}, "config.json has model_type [], which must be a name."),
    ({"quantization_config": "gptq"}, 'config.json has quantization_config "gptq", which must be an object'),
    ({"quantization_config": []}, "config.json has quantization_config [], which must be an object"),
    ({"quantization_config": {"bits": 4}}, "The weights of this checkpoint are quantized (?)"),
    ({"quantization_config": {"quant_method": [1]}}, "The weights of this checkpoint are quantized ([1])"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "The weights of this checkpoint are quantized (fp8)"),
    ({"auto_map": 3}, "config.json has auto_map 3, which must be an object"),
    ({"model_type": "mine", "auto_map": {}}, "transformers "),
    ({"x" * 5 + "_layers": 10**9}, "config.json has xxxxx_layers 1000000000, which must be at most 10000."),
]  # fmt: skip


def rewritten(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def refused(folder, **options):
    """Return the error that loading and planning a folder give: one line of cause and one of remedy."""
    for call in (plan, LayeredModel.from_pretrained):
        begin = time.monotonic()
        with pytest.raises(AirLLMError) as caught:
            call(folder, device="cpu", dtype="float32", **options)
        assert time.monotonic() - begin < 20
        error = caught.value
        assert len(error._render_traceback_()) == 2
        assert "\n" not in error.cause + error.remedy
        assert error.cause
        assert error.remedy.endswith(".")
    return error


@pytest.mark.parametrize(("fields", "cause"), BAD, ids=str)
def test_a_bad_file_gives_one_line_of_cause_and_one_of_remedy(damaged, fields, cause):
    error = refused(rewritten(damaged("llama"), **fields))
    assert isinstance(error, UnsupportedError | CheckpointError)
    assert error.cause.startswith(cause)
    if cause == ROPE:
        assert all(name in error.remedy for name in ("default", "linear", "dynamic", "yarn", "longrope", "llama3"))
        assert f"transformers {versions.version_of('transformers')} " in error.cause


@pytest.mark.skipif(INSTALLED < (5,), reason="version 4 has no words for it, and says that")
def test_an_unknown_rotary_embedding_of_one_type_of_layer(damaged):
    parameters = {"full_attention": FULL, "sliding_attention": SLIDING | {"rope_type": "foo"}}
    assert refused(rewritten(damaged("llama"), rope_parameters=parameters)).cause.startswith(ROPE)


def test_code_of_the_checkpoint_is_not_run_unasked(damaged, monkeypatch):
    """Not even transformers may ask: whoever types y in its box would run what nobody has read."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = rewritten(damaged("llama"), model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("raise SystemExit('the code was run')")
    error = refused(folder)
    assert "brings its own code, which is not run unasked" in error.cause
    assert "--trust-remote-code" in error.remedy


def test_code_of_the_checkpoint_that_is_missing(damaged):
    error = refused(
        rewritten(damaged("llama"), model_type="mine", auto_map={"AutoConfig": "mine.Config"}), trust_remote_code=True
    )
    assert "The code that this checkpoint brings cannot be used: " in error.cause
    assert "mine.py" in error.cause


def test_code_of_the_checkpoint_that_fails(damaged):
    folder = rewritten(damaged("llama"), model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("raise ValueError('one\\ntwo')")
    assert "cannot be used: one" in refused(folder, trust_remote_code=True).cause


def test_nothing_is_wrong_with_what_transformers_itself_writes():
    """The default config of every type of causal language model is well formed."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    looked_at = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            raw = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
        except Exception:  # noqa: BLE001  # some have no default
            continue
        assert list(faults(raw)) == [], model_type
        looked_at += 1
    assert looked_at > 60


def test_out_of_range(monkeypatch):
    monkeypatch.setattr(versions, "version_of", lambda _: "4.40.2")
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(UnsupportedError, match=r'needs 4\.43 or newer.*%pip install -U "transformers>=4\.43"'):
        config.load_config(None, LLAMA)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\ntwo", "one"),
        ("Validation error for field 'x':\n    a reason\n", "Validation error for field 'x': a reason"),
        ("", "ValueError"),
    ],
)
def test_what_transformers_says_in_one_line(text, line):
    assert config.first_line(ValueError(text)) == line


def test_quiet_for_several_threads():
    """One begins before the other, and ends before it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    one, other = config.quiet(), config.quiet()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert logging.get_verbosity() == logging.ERROR
    other.__exit__(None, None, None)
    assert logging.get_verbosity() == before
