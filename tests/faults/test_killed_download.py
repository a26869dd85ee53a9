"""A download that is killed at any moment: the next one goes on, and what comes out is what the hub has."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

# Forks, since importing the hub's packages takes longer than the download: each child may be killed after a while.
FORKS = """
import json, os, random, sys, time
from airllm_nb.engine import hub
moments, longest = random.Random(20), float(sys.argv[1])

def forked(seconds=None):
    child = os.fork()
    if child == 0:
        try:
            print(hub.locate("org/model"), flush=True)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, 9)
    return os.waitpid(child, 0)[1]

for line in sys.stdin:
    kill = json.loads(line)
    status = forked(moments.uniform(0.0, longest) if kill else None)
    print(json.dumps(status), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_20_random_moments(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama", tokenizer=True), tmp_path / "served")
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    with LoopbackHub() as hub:
        hub.add("org/model", folder)
        home = tmp_path / "home"
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", FORKS, "1.0"], env=os.environ | variables, **pipes)

        def ask(kill):
            """Return the status of a child, and what it printed before."""
            process.stdin.write(f"{json.dumps(kill)}\n")
            process.stdin.flush()
            lines = [process.stdout.readline().strip()]
            while not lines[-1].lstrip("-").isdigit():
                lines.append(process.stdout.readline().strip())
            return int(lines[-1]), lines[:-1]

        killed = 0
        for number in range(20):
            status, _ = ask(True)
            killed += status == 9
            if number % 4 == 3:
                status, printed = ask(False)
                assert status == 0
                assert {path.name: path.read_bytes() for path in Path(printed[0]).iterdir()} == expected
                shutil.rmtree(home)
        process.stdin.close()
        assert process.wait() == 0
    assert killed >= 5
