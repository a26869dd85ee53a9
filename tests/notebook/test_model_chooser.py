"""The controls before loading: the plan follows them, and what is wrong is said beside the one that caused it."""

import pytest
from waiting import wait_for

from airllm_nb import plan
from airllm_nb.notebook import background
from airllm_nb.notebook.model_chooser import ModelChooser

DEFAULTS = {"device": "cpu", "dtype": "float32", "memory": "auto"}


@pytest.fixture
def chooser(monkeypatch, checkpoint):
    monkeypatch.setattr(background, "RESTS", 0.02)
    monkeypatch.setattr("airllm_nb.engine.plan.predict", lambda *_, **__: "about 1 s per token")  # its probe has tests of its own
    chooser = ModelChooser(DEFAULTS)
    chooser.model.value = str(checkpoint("llama"))
    wait_for(lambda: "about 1 s per token" in chooser.plan.value)
    yield chooser
    chooser.close()


def problems(chooser):
    return {name: place.value for name, place in chooser._problems.items() if place.value}


def test_the_plan_follows_the_controls(chooser, checkpoint):
    assert "layers, all resident" in chooser.plan.value
    assert chooser.options == DEFAULTS | {"model": str(checkpoint("llama")), "quantize": None}
    whole = plan(checkpoint("llama"), device="cpu", dtype="float32")
    chooser.memory.value = str(whole.least)
    wait_for(lambda: "streamed" in chooser.plan.value)
    assert chooser.slider.value == 0
    assert 'class="waiting streams"' in chooser.plan.value
    chooser.dtype.value = "bfloat16"
    wait_for(lambda: "<dd>bfloat16 (as asked)</dd>" in chooser.plan.value)
    assert not problems(chooser)


def test_the_slider_goes_from_the_least_to_everything(chooser):
    chooser.slider.value = 0
    wait_for(lambda: "about 1 s" in chooser.plan.value and chooser.memory.value != "auto")
    wait_for(lambda: not problems(chooser))
    assert chooser.memory.value.endswith("MB")
    assert chooser.slider.value == 0  # it does not move by itself
    chooser.memory.value = "1TB"
    wait_for(lambda: chooser.slider.value == chooser.slider.max)
    assert chooser.memory.value == "1TB"


@pytest.mark.parametrize(
    ("control", "value", "place", "text"),
    [
        ("memory", "lots", "memory", "&#x27;lots&#x27; is not a size."),
        ("memory", "1kB", "memory", "is too small for this model: it needs at least"),
        ("model", "/no/such/<b>folder</b>", "model", "There is no folder &quot;/no/such/&lt;b&gt;folder&lt;/b&gt;&quot;."),
    ],
)
def test_what_is_wrong_is_said_beside_its_control(chooser, control, value, place, text):
    good = getattr(chooser, control).value
    getattr(chooser, control).value = value
    wait_for(lambda: problems(chooser))
    assert list(problems(chooser)) == [place]
    assert text in problems(chooser)[place]
    assert not chooser.plan.value
    assert getattr(chooser, control).value == value  # nothing that was written is lost
    getattr(chooser, control).value = good
    wait_for(lambda: chooser.plan.value and not problems(chooser))


def test_a_folder_that_is_no_model(chooser, tmp_path):
    chooser.model.value = str(tmp_path)
    wait_for(lambda: problems(chooser))
    assert list(problems(chooser)) == ["model"]


def test_without_network(chooser, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chooser.model.value = "nobody/nothing"
    wait_for(lambda: problems(chooser))
    assert "HF_HUB_OFFLINE is set" in problems(chooser)["model"]


def test_the_demo_is_not_fetched_for_a_plan(chooser, monkeypatch):
    monkeypatch.setattr("airllm_nb.demo.here", lambda: None)
    monkeypatch.setattr("airllm_nb.demo.demo_path", lambda **_: pytest.fail("it was fetched"))
    chooser.model.value = "demo"
    wait_for(lambda: "is fetched once, when it is loaded" in chooser.plan.value)


def test_a_bug_keeps_its_traceback(chooser, monkeypatch):
    def broken(**_):
        raise ZeroDivisionError("<oops>")

    monkeypatch.setattr("airllm_nb.notebook.model_chooser.plan", broken)
    chooser.memory.value = "2GB"
    wait_for(lambda: "This is a bug in airllm_nb" in chooser.plan.value)
    assert "ZeroDivisionError: &lt;oops&gt;" in chooser.plan.value


def test_quantized_layers_are_planned(chooser):
    for name, group in (("int4", 64), ("int4-32", 32)):
        chooser.quantize.value = name
        wait_for(lambda group=group: f"int4-{group}: " in chooser.plan.value)
        assert "<dt>quantized</dt>" in chooser.plan.value
        assert chooser.options["quantize"] == name
    chooser.quantize.value = "no"
    wait_for(lambda: "<dt>quantized</dt>" not in chooser.plan.value)
