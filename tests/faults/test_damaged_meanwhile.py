"""Files that are hurt while layers stream from them: the run goes on exactly, or ends with a clear error; never other text."""

import meanwhile
import pytest
from outcomes import Tally

CASES = "meanwhile"


@pytest.mark.parametrize("kind", meanwhile.KINDS)
def test_damaged_while_it_generates(cases, record_property, kind):
    tally = Tally("damaged while it generates", kind)
    for seed in range(10):
        tally.add(*cases.run(kind, seed), seed)
    tally.close(record_property)
