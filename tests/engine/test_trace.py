"""`model.trace`: the lens is the model's own logits, norms and attention are transformers' own, whatever stays in memory."""

import base64
import re
import sys
from xml.etree import ElementTree as ET

import pytest
import torch
import transformers
from tiny import CONFIGS, LAYERS, VOCABULARY, budgets, make_checkpoint

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.engine import lens
from airllm_nb.engine import trace as trace_module
from airllm_nb.errors import AirLLMError, PromptError, UnsupportedError
from airllm_nb.events import ComputeEnd

IDS = [10, 20, 30, 40, 50, 60, 70]
HEADS = [(0, 0), (2, 3), (3, 1)]
DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"


def load(folder, keep="none", dtype="float32"):
    memory = budgets(plan(folder, device="cpu", dtype=dtype))[keep]
    return LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory)


@pytest.fixture
def model(checkpoint):
    with load(checkpoint(tokenizer=True)) as model:
        yield model


def images(html):
    """The SVG images in HTML, parsed: whatever a token's text is, they are well-formed."""
    return [ET.fromstring(base64.b64decode(data)) for data in re.findall(r"base64,([\w+/=]+)", html)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_what_transformers_gives(checkpoint, kind, dtype):
    folder = checkpoint(kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **{DTYPE: torch.float32}
    ).eval()
    with load(folder, dtype=dtype) as model, torch.no_grad():
        trace = model.trace(IDS, heads=HEADS, top_k=3)
        own = model(torch.tensor([IDS]), output_hidden_states=True)
        attentions = reference(torch.tensor([IDS]), output_attentions=True).attentions

    probabilities = torch.softmax(own.logits[0].float(), dim=-1)
    exact = dtype == torch.float32
    likeliest = probabilities.gather(1, trace.top_ids[-1])
    assert torch.allclose(trace.top_probabilities[-1], likeliest, rtol=1e-4 if exact else 0.1, atol=1e-6 if exact else 0.03)
    if exact:
        assert torch.equal(trace.top_ids[-1], probabilities.topk(3).indices)
    assert trace.top_ids.shape == trace.top_probabilities.shape == (LAYERS, len(IDS), 3)

    states = torch.stack(own.hidden_states)[:-1, 0].float()  # the last one is normed
    assert torch.allclose(trace.norms[:-1], states.norm(dim=-1), rtol=1e-5)
    assert trace.norms.shape == (LAYERS + 1, len(IDS))

    assert list(trace.attention) == HEADS
    for (layer, head), weights in trace.attention.items():
        assert weights.shape == (len(IDS), len(IDS))
        assert torch.allclose(weights.sum(dim=-1), torch.ones(len(IDS)), atol=1e-5 if exact else 0.02)
        assert torch.allclose(weights, attentions[layer][0, head], atol=1e-5 if exact else 0.2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_layers_guess_is_that_of_a_model_that_ends_there(checkpoint, kind):
    with load(checkpoint(kind), "all") as model:
        trace = model.trace(IDS)
        layers = next(part for part in (getattr(model.base_model, name, None) for name in ("layers", "h")) if part is not None)
        for index in range(LAYERS - 1, -1, -1):
            del layers[index + 1 :]
            model.config.num_hidden_layers = index + 1
            expected = torch.softmax(model(torch.tensor([IDS]), use_cache=False).logits[0], dim=-1).topk(5)
            assert torch.equal(trace.top_ids[index], expected.indices)
            assert torch.allclose(trace.top_probabilities[index], expected.values, rtol=1e-4)


def test_attention_of_a_model_that_was_loaded_eager(checkpoint):
    """Its weights go through ``softmax``, and are seen there."""
    with load(checkpoint()) as model:
        expected = model.trace(IDS, heads=HEADS, top_k=0).attention
        model.config._attn_implementation = "eager"
        if transformers.__version__ < "4.48":  # the class was chosen when the model was made
            pytest.skip("this version does not change it afterwards")
        found = model.trace(IDS, heads=HEADS, top_k=0).attention
        for head in HEADS:
            assert torch.allclose(found[head], expected[head], atol=1e-6)


def test_results_are_not_changed_by_looking(model):
    ids = torch.tensor([IDS])
    before = model(ids).logits
    model.trace(IDS, heads=HEADS)
    assert torch.equal(model(ids).logits, before)
    assert not model._runtime.taps
    assert torch.overrides._len_torch_function_stack() == 0


def test_what_was_generated_is_traced_too(model):
    options = {"attention_mask": torch.ones(1, len(IDS), dtype=torch.long), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(torch.tensor([IDS]), pad_token_id=257, **options)[0].tolist()
    trace = model.trace(IDS, max_new_tokens=4)
    assert list(trace.ids) == expected
    assert trace.prompt_tokens == len(IDS)
    for position in range(len(IDS) - 1, len(expected) - 1):
        assert trace.top_ids[-1, position, 0] == expected[position + 1]  # the last layer's first guess was taken


def test_only_the_last_tokens(model):
    whole, end = model.trace(IDS, heads=HEADS), model.trace(IDS, heads=HEADS, last=3)
    assert end.first == 4
    assert torch.equal(end.top_ids, whole.top_ids[:, 4:])
    assert torch.equal(end.norms, whole.norms[:, 4:])
    for head in HEADS:
        assert torch.equal(end.attention[head], whole.attention[head][4:])
    assert torch.allclose(end.top_probabilities, whole.top_probabilities[:, 4:])
    for token, same in ((5, 5), (6, -1)):
        assert [text for text, _ in end.guesses(1, token)] == [text for text, _ in whole.guesses(1, same)]
    for token in (3, 7, -4):
        with pytest.raises(IndexError, match="4 to 6"):
            end.guesses(1, token)
    end._repr_html_()


def test_prompts_of_all_kinds(model):
    expected = model.trace("Hello").top_ids
    encoded = model.tokenizer("Hello", return_tensors="pt")
    arrays = {name: value.numpy() for name, value in encoded.items()}
    of_arrays = (arrays, arrays["input_ids"], arrays["input_ids"][0])
    for prompt in (encoded, encoded["input_ids"], encoded["input_ids"][0], tuple(b"Hello"), *of_arrays):
        trace = model.trace(prompt)
        assert torch.equal(trace.top_ids, expected)
        assert trace.tokens == tuple("Hello")


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "The prompt is empty."),
        ([], {}, "The prompt is empty."),
        (torch.zeros(2, 3, dtype=torch.long), {}, "There are 2 prompts."),
        ([1, VOCABULARY], {}, f"no token {VOCABULARY}. Its tokens are 0 to {VOCABULARY - 1}."),
        ([-1], {}, "no token -1"),
        ([1] * 200, {}, "context of 128"),
        ([1], {"heads": [(4, 0)]}, "There is no layer 4. The model has 4: 0 to 3."),
        ([1], {"heads": [(1, 4)]}, "model.layers.1 has no head 4. It has 4: 0 to 3."),
        ([1], {"heads": [(1, -1)]}, "no head -1"),
        ([1], {"top_k": -1}, "top_k is -1."),
        ([1], {"last": 0}, "last is 0."),
        ([1], {"max_new_tokens": -1}, "max_new_tokens is -1."),
        ([1] * 129, {}, "Shorten it to 128 tokens or fewer."),
        ([1] * 128, {"max_new_tokens": 1}, "Shorten it to 127 tokens or fewer."),
        (None, {}, "it is a NoneType."),
        (3, {}, "it is a int."),
        (["Hello"], {}, "it is a list."),
        ([1.7, 2.2], {}, "it is a list."),
        ([True], {}, "it is a list."),
        ([1, [2]], {}, "it is a list."),
        (torch.tensor(5), {}, "it is a Tensor."),
        (torch.tensor([1.5]), {}, "it is a Tensor."),
        (torch.ones(1, 1, 3, dtype=torch.long), {}, "it is a Tensor."),
        ({"x": 1}, {}, "it is a dict."),
        (b"Hello", {}, "it is a bytes."),
        ("a\ud800", {}, "half of a character"),
        ([1], {"top_k": "5"}, "top_k is '5'."),
        ([1], {"top_k": 2.5}, "top_k is 2.5."),
        ([1], {"top_k": True}, "top_k is True."),
        ([1], {"last": 1.5}, "last is 1.5."),
        ([1], {"max_new_tokens": None}, "max_new_tokens is None."),
        ([1], {"heads": 5}, "heads is 5."),
        ([1], {"heads": (0, 1)}, "heads is (0, 1)."),
        ([1], {"heads": None}, "heads is None."),
        ([1], {"heads": [(0,)]}, "heads is [(0,)]."),
        ([1], {"heads": [(1.9, 0.7)]}, "heads is [(1.9, 0.7)]."),
    ],
)
def test_bad_input(model, prompt, options, said):
    with pytest.raises(AirLLMError, match=re.escape(said)):
        model.trace(prompt, **options)
    assert not model._runtime.taps
    assert model.trace("still usable").tokens[0] == "s"


