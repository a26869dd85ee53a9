"""Every type that the newest transformers knows, written by it, on an older version: exact, or refused; nothing wrong."""

import os
from pathlib import Path

import pytest
import walk

ANSWERS = Path(os.environ.get("AIRLLM_NB_ANSWERS", "")) / "types"
pytestmark = pytest.mark.skipif(
    "AIRLLM_NB_ANSWERS" not in os.environ, reason="needs what the newest version answers: run tests/matrix.py"
)
KNOWN = sorted(file.parent.name for file in ANSWERS.glob(f"*/{walk.ANSWER}"))


@pytest.mark.parametrize("model_type", KNOWN)
def test_exact_or_refused(model_type):
    assert walk.on_older_version(ANSWERS / model_type) in (walk.EXACT, "refused")


def test_all_types_are_here():
    assert len(KNOWN) > 180
