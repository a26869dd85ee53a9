"""Any model of transformers' causal-LM mapping is exact, or is listed with a reason. The other half is in test_walk_on.py."""

import pytest
from walk import EXACT, NEWEST, NOT_EXACT, NOT_TINY, ONLY_HERE, REFUSED, TYPES, walk

from airllm_nb.compat import versions


def check(model_type, folder):
    outcome = walk(model_type, folder)
    if versions.installed() < NEWEST:
        assert outcome in (EXACT, REFUSED, NOT_TINY, ONLY_HERE)  # never wrong: `walk` would have said so
    else:
        assert outcome == NOT_EXACT.get(model_type, (EXACT, ""))[0]


@pytest.mark.parametrize("model_type", TYPES[::2])
def test_type_is_exact_or_listed(tmp_path, model_type):
    check(model_type, tmp_path)


@pytest.mark.skipif(versions.installed() < NEWEST, reason="the table speaks of the newest version")
def test_counts():
    categories = [category for category, _ in NOT_EXACT.values()]
    assert set(NOT_EXACT) <= set(TYPES)
    assert all(reason for _, reason in NOT_EXACT.values())
    assert (len(TYPES) - len(NOT_EXACT), categories.count(REFUSED), categories.count(NOT_TINY)) == (184, 2, 3)
    assert len(TYPES) - len(NOT_EXACT) >= 0.8 * len(TYPES)