def test_without_guesses(model):
    trace = model.trace(IDS, top_k=0)
    assert trace.top_ids.shape == (LAYERS, len(IDS), 0)
    assert trace.norms.shape == (LAYERS + 1, len(IDS))
    assert "Logit lens" not in trace._repr_html_()


def test_a_head_that_computes_otherwise_is_refused(model):
    """Rather than guesses that are not the model's."""
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, output: -output if output.dim() == 3 else output)  # of a pass
    with pytest.raises(UnsupportedError, match="no logit lens"):
        model.trace(IDS)
    assert model.trace(IDS, top_k=0).norms.shape == (LAYERS + 1, len(IDS))


@pytest.mark.parametrize("times", [0, 2])
def test_attention_that_cannot_be_seen_is_refused(model, times):
    """A layer that computes none, or several."""
    said = "has no attention that could be seen" if times == 0 else "computed attention 2 times"
    hidden = torch.zeros(1, 4, 7, 16)

    def instead(*_args, **_kwargs):
        for _ in range(times):
            torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
        return (torch.zeros(1, 7, 64), None, None)[: 3 if transformers.__version__ < "4.48" else 2]

    model.base_model.layers[1].self_attn.forward = instead
    with pytest.raises(UnsupportedError, match=f"model.layers.1 {said}"):
        model.trace(IDS, heads=[(1, 0)])


