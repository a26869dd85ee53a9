"""What transformers can do with a model, it can do with a layered one."""

import threading

import pytest
import torch
import transformers

from airllm_nb import LayeredModel, plan
from airllm_nb.errors import DeviceError

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
IDS = torch.tensor([[10, 20, 30, 10, 20, 30, 10, 20]])


@pytest.fixture(scope="module")
def pair(checkpoint):
    """A layered model that streams every layer, and transformers' own."""
    folder = checkpoint("llama", tokenizer=True)
    dtype = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
    resident = transformers.AutoModelForCausalLM.from_pretrained(folder, **{dtype: torch.float32}).eval()
    least = plan(folder, device="cpu", dtype="float32").least
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=least) as layered:
        yield layered, resident


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"min_new_tokens": 12},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_generate(pair, options):
    layered, resident = pair
    mask = torch.ones_like(IDS)
    options = GREEDY | options
    assert torch.equal(
        layered.generate(IDS, attention_mask=mask, **options), resident.generate(IDS, attention_mask=mask, **options)
    )


def test_sampling_with_a_seed(pair):
    sampled = []
    for model in pair:
        torch.manual_seed(7)
        sampled.append(
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=True, pad_token_id=257)
        )
    assert torch.equal(*sampled)


def test_stop_strings(pair):
    layered, resident = pair
    tokenizer = layered.tokenizer
    text = tokenizer.decode(resident.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)[0, IDS.shape[1] :])
    stop = next(character for character in text if character.isascii())  # half of a multi-byte character is no text
    options = GREEDY | {"stop_strings": [stop], "tokenizer": tokenizer, "attention_mask": torch.ones_like(IDS)}
    stopped = layered.generate(IDS, **options)
    assert torch.equal(stopped, resident.generate(IDS, **options))
    assert stopped.shape[1] < IDS.shape[1] + 12


def test_layered_assistant(pair):
    layered, resident = pair
    mask = torch.ones_like(IDS)
    expected = resident.generate(IDS, attention_mask=mask, **GREEDY)
    with LayeredModel.from_pretrained(layered.path, device="cpu", dtype="float32") as draft:
        assert torch.equal(layered.generate(IDS, attention_mask=mask, assistant_model=draft, **GREEDY), expected)


def test_pipeline(pair):
    layered, _ = pair
    texts = []
    for model in pair:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=layered.tokenizer)
        texts.append(pipe("Hello", max_new_tokens=8, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]


def test_text_iterator_streamer(pair):
    layered, resident = pair
    expected = layered.tokenizer.decode(resident.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)[0, IDS.shape[1] :])
    streamer = transformers.TextIteratorStreamer(layered.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=layered.generate, args=(IDS,), kwargs=GREEDY | {"streamer": streamer, "attention_mask": torch.ones_like(IDS)}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_two_threads_take_turns(pair):
    layered, resident = pair
    expected = resident.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(layered.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)


def test_cache_passed_back(pair):
    layered, resident = pair
    first = layered(IDS, use_cache=True)
    again = layered(torch.tensor([[5]]), past_key_values=first.past_key_values)
    full = resident(torch.cat([IDS, torch.tensor([[5]])], 1))
    assert torch.allclose(again.logits[0, -1], full.logits[0, -1], atol=1e-5)


def test_layers_out_of_order(pair):
    """The predicted order is a hint: a layer skipped, repeated or called out of order is read on demand."""
    layered, resident = pair
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3))
    position = torch.arange(5)[None]

    def through(model, order):
        state = hidden
        rotary = model.model.rotary_emb(state, position) if hasattr(model.model, "rotary_emb") else None
        for index in order:
            state = model.model.layers[index](state, position_ids=position, position_embeddings=rotary)
            state = state[0] if isinstance(state, tuple) else state
        return state

    for order in ([3, 1], [0, 0, 2], [2, 1, 0, 3], [1]):
        with torch.no_grad():
            assert torch.equal(through(layered, order), through(resident, order)), order
    assert torch.equal(layered(IDS).logits, resident(IDS).logits)


def test_it_is_taken_for_the_model_it_runs(pair):
    layered, _ = pair
    assert isinstance(layered, LayeredModel)
    assert isinstance(layered, transformers.PreTrainedModel)
    assert layered.config.num_hidden_layers == 4
    assert repr(layered) == f"LayeredModel({layered.name}: 4 of 4 layers stream, cpu, float32)"
    assert "generate" in dir(layered)
    assert layered.to("cpu").eval() is layered
    with pytest.raises(DeviceError, match="stays on the device"):
        layered.to(torch.float16)
    with pytest.raises(DeviceError):
        layered.half()
    layered.generation_config.max_new_tokens = 3
    assert layered._hf.generation_config.max_new_tokens == 3
    layered.generation_config.max_new_tokens = None
