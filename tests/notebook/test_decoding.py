"""What a checkpoint's generation config may say, and what is said when transformers or the numbers refuse."""

import json
import shutil

import pytest
import transformers

from airllm_nb.errors import PromptError, UnsupportedError
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session


@pytest.fixture
def ask(chat, tmp_path):
    """Return a function that runs a copy of the chat checkpoint with another generation_config.json."""
    session = Session(SilentRenderer, lambda _: None)

    def get(prompt="Hello", generation_config=None, **options):
        folder = shutil.copytree(chat, tmp_path / "model", dirs_exist_ok=True)
        if generation_config is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation_config))
        session.load(str(folder), device="cpu", dtype="float32")
        return session.ask(prompt, **{"max_new_tokens": 8} | options)

    get.session = session
    yield get
    session.unload()


@pytest.mark.parametrize(
    "says",
    [
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_return_sequences": 2, "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"dola_layers": "low"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"min_length": 5000, "max_length": 3, "max_time": 0.0},
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
        {"chat_format": "chatml", "max_window_size": 5, "use_cache": False},
        {"guidance_scale": 2.0, "token_healing": True, "renormalize_logits": True},
    ],
    ids=lambda says: next(iter(says)),
)
def test_text_is_written_whatever_the_checkpoint_says_of_decoding(ask, says):
    answer = ask(generation_config=says)
    assert len(ask.session.ask("Hello", temperature=0.7, seed=1, max_new_tokens=8).token_ids) == 8
    ask.session.model.generation_config = transformers.GenerationConfig(eos_token_id=257)
    assert ask.session.ask("Hello", max_new_tokens=8).token_ids == answer.token_ids


def test_a_quantized_cache_is_not_used(ask):
    expected = ask()
    ask.session.model.generation_config.cache_implementation = "quantized"  # 4.43 cannot read it from the file
    assert ask.session.ask("Hello", max_new_tokens=8).token_ids == expected.token_ids


def test_a_checkpoint_may_end_its_texts_with_a_string(ask):
    whole = ask(max_new_tokens=20).text
    answer = ask(generation_config={"stop_strings": [whole[7]]}, max_new_tokens=20)
    assert answer.text == whole[: whole.index(whole[7]) + 1]
    assert answer.stopped == "end"


def test_a_checkpoint_may_forbid_tokens(ask):
    first = ask().token_ids[0]
    assert ask(generation_config={"suppress_tokens": [first]}).token_ids[0] != first


def test_what_transformers_refuses_is_one_line(ask):
    with pytest.raises(
        UnsupportedError, match=r"transformers refuses to generate with model: ValueError: .*generation_config.json"
    ):
        ask(generation_config={"repetition_penalty": -1.0})


def test_an_error_in_a_pass_keeps_its_traceback(ask):
    ask()
    layers = ask.session.model.model.layers

    def bug(*_):
        raise ValueError("a bug")

    handle = layers[0].register_forward_pre_hook(bug)
    with pytest.raises(ValueError, match="a bug"):
        ask.session.ask("Hello")
    handle.remove()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_is_said(ask, number, temperature):
    ask()
    handle = ask.session.model.lm_head.register_forward_hook(lambda _module, _args, output: output * number)
    with pytest.raises(UnsupportedError, match="What model computes is not a number: .* or float32 overflows"):
        ask.session.ask("Hello", temperature=temperature)
    handle.remove()
    ask.session.ask("Hello", max_new_tokens=2)


def test_the_extremes_of_temperature(ask):
    greedy = ask()
    assert ask.session.ask("Hello", max_new_tokens=8, temperature=1e-3).token_ids == greedy.token_ids
    assert len(ask.session.ask("Hello", max_new_tokens=8, temperature=1e3, seed=1).token_ids) == 8
    for temperature in (1e-40, 1e300, float("inf")):
        with pytest.raises(PromptError, match=r"Use 0 \(no sampling\), or 0.001 to 1000"):
            ask.session.ask("Hello", temperature=temperature)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ range(10**12)|list }}", "OverflowError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no\nway') }}", "TemplateError: no way"),
        ({"other": "{{ messages }}"}, "ValueError"),
    ],
)
def test_a_chat_template_that_fails(ask, template, kind):
    ask()
    ask.session.model.tokenizer.chat_template = template
    with pytest.raises(PromptError, match=f"The chat template of model fails with {kind}") as caught:
        ask.session.ask("Hello")
    assert "--raw" in caught.value.remedy
    assert "\n" not in str(caught.value)
    assert len(ask.session.ask("Hello", raw=True, max_new_tokens=2).token_ids) == 2


@pytest.mark.parametrize("raw", [True, False])
def test_half_a_character(ask, raw):
    with pytest.raises(PromptError, match=r"'\\ud800', half of a character"):
        ask("Hi \ud800", raw=raw)
    ask("Hi 😀", raw=raw)