def test_layers_out_of_turn_are_refused(model):
    first, second = model.base_model.layers[0], model.base_model.layers[1]
    model.base_model.layers[0], model.base_model.layers[1] = second, first
    with pytest.raises(UnsupportedError, match=r"model.layers.1 came out of its turn"):
        model.trace(IDS)


def test_edits_between_layers_are_seen(model):
    with model.on_layer(lambda layer, hidden: hidden * 2 if layer.index == 1 else None):
        edited = model.trace(IDS)
    plain = model.trace(IDS)
    assert torch.equal(edited.norms[:2], plain.norms[:2])
    assert torch.allclose(edited.norms[2], 2 * plain.norms[2])


def test_a_long_text_is_taken_in_pieces(model, monkeypatch):
    """Logits of all tokens at once would be as large as the vocabulary times the text."""
    whole = model.trace(IDS)
    sizes = []
    logits = lens.Lens.logits
    monkeypatch.setattr(lens.Lens, "logits", lambda self, hidden: sizes.append(len(hidden)) or logits(self, hidden))
    monkeypatch.setattr(lens, "CHUNK", 4 * VOCABULARY * 3)
    trace = model.trace(IDS)
    assert sizes == [1, *[3, 3, 1] * LAYERS, 1]  # the first and the last one are checks
    assert torch.equal(trace.top_ids, whole.top_ids)


def test_padding_is_left_out(model):
    """As a tokenizer gives it: the mask says what of it is the text."""
    alone = model.trace("Hello")
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        padded = model.tokenizer(["Hello", "What is it?"], return_tensors="pt", padding=True)
        one = model.trace({name: value[:1] for name, value in padded.items()})
        assert one.ids == alone.ids
        assert torch.equal(one.norms, alone.norms)
        for mask in (padded["attention_mask"][0].bool(), padded["attention_mask"][0].float().numpy()):
            assert model.trace({"input_ids": padded["input_ids"][0], "attention_mask": mask}).ids == alone.ids
    with pytest.raises(PromptError, match="hides tokens within the text"):
        model.trace({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]})
    with pytest.raises(PromptError, match="is empty"):
        model.trace({"input_ids": [1, 2, 3], "attention_mask": [0, 0, 0]})


@pytest.mark.parametrize("name", lens.CAPS)
def test_logits_that_are_capped_otherwise_are_refused_or_known(model, name, monkeypatch):
    """A cap that changes the logits by less than a hundredth of the largest."""
    ids = torch.tensor([IDS])
    cap = 5 * model(ids).logits.abs().max().item()
    forward = type(model.get_output_embeddings()).forward
    trace = model.trace(IDS)

    def capped(head, hidden):
        return torch.tanh(forward(head, hidden) / cap) * cap if hidden.dim() == 3 else forward(head, hidden)  # of a pass

    monkeypatch.setattr(model.get_output_embeddings(), "forward", capped.__get__(model.get_output_embeddings()))
    with pytest.raises(UnsupportedError, match="no logit lens"):
        model.trace(IDS)
    setattr(model.config, name, cap)
    expected = torch.softmax(model(ids).logits[0], dim=-1).topk(5)
    assert torch.allclose(model.trace(IDS).top_probabilities[-1], expected.values, atol=1e-6)
    assert not torch.allclose(trace.top_probabilities[-1], expected.values, atol=1e-6)


