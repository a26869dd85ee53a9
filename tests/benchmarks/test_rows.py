"""That the benchmarks run, on a tiny model. What they measure is of no interest here."""

import sys
from pathlib import Path

import pytest

from airllm_nb.engine import probe

sys.path.insert(0, str(Path(__file__).parent))


def test_the_row_of_the_prediction(checkpoint, monkeypatch, capsys):
    import prediction

    monkeypatch.setattr(probe, "SECONDS", 0.02)
    monkeypatch.setattr(probe, "_memory", {})
    prediction.main([str(checkpoint()), "float32", "auto"])
    model, dtype, memory, layers, predicted, measured, ratio, words = capsys.readouterr().out.strip().split(" | ")
    assert (model, dtype, memory, layers) == (str(checkpoint()), "float32", "auto", "4 of 4")
    assert min(float(predicted), float(measured), float(ratio)) >= 0
    assert words.startswith("about ")
    with pytest.raises(ValueError, match="shorter|argument"):
        prediction.main(["only", "two"])
