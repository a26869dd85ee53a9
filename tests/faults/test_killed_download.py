"""A download that is killed at any moment: the next one goes on, and what comes out is what the hub has."""

import os
import shutil
from pathlib import Path

import pytest
from killing import KILLED, Forks
from loopback_hub import LoopbackHub

SETUP = """
from airllm_nb.engine import hub

def work():
    print(hub.locate("org/model"), flush=True)

def warm():
    pass
"""
MOMENTS = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_20_random_moments(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama", tokenizer=True), tmp_path / "served")
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    with LoopbackHub() as hub:
        hub.add("org/model", folder)
        home = tmp_path / "home"
        forks = Forks(SETUP, HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1")
        _, seconds, _ = forks.run()
        killed = 0
        while killed < MOMENTS:
            shutil.rmtree(home)
            for _ in range(4):  # each goes on with what the ones before have left
                killed += forks.run(kill_within=seconds)[0] == KILLED
            status, _, printed = forks.run()
            assert status == 0
            assert {path.name: path.read_bytes() for path in Path(printed[0]).iterdir()} == expected
        forks.close()