def test_the_final_norm_is_found_by_its_name():
    """Beside others that come later, and lists of norms."""
    parts = ("layers", "norm", "per_layer_projection_norm"), ("layer_norm_emb", "layers", "layer_norm1"), ("layers",)
    for names, found in zip(parts, ("norm", "layer_norm_emb", None), strict=True):
        inner = torch.nn.Module()
        for name in names:
            inner.add_module(name, torch.nn.ModuleList() if name in ("layers", "layer_norm1") else torch.nn.LayerNorm(4))
        model = torch.nn.Module()
        model.add_module("model", inner)
        norm = lens._final_norm(model, "model.layers.3")
        assert isinstance(norm, torch.nn.Identity) if found is None else norm is getattr(inner, found)


def test_a_head_of_another_width_is_refused(model):
    """Before anything is computed."""
    model.set_output_embeddings(torch.nn.Linear(32, VOCABULARY))
    passes = model._runtime.passes
    with pytest.raises(UnsupportedError, match="its head does not take what its layers give"):
        model.trace(IDS)
    assert model._runtime.passes == passes


def test_only_what_is_kept_of_attention_takes_memory(model):
    for implementation in ("sdpa", "eager"):
        model.config._attn_implementation = implementation
        found = model.trace(IDS, heads=[(1, 1)], top_k=0, last=2).attention[1, 1]
        assert found.untyped_storage().nbytes() == found.nbytes == 4 * 2 * len(IDS)


def test_what_was_generated_is_as_map_has_it(model):
    """Of the checkpoint's generation config counts what says of the text, not how it is made or told."""
    expected = model.trace("Hello", max_new_tokens=4).ids
    for name, value in {
        "num_beams": 3,
        "max_time": 1e-9,
        "return_dict_in_generate": True,
        "stop_strings": ["no such text"],
    }.items():
        before = getattr(model.generation_config, name)
        setattr(model.generation_config, name, value)
        assert model.trace("Hello", max_new_tokens=4).ids == expected
        setattr(model.generation_config, name, before)
    model.generation_config.repetition_penalty = 50.0
    (text,) = model.map(["Hello"], raw=True, max_new_tokens=4)
    assert "".join(model.trace("Hello", max_new_tokens=4).tokens[5:]) == text


def test_what_is_no_number_is_told_as_that(model):
    with model.on_layer(lambda layer, hidden: hidden * torch.nan if layer.index == 2 else None):
        with pytest.raises(UnsupportedError, match="gives no numbers for this text"):
            model.trace(IDS)
        assert model.trace(IDS, top_k=0).norms.isnan().any(dim=1).tolist() == [False, False, False, True, True]


