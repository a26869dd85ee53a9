"""Below the floor the extension still loads, and says in one line what to do."""

import pytest

from airllm_nb.compat import versions
from airllm_nb.errors import AirLLMError


@pytest.mark.skipif(
    versions.installed() >= versions.FLOOR, reason="needs a transformers below the floor: tests/matrix.py has one"
)
def test_nothing():
    raise AirLLMError("", "")
