"""A checkpoint whose files were damaged before it is loaded: refused clearly, or the right answer; no crash, no wrong text."""

import damage
import damaged_files  # noqa: F401  # registers its kinds
import damaged_weights  # noqa: F401
import pytest
from outcomes import Tally

CASES = "before"
KINDS = [name for name, function in damage.KINDS.items() if function.__module__ in ("damaged_weights", "damaged_files")]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_before_loading(cases, record_property, kind):
    tally = Tally("damaged before loading", kind)
    for seed in range(10):
        tally.add(*cases.run(kind, seed), seed)
    tally.close(record_property)
