"""What is predicted from sizes and speeds. Speeds themselves are the probe's; nothing here is timed."""

import contextlib
import dataclasses
import os
import re
import threading
from types import SimpleNamespace

import pytest
import torch

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import experts
from airllm_nb.engine import probe, sample
from airllm_nb.engine.prediction import Prediction, seconds_per_token
from airllm_nb.engine.residency import decide
from airllm_nb.notebook import report


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure for a moment, and remember nothing of it."""
    monkeypatch.setattr(probe, "SECONDS", 0.02)
    monkeypatch.setattr(probe, "_memory", {})


def test_a_model_that_stays_takes_the_sum():
    assert seconds_per_token([0.1, 0.2, 0.1], [0, 0, 0], 0.05, 0) == pytest.approx(0.45)


@pytest.mark.parametrize(("compute", "read"), [(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
def test_equal_layers_that_all_stream_take_the_longer_of_both(compute, read):
    assert seconds_per_token([compute] * 5, [read] * 5, 0.0, 2) == pytest.approx(5 * max(compute, read))


def test_with_one_slot_nothing_overlaps_with_its_own_layer():
    """A single streamed layer is read while the others compute, and while it computes nothing is read."""
    assert seconds_per_token([1.0, 1.0, 1.0], [0, 2.0, 0], 0.0, 1) == pytest.approx(3.0)
    assert seconds_per_token([1.0, 1.0, 1.0], [0, 5.0, 0], 0.0, 1) == pytest.approx(6.0)


def test_layers_that_stay_between_the_streamed_ones_hide_their_reading():
    spread = seconds_per_token([1.0] * 6, [2.0, 0, 2.0, 0, 2.0, 0], 0.0, 2)
    together = seconds_per_token([1.0] * 6, [2.0, 2.0, 2.0, 0, 0, 0], 0.0, 2)
    assert spread == pytest.approx(6.0)
    assert together > spread


def test_reading_goes_on_behind_the_head():
    assert (
        seconds_per_token([1.0] * 2, [3.0] * 2, 0.0, 2) == seconds_per_token([1.0] * 2, [3.0] * 2, 1.0, 2) == pytest.approx(6.0)
    )


def test_what_slows_each_other_down():
    assert seconds_per_token([1.0] * 4, [4.0] * 4, 0.0, 2, slowed=(1.0, 0.5)) > seconds_per_token([1.0] * 4, [4.0] * 4, 0.0, 2)
    assert seconds_per_token([4.0] * 4, [1.0] * 4, 0.0, 2, slowed=(0.5, 1.0)) > 16
    assert seconds_per_token([1.0] * 4, [0.0] * 4, 0.0, 0, slowed=(0.5, 0.5)) == 4


@pytest.mark.parametrize("read", [0.2, 1.0, 5.0])
def test_more_memory_is_never_slower(read):
    sizes = [100] * 20
    previous = float("inf")
    for budget in range(250, 2100, 50):
        decision = decide(50, sizes, budget)
        seconds = seconds_per_token([1.0] * 20, [0 if stays else read for stays in decision.resident], 0.5, len(decision.window))
        assert seconds <= previous + 1e-9
        previous = seconds
    assert previous == pytest.approx(20.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_plan_predicts(checkpoint, dtype):
    folder = checkpoint()
    resident = plan(folder, device="cpu", dtype=dtype).predict()
    assert resident.seconds > 0
    assert resident.reading is None
    assert re.fullmatch(r"about [\d.e-]+ s per token \([\d.]+ .?B/s compute\)", str(resident))
    streamed = plan(folder, device="cpu", dtype=dtype, memory=plan(folder, device="cpu", dtype=dtype).least).predict()
    assert streamed.seconds is not None, streamed.note
    assert re.fullmatch(r"about [\d.e-]+ s per token \(.*B/s, .*B/s compute\)", str(streamed))


def test_a_plan_measures_nothing_until_it_is_asked(checkpoint):
    planned = plan(checkpoint(), device="cpu", dtype="float32")
    str(planned)
    assert not probe._memory
    planned.predict()
    assert probe._memory


def test_nothing_is_said_of_a_device_that_is_not_measured(checkpoint):
    planned = dataclasses.replace(plan(checkpoint(), device="cpu", dtype="float32"), device=torch.device("cuda"))
    assert planned.predict() is None


def test_what_one_token_reads_and_computes(checkpoint):
    folder = checkpoint()
    planned = plan(folder, device="cpu", dtype="float32", memory=plan(folder, device="cpu", dtype="float32").least)
    work = planned.work
    assert sum(work.read) == planned.streamed_nbytes == sum(entry.nbytes for entry in work.streamed)
    assert work.computed == tuple(layer.nbytes for layer in planned.layers)
    assert work.rest == 259 * 64 * 4
    assert {(64, 64), (96, 64), (64, 96), (32, 64)} == set(work.shapes)


def test_of_experts_only_the_chosen_compute(checkpoint):
    planned = plan(checkpoint("mixtral", num_experts_per_tok=1), device="cpu", dtype="float32")
    experts = 4 * 3 * 64 * 96 * 4
    assert planned.work.computed == tuple(layer.nbytes - experts * 3 // 4 for layer in planned.layers)


def test_experts_that_are_read_when_they_are_hit_compute_too(checkpoint):
    folder = checkpoint("mixtral")
    whole = plan(folder, device="cpu", dtype="float32", memory="1TB")
    seconds = []
    for memory in (whole.least, (whole.least + whole.total_nbytes) // 2):
        lean = plan(folder, device="cpu", dtype="float32", memory=memory)
        if lean.experts is None:
            pytest.skip("this version of transformers does not tell its experts apart")
        assert lean.work.computed == whole.work.computed
        assert lean.work.shapes == whole.work.shapes
        published = 4 * 3 * 64 * 96 * 2  # bfloat16, of one layer; a token hits half of them
        assert lean.work.missing == (int(published / 2 * (1 - lean.experts.share)),) * len(lean.layers)
        assert sum(entry.nbytes for entry in lean.work.streamed) == sum(lean.work.read) + published * len(lean.layers)
        found = lean.predict()
        assert found.seconds is not None, found.note
        seconds.append(found.seconds)
    assert min(seconds) > whole.predict().seconds
    assert whole.work.missing == (0,) * len(whole.layers)


def test_the_chosen_share_of_experts_has_many_names():
    for chosen in experts.PER_TOKEN:
        for number in experts.PER_LAYER:
            assert experts.chosen_share(SimpleNamespace(**{chosen: 2, number: 8})) == 0.25
    assert experts.chosen_share(SimpleNamespace(num_experts=8)) == 1


def test_memory_that_runs_out_meanwhile_is_no_reason_to_raise_and_a_bug_is(checkpoint, monkeypatch):
    planned = plan(checkpoint(), device="cpu", dtype="float32", memory=plan(checkpoint(), device="cpu", dtype="float32").least)
    real = sample.Sample.rate
    for error in (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(), KeyError("a bug")):

        def rate(self, seconds, error=error):
            if threading.current_thread() is not threading.main_thread():
                raise error
            return real(self, seconds)

        monkeypatch.setattr(sample.Sample, "rate", rate)
        with pytest.raises(KeyError, match="a bug") if isinstance(error, KeyError) else contextlib.nullcontext():
            assert planned.predict().note == "too little memory is free to measure"


def test_files_that_are_gone_or_changed_are_no_reason_to_raise(damaged):
    folder = damaged()
    planned = plan(folder, device="cpu", dtype="bfloat16", memory=plan(folder, device="cpu", dtype="bfloat16").least)
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 100)
    found = planned.predict()
    assert found.seconds is None
    assert str(found).startswith("seconds per token not predicted: ")


def test_a_loaded_model_tells_too(checkpoint):
    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32") as model:
        assert model.plan.predict().seconds > 0


def test_a_status_writes_nothing(checkpoint, monkeypatch):
    folder = checkpoint()
    least = plan(folder, device="cpu", dtype="float32").least
    monkeypatch.setattr(probe, "temporary", None)  # to write would raise
    monkeypatch.setattr(probe, "cached_share", lambda *_: 1.0)
    monkeypatch.setattr(sample, "cached_share", lambda *_: 0.0)
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=least) as model:
        assert "not predicted: the disk cannot be measured without writing to it" in report.status(model)
        with pytest.raises(TypeError):
            report.plan(model.plan)


def test_words():
    assert str(Prediction(2.13, 13e9, 1.6e9)) == "about 2.1 s per token (disk 1.60 GB/s, 13.0 GB/s compute)"
    assert "disk 1.60 GB/s, 40% of it cached, " in str(Prediction(2.13, 13e9, 1.6e9, cached=0.4))
