"""The other half of test_walk.py: the tests of one file stay on one worker, and these take the longest."""

import pytest
from test_walk import check
from walk import TYPES


@pytest.mark.parametrize("model_type", TYPES[1::2])
def test_type_is_exact_or_listed(tmp_path, model_type):
    check(model_type, tmp_path)
