"""Within a memory limit, whatever it is: refused clearly, or the exact text; never killed by the system."""

import contextlib

import limited
import pytest
from outcomes import Tally

from airllm_nb.bench import machine
from airllm_nb.engine.cgroups import CGROUP

CASES = "limited"


@pytest.mark.parametrize("kind", limited.KINDS)
def test_limited(cases, record_property, kind):
    try:
        with machine.limited(10**9):
            pass
    except machine.BenchError as error:
        pytest.skip(str(error))
    tally = Tally("within a memory limit", kind)
    for seed in range(10):
        tally.add(*cases.run(kind, seed), seed)
    for group in CGROUP.glob("**/airllm_nb_bench_*"):  # of cases that were killed
        with contextlib.suppress(OSError):
            group.rmdir()
    tally.close(record_property)