@pytest.mark.skipif((5,) <= versions.installed() < (5, 14), reason="these compute it wrongly, and refuse it")
def test_a_longer_text_before_changes_nothing(tmp_path):
    """A dynamic rotary embedding remembers it, in transformers itself."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    folder = make_checkpoint(tmp_path / "dynamic", max_position_embeddings=32, rope_scaling=scaling)
    with load(folder, "all") as model:
        before = model.trace([*range(40)], top_k=0).norms
        model.trace([*range(100)], top_k=0)
        assert torch.equal(model.trace([*range(40)], top_k=0).norms, before)


def test_a_trace_within_a_trace(model):
    """Each sees its own pass alone."""
    expected, inner = model.trace(IDS), []

    def look(layer, _hidden):
        if layer.index == 0 and not inner:
            inner.append(None)
            inner.append(model.trace(IDS[:3], heads=[(1, 1)]))

    with load(model.path, "all") as other:
        model = other
        with model.on_layer(look):
            outer = model.trace(IDS)
    assert torch.equal(outer.norms, expected.norms)
    assert torch.allclose(inner[1].norms, expected.norms[:, :3], atol=1e-5)


def test_a_head_that_is_computed_twice_is_refused_for_that(model):
    with (
        model.on_layer(lambda layer, hidden: layer.again(hidden)),
        pytest.raises(UnsupportedError, match="computed attention 2 times"),
    ):
        model.trace(IDS, heads=[(1, 1)])


def test_states_that_are_not_the_tokens_are_refused_for_that(model):
    """As of a model that pads a text for its layers."""
    with pytest.raises(UnsupportedError, match=r"one state for each of 7 tokens: model.layers.0 gives \(1, 8, 64\)"):
        embed = model.get_input_embeddings()
        embed.register_forward_hook(lambda _module, _args, output: torch.cat([output, output[:, :1]], dim=1))
        model.trace(IDS)


def test_an_interrupt_leaves_nothing(model):
    def stop(event):
        if type(event) is ComputeEnd and event.index == 2:  # on the computing thread: the reading one is not interrupted
            raise KeyboardInterrupt

    model.progress = stop
    with pytest.raises(KeyboardInterrupt):
        model.trace(IDS, heads=HEADS)
    model.progress = None
    assert not model._runtime.taps
    assert torch.overrides._len_torch_function_stack() == 0
    model.trace(IDS, heads=HEADS)


HOSTILE = b"<script>alert(1)</script>&'\"\n\t\x00\x1b]]>"


def test_pictures_escape_what_the_tokens_say(model):
    trace = model.trace(tuple(HOSTILE), heads=[(0, 0)])
    trace.texts.update(dict.fromkeys(trace.top_ids.unique().tolist(), "<img src=x onerror='alert(1)'>"))
    html = trace._repr_html_()
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;" in html
    assert len(images(html)) == 2
    assert {element.tag.rpartition("}")[2] for image in images(html) for element in image.iter()} <= {
        "svg", "text", "rect", "path", "polyline",
    }  # fmt: skip


def test_pictures_show_as_much_as_they_are_asked_for(model):
    trace = model.trace([*range(65, 91)], heads=[(1, 1)])
    html = trace.lens_picture(tokens=5, layers=2)._repr_html_()
    assert html.count("<tr") == 1 + 2
    assert html.count("<td") == 2 * 5
    assert [f">{letter}<" in html for letter in "UVWXYZ"] == [False, True, True, True, True, True]
    square = images(trace.attention_picture(1, 1, tokens=6)._repr_html_())[0]
    assert len(square.findall("{*}rect")) == 2 * (6 * 7 // 2)
    assert repr(trace.lens_picture()) == f"<airllm_nb: Logit lens of {model.name}>"
    with pytest.raises(AirLLMError, match=re.escape("Ask for it: model.trace(prompt, heads=[(2, 0)]).")):
        trace.attention_picture(2, 0)
    assert repr(trace) == f"Trace({model.name}: 26 tokens, 4 layers, 1 heads)"


def test_of_many_heads_a_notebook_shows_some(model):
    html = model.trace(IDS, heads=[(layer, head) for layer in range(4) for head in range(4)])._repr_html_()
    assert len(images(html)) == 1 + trace_module.HEADS_SHOWN
    assert "8 more heads: trace.attention_picture(layer, head)" in html


def test_one_token_has_pictures_too(model):
    assert len(images(model.trace([65], heads=[(0, 0)])._repr_html_())) == 2


def test_columns_and_data_frame(model, monkeypatch):
    trace = model.trace(IDS, top_k=2, last=3)
    columns = trace.columns()
    assert {len(column) for column in columns.values()} == {LAYERS * 3 * 2}
    assert columns["position"][:6] == [4, 4, 5, 5, 6, 6]
    assert columns["rank"][:4] == [0, 1, 0, 1]
    assert columns["probability"][0] == pytest.approx(trace.top_probabilities[0, 0, 0].item())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AirLLMError, match="pandas is not installed"):
        trace.to_pandas()


def test_data_frame(model):
    pytest.importorskip("pandas")
    frame = model.trace(IDS).to_pandas()
    assert list(frame.columns) == ["layer", "position", "token", "norm", "rank", "guess", "probability"]


def test_a_checkpoint_without_tokenizer_has_numbers_for_texts(checkpoint):
    with load(checkpoint("llama")) as model:
        assert model.trace(IDS).tokens == tuple(map(str, IDS))
        with pytest.raises(AirLLMError, match="no tokenizer"):
            model.trace("text")


def test_prompt_errors_are_prompt_errors(model):
    with pytest.raises(PromptError):
        model.trace([])
