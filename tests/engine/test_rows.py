"""The embedding read by rows: what the whole matrix gives, or a refusal."""

import os

import pytest
import torch
import transformers
from tiny import VOCABULARY, make_checkpoint
from torch.nn import functional

from airllm_nb import LayeredModel, plan
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.rows import Rows
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
IDS = torch.tensor([[9, 7, 8, 7, 200, 9], [258, 0, 0, 1, 2, 3]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}


def load(folder, *, spare=0, **options):
    options = {"device": "cpu", "dtype": "float32"} | options
    return LayeredModel.from_pretrained(folder, memory=plan(folder, **options).least + spare, **options)


@pytest.fixture(scope="module")
def pair(checkpoint):
    """A layered model whose embedding is read by rows, and transformers' own."""
    resident = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), **{DTYPE: torch.float32}).eval()
    with load(checkpoint()) as layered:
        yield layered, resident


@pytest.fixture
def reads(monkeypatch):
    """The sizes in bytes of all reads on this thread from here on: those that a lookup makes."""
    import threading

    sizes, read, here = [], Reader.read, threading.get_ident()

    def noted(self, path, offset, into, **options):
        if threading.get_ident() == here:
            sizes.append(len(into))
        return read(self, path, offset, into, **options)

    monkeypatch.setattr(Reader, "read", noted)
    return sizes


@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        IDS.int(),
        torch.tensor(5),
        torch.tensor([], dtype=torch.long),
        torch.arange(VOCABULARY),
        torch.arange(VOCABULARY).flip(0)[None, None],
    ],
    ids=lambda ids: f"{ids.dtype} {tuple(ids.shape)}",
)
def test_a_lookup_gives_what_the_whole_matrix_gives(checkpoint, ids, dtype, published):
    folder = checkpoint("llama", dtype=published)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: dtype}).get_input_embeddings()(ids)
    with load(folder, dtype=dtype) as model:
        found = model.get_input_embeddings()(ids)
    assert torch.equal(found, expected)
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert found.requires_grad == expected.requires_grad


def test_only_the_rows_are_read_and_neighbours_at_once(pair, reads):
    layered, _ = pair
    row = 64 * 2  # bfloat16 on disk
    layered.get_input_embeddings()(IDS)
    assert reads == [4 * row, 3 * row, row, row]  # 0 to 3, 7 to 9, 200, 258
    reads.clear()
    layered(inputs_embeds=torch.zeros(1, 3, 64))
    assert reads == []


@pytest.mark.parametrize("ids", [[VOCABULARY], [-1], [1, 10**9], [0.5]], ids=str)
def test_ids_that_the_matrix_does_not_have_are_the_error_that_they_always_are(pair, ids):
    errors = []
    for model in pair:
        with pytest.raises((IndexError, RuntimeError)) as caught:
            model.get_input_embeddings()(torch.tensor(ids))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    layered, resident = pair
    assert torch.equal(layered(IDS).logits, resident(IDS).logits)


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: functional.linear(torch.ones(64), weight),
        lambda weight: functional.embedding(IDS, weight, max_norm=1.0),
        lambda weight: torch.embedding(weight, IDS),
        lambda weight: weight[IDS],
        lambda weight: weight.data,
        lambda weight: weight.div_(2),
        lambda weight: weight.t_(),
        lambda weight: torch.ones(VOCABULARY, 64).add_(weight),
    ],
)
def test_other_uses_are_refused(pair, use):
    layered, resident = pair
    weight = layered.get_input_embeddings().weight
    assert isinstance(weight, Rows)
    with pytest.raises(UnsupportedError, match=r"uses model\.embed_tokens\.weight otherwise than to look up rows.*memory="):
        use(weight)
    assert torch.equal(layered(IDS).logits, resident(IDS).logits)


def test_questions_are_answered(pair):
    layered, resident = pair
    weight, whole = (model.get_input_embeddings().weight for model in pair)
    assert (weight.shape, weight.dtype, weight.device, weight.numel()) == (whole.shape, whole.dtype, whole.device, whole.numel())
    assert layered.num_parameters() == resident.num_parameters()


def test_other_kinds_of_embeddings(pair):
    """A model may scale its embedding, have a module of its own, or name a padding row, which only training heeds."""
    weight, whole = (model.get_input_embeddings().weight for model in pair)
    assert torch.equal(functional.embedding(IDS, weight, padding_idx=-3), functional.embedding(IDS, whole, padding_idx=-3))
    assert torch.equal(functional.embedding(weight=weight, input=IDS) * 3, functional.embedding(IDS, whole) * 3)
    for matrix in (weight, whole):
        with pytest.raises(AssertionError, match="Padding_idx"):
            functional.embedding(IDS, matrix, padding_idx=VOCABULARY)


