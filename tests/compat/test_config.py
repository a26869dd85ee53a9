"""What a version would compute wrongly without a word is refused, and nothing else."""

import pytest

from airllm_nb.compat import config, versions
from airllm_nb.errors import UnsupportedError

YARN = {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
CASES = [  # config.json, a version that is wrong, a version that is exact: as found by comparing logits and tokens
    (YARN, (4, 48, 3), (4, 51, 3)),
    ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}}, (4, 43, 4), (4, 51, 3)),
    ({"model_type": "gemma3", "text_config": YARN}, (4, 48, 3), (4, 51, 3)),
    ({"model_type": "gemma2"}, (4, 48, 3), (4, 51, 3)),
    ({"model_type": "phi3", "sliding_window": 8, "max_position_embeddings": 16}, (4, 45, 2), (4, 48, 3)),
    ({"model_type": "phi3", "partial_rotary_factor": 0.5}, (4, 48, 3), (4, 51, 3)),
    ({"model_type": "starcoder2", "sliding_window": 8}, (4, 45, 2), (4, 48, 3)),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, (4, 57, 6), (5, 0, 0)),
    ({"model_type": "gpt_neox", "rope_parameters": {"partial_rotary_factor": 0.5}}, (5, 0, 0), (5, 23, 0)),
]
HARMLESS = [
    {"model_type": "phi3", "sliding_window": 16, "max_position_embeddings": 16, "partial_rotary_factor": 1.0},
    {"model_type": "starcoder2", "sliding_window": None},
    {"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}},
    {"model_type": "llama", "rope_scaling": None, "rope_parameters": None},
]


@pytest.mark.parametrize(("raw", "wrong", "exact"), CASES, ids=str)
def test_refused_where_wrong_and_only_there(monkeypatch, raw, wrong, exact):
    monkeypatch.setattr(versions, "installed", lambda: wrong)
    with pytest.raises(UnsupportedError, match=r"would silently compute .* wrongly\. Run  %pip install -U .*restart the kernel"):
        config._refuse_wrong(raw)
    monkeypatch.setattr(versions, "installed", lambda: exact)
    config._refuse_wrong(raw)


@pytest.mark.parametrize("raw", HARMLESS, ids=str)
def test_what_is_harmless_is_not_refused(monkeypatch, raw):
    monkeypatch.setattr(versions, "installed", lambda: (4, 43, 4))
    config._refuse_wrong(raw)


def test_below_the_floor(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: (4, 40, 2))
    with pytest.raises(UnsupportedError, match=r'needs 4\.43 or newer.*%pip install -U "transformers>=4\.43"'):
        versions.require_floor()


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
