"""Some minutes of the soak, where AIRLLM_NB_SOAK_SECONDS asks for them: beside the other tests, at a low priority."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from counting import LINUX
from outcomes import SOAK

SECONDS = int(os.environ.get("AIRLLM_NB_SOAK_SECONDS", "0"))
"""Of a core; 0 leaves it out."""
SEED = 11
PATIENCE = 3600
MARK = "exit status "


def output(worker):
    """Return where the soak of this run of pytest writes, whichever of its workers asks."""
    return Path(tempfile.gettempdir()) / f"airllm_nb-soak-{getattr(worker, 'workerinput', {}).get('testrunuid', os.getpid())}.txt"


def start(path):
    """Start it; what it prints goes to a file, and then how it ended. It ends early if this process does."""
    options = ["--seconds", str(SECONDS), "--seed", str(SEED), "--of-a-core"]
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("soak.py"), *options]
    script = f'"$@" >"$0" 2>&1; echo "{MARK}$?" >>"$0"'
    # Not the lowest priority: it would get nothing where the others leave no core idle, and then be waited for.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "AIRLLM_NB_SOAK_FOR": str(os.getpid())}
    subprocess.Popen(["nice", "-n", "5", "sh", "-c", script, path, *command], env=environment)


@LINUX
@pytest.mark.skipif(SECONDS == 0, reason="AIRLLM_NB_SOAK_SECONDS is 0")
def test_soak(request, record_property):
    path = output(request.config)
    until = time.monotonic() + PATIENCE + SECONDS
    try:
        while not path.exists() or MARK not in path.read_text():
            assert time.monotonic() < until, "it does not end"
            time.sleep(1)
        printed = path.read_text()
        assert f"{MARK}0\n" in printed, printed[-8000:]
        record_property(SOAK, printed.splitlines()[-2])
    finally:
        path.unlink(missing_ok=True)