@pytest.mark.parametrize("layers", range(5))
def test_the_embedding_stays_only_if_everything_does(checkpoint, layers):
    """Also where all layers stay, and only the embedding does not fit."""
    whole = plan(checkpoint(), device="cpu", dtype="float32")
    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), **{DTYPE: torch.float32})
    room = whole.least - sum(layer.nbytes for layer in whole.layers[:2])
    memory = room + sum(layer.nbytes for layer in whole.layers[: min(layers + 2, 4)])
    memory = whole.total_nbytes - (layers < 4) if layers > 2 else memory
    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32", memory=memory) as model:
        assert model.plan.by_rows == isinstance(model.get_input_embeddings().weight, Rows) == (layers < 4)
        assert ("embedding read by rows" in str(model.plan)) == model.plan.by_rows
        assert sum(layer.resident for layer in model.layers) == (layers if layers < 2 else 4)
        assert model.plan.used_nbytes <= memory
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        options = {"attention_mask": torch.ones_like(IDS), "cache_implementation": "static"}
        assert torch.equal(model.generate(IDS, **options, **GREEDY), expected.generate(IDS, **options, **GREEDY))


def test_what_is_always_in_memory_is_counted_without_it(checkpoint):
    whole = plan(checkpoint(), device="cpu", dtype="float32")
    least = plan(checkpoint(), device="cpu", dtype="float32", memory=whole.least)
    matrix = 4 * 64 * VOCABULARY
    assert whole.always_nbytes - least.always_nbytes == pytest.approx(matrix, abs=63)
    assert least.always_nbytes == pytest.approx(matrix + 4 * 64, abs=2 * 64)  # head and final norm
    assert least.total_nbytes == whole.total_nbytes == whole.used_nbytes
    assert least.least == least.used_nbytes


def test_a_tied_matrix_is_the_head_and_is_kept_whole(checkpoint):
    with load(checkpoint("llama-tied")) as model:
        assert not model.plan.by_rows
        assert not model.get_input_embeddings().weight.is_meta


def test_a_copy_that_differs_is_not_tied(damaged):
    from safetensors.torch import load_file, save_file

    folder = damaged("llama-tied", shards="1GB")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    with load(folder) as model, LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as whole:
        assert model.plan.by_rows
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_padding_and_a_batch(pair):
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    first, second = (model.generate(IDS, attention_mask=mask, **GREEDY) for model in pair)
    assert torch.equal(first, second)


def test_embeddings_of_the_caller(pair):
    first, second = (
        model.generate(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=torch.ones_like(IDS), **GREEDY)
        for model in pair
    )
    assert torch.equal(first, second)


def test_as_assistant(pair, checkpoint):
    layered, resident = pair
    options = GREEDY | {"attention_mask": torch.ones_like(IDS[:1])}
    with load(checkpoint(), spare=20_000) as draft:
        assert draft.plan.by_rows
        assert torch.equal(layered.generate(IDS[:1], assistant_model=draft, **options), resident.generate(IDS[:1], **options))


def shard(folder):
    """The file that holds the embedding."""
    from airllm_nb.engine.checkpoint import Checkpoint

    return Checkpoint(folder)["model.embed_tokens.weight"].file


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path):
    path.write_bytes(path.read_bytes()[:-500] + bytes(500))


def replace(path):
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("hurt", [truncate, rewrite, replace, remove])
def test_a_file_hurt_after_loading_is_no_embedding(damaged, hurt):
    folder = damaged()
    with load(folder) as model:
        model(IDS)
        hurt(shard(folder))
        for call in (model.get_input_embeddings(), model):
            with pytest.raises(CheckpointError, match=r"(truncated|rewritten|removed) after the model was loaded"):
                call(IDS)


def test_an_interrupt_while_rows_are_read_leaves_a_model_that_works(pair, monkeypatch):
    layered, resident = pair
    read = Reader.read

    def interrupted(self, path, offset, into, **options):
        if len(into) == 3 * 64 * 2:  # the rows 7 to 9
            raise KeyboardInterrupt
        return read(self, path, offset, into, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layered.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    assert torch.is_grad_enabled()
    assert layered._runtime.lock.acquire(blocking=False)
    layered._runtime.lock.release()
    assert torch.equal(layered(IDS).logits, resident(IDS).logits)


def test_after_closing_nothing_is_read(checkpoint, reads):
    model = load(checkpoint())
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    model(IDS)
    model.close()
    reads.clear()
    with pytest.raises(AirLLMError, match="unloaded"):
        functional.embedding(IDS, weight)
    with pytest.raises(AirLLMError):
        embedding(IDS)
    assert reads == []
    assert model._reader._files == {}


def test_a_scaled_embedding(tmp_path):
    """Gemma's own module multiplies what it has looked up."""
    if not hasattr(transformers, "Gemma3ForCausalLM"):
        pytest.skip("this transformers has no Gemma 3")
    folder = make_checkpoint(
        tmp_path, "llama", model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], head_dim=16, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: torch.float32}).eval()
    with load(folder) as model:
        assert model.plan.by_rows
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_a_plan_is_the_same_from_headers_and_from_the_model(checkpoint):
    with load(checkpoint()) as model:
        headers = plan(checkpoint(), device="cpu", dtype="float32", memory=model.plan.least)
        assert model.plan == headers
        assert model.plan.work.read == headers.work.read
