"""A checkpoint whose settings were damaged before it is loaded, or that brings code: as in test_damaged_weights."""

import damage
import damaged_settings
import pytest
from outcomes import Tally

CASES = "before"
KINDS = [name for name, function in damage.KINDS.items() if function.__module__ == damaged_settings.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_before_loading(cases, record_property, kind):
    tally = Tally("damaged before loading", kind)
    for seed in range(10):
        tally.add(*cases.run(kind, seed), seed)
    tally.close(record_property)
