"""Ids are those of the published tokenizer.json, whatever class its tokenizer_config.json names, on every transformers."""

import json
import re

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from airllm_nb import LayeredModel
from airllm_nb.compat import versions
from airllm_nb.compat.tokenizer import load_tokenizer
from airllm_nb.errors import CheckpointError

CORPUS = [
    "The year 2024 has 366 days, 1234567 is a number; it's what they'll say: don't!",
    "  def f(x):\n    return x + 10\n\n\n\tx = 1,000.5\r\n",
    "Größe café naïve Ünïcödé — “quotes” … 日本語のテキスト 中文 한국어 🙂🚀",
] * 3
TEXTS = [
    *CORPUS[:3], "", " ", "   ", "  1", "a", " leading", "trailing  ", "\n", "\n\n  x", "12 345 6789",
    "<s>hello</s> world <|im_end|>\n", "x<s> y", "<|im_end|> z <|im_end|>z", "cafe\u0301 \u1e9b\u0323 \ufb01",
    "👩\u200d👩 🇩🇪 \u0000\u200b", "'s 'LL don't", "▁a ▁▁",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
ENDED = "<|im_end|>"
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}<|im_end|>\n{% endfor %}"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BOS = TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])


def digits():
    return pre_tokenizers.Digits(individual_digits=True)


def byte_level(*, regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(regex=False)])


def bytes_bpe(pre_tokenizer, normalizer=None, post_processor=None, **options):
    """A byte-level tokenizer whose merges cross whatever the pre-tokenizer should keep apart: a step that is lost shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level(regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return assemble(tokenizer, {}, pre_tokenizer, normalizer, decoders.ByteLevel(), post_processor or ByteLevel(), options)


def pieces_bpe(pre_tokenizer, normalizer, *, strip=1):
    """A tokenizer as sentencepiece's are converted, with bytes for what is not in its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL))
    head = {token: index for index, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁▁", "▁▁▁"])}
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *[decoders.Strip(" ", left=1)] * strip]
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    return assemble(tokenizer, head, pre_tokenizer, normalizer, decoders.Sequence(steps), BOS, options)


def assemble(trained, head, pre_tokenizer, normalizer, decoder, post_processor, options):
    made = json.loads(trained.to_str())["model"]
    vocab = head | {token: len(head) + index for index, token in enumerate(t for t in made["vocab"] if t not in head)}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in made["merges"]]
    merges += [("▁", "▁"), ("▁▁", "▁")] if head else []
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder, tokenizer.post_processor = decoder, post_processor
    tokenizer.add_special_tokens([*SPECIAL, ENDED])
    return tokenizer


def spaces():
    return normalizers.Replace(" ", "▁")


STYLES = {
    "smollm2": ("llama", lambda: bytes_bpe(pre_tokenizers.Sequence([digits(), byte_level()]))),
    "starcoder2": ("starcoder2", lambda: bytes_bpe(pre_tokenizers.Sequence([digits(), byte_level()]))),
    "llama3": ("llama", lambda: bytes_bpe(split(WORDS), post_processor=BOS, ignore_merges=True)),
    "qwen2": ("qwen2", lambda: bytes_bpe(split(WORDS.replace("{1,3}", "")), normalizers.NFC())),
    "gpt2": ("gpt2", lambda: bytes_bpe(byte_level())),
    "prefixed": ("gpt2", lambda: bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "cohere": ("cohere", lambda: bytes_bpe(pre_tokenizers.Sequence([digits(), byte_level()]), normalizers.NFC(), BOS)),
    "llama2": ("llama", lambda: pieces_bpe(None, normalizers.Sequence([normalizers.Prepend("▁"), spaces()]))),
    "mistral": ("mistral", lambda: pieces_bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None)),
    "gemma": ("gemma", lambda: pieces_bpe(pre_tokenizers.Split(" ", "merged_with_previous"), spaces(), strip=0)),
}
CLASSES = (
    "GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "PreTrainedTokenizerFast",
    "TokenizersBackend", "Qwen2Tokenizer", "GemmaTokenizer", "CodeGenTokenizer", "CohereTokenizer", "GPTNeoXTokenizerFast",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The tokenizer.json of each style."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for style, (_, make) in STYLES.items():
        make().save(str(folder / style))
    return folder


@pytest.fixture
def published(files, tmp_path):
    """Return a function that writes a checkpoint's tokenizer files, edited or not, and gives their folder."""

    def write(style, edit=None, **config):
        data = json.loads((files / style).read_text())
        if edit:
            edit(data)
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": STYLES[style][0]}))
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens | {"chat_template": TEMPLATE} | config))
        return tmp_path

    return write


def of_file(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def assert_same(tokenizer, expected):
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == expected.encode(text).ids, text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=False), text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected.encode(text, add_special_tokens=False).ids, text


NEED_A_STEP = ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CohereTokenizer", "GPTNeoXTokenizerFast")
"""Classes that 4.43 cannot make without a pre-tokenizer, which Llama-2 does not have."""
PAIRS = [(style, name) for style in STYLES for name in CLASSES if style != "llama2" or name not in NEED_A_STEP]


@pytest.mark.parametrize(("style", "name"), PAIRS)
def test_ids_and_text_are_those_of_the_file(published, style, name):
    folder = published(style, tokenizer_class=name)
    tokenizer = load_tokenizer(folder)
    assert_same(tokenizer, of_file(folder))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "12 34"}], tokenize=False)
    assert chat == "<s>12 34<|im_end|>\n"


def test_the_model_has_that_tokenizer(published, damaged):
    folder = damaged("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((published("smollm2", tokenizer_class="GPT2Tokenizer") / name).read_bytes())
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        assert_same(model.tokenizer, of_file(folder))


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("gemma", "mistral", "llama2")])
def test_what_is_encoded_decodes_to_itself(published, style):
    tokenizer = load_tokenizer(published(style, tokenizer_class="GPT2Tokenizer"))
    for text in CORPUS[:3]:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert back == (" " * (style == "prefixed") * (not text.startswith(" ")) + text)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2TokenizerFast"])
def test_where_nothing_differs_the_tokenizer_is_transformers_own(published, name):
    folder = published("gpt2", tokenizer_class=name, add_prefix_space=False)
    own = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer) is type(own)
    assert tokenizer.special_tokens_map == own.special_tokens_map
    assert tokenizer.get_vocab() == own.get_vocab()
    assert_same(tokenizer, own.backend_tokenizer)


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, None), (False, None), (None, True), (True, True), (False, False)])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GemmaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("style", ["llama3", "qwen2", "mistral"])
def test_stated_ends_count_for_the_classes_that_read_them(published, style, name, add_bos, add_eos):
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    folder = published(style, tokenizer_class=name, **{flag: value for flag, value in flags.items() if value is not None})
    tokenizer, body = load_tokenizer(folder), of_file(folder).encode("ab 12", add_special_tokens=False).ids
    reads = name in ("LlamaTokenizerFast", "GemmaTokenizer")
    before = add_bos if reads and add_bos is not None else style != "qwen2"  # as in the file
    assert tokenizer("ab 12")["input_ids"] == [1] * before + body + [2] * (reads and add_eos is True)


def test_a_stated_end_is_refused_where_the_file_adds_something_else(published):
    def strange(data):
        data["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}})

    folder = published("llama3", strange, tokenizer_class="LlamaTokenizer", add_bos_token=False)
    with pytest.raises(CheckpointError, match=r"more than bos and eos.*remove add_bos_token"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("style", ["gpt2", "prefixed"])
def test_a_stated_prefix_space_counts(published, style, stated, name):
    tokenizer = load_tokenizer(published(style, tokenizer_class=name, add_prefix_space=stated))
    assert tokenizer.decode(tokenizer("days")["input_ids"]) == " " * stated + "days"


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("style", ["llama2", "mistral", "gemma"])
def test_a_prefix_space_of_sentencepiece_is_as_in_the_file_or_refused(published, style, name):
    for stated in (True, False):
        folder = published(style, tokenizer_class=name, add_prefix_space=stated, from_slow=True)
        if name == "LlamaTokenizer" and stated == (style == "gemma"):
            with pytest.raises(CheckpointError, match="does the opposite"):
                load_tokenizer(folder)
        else:
            assert_same(load_tokenizer(folder), of_file(folder))


def test_the_corrected_pattern_of_mistral_is_used_where_it_is_asked_for(published):
    if not any(hasattr(of, "_patch_mistral_regex") for of in (transformers.PreTrainedTokenizerFast, PreTrainedTokenizerBase)):
        pytest.skip("this transformers does not have the correction")

    def enlarge(data):  # it is for large vocabularies only
        data["model"]["vocab"] |= {f"filler {index}": 1000 + index for index in range(100_001)}

    for asked in ({}, {"fix_mistral_regex": True}):
        folder = published("llama3", enlarge, tokenizer_class="PreTrainedTokenizerFast", **asked)
        (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": "4.50.0"}))
        if asked and (5,) <= versions.installed() < (5, 2):  # which cannot take it from a file
            with pytest.raises(CheckpointError):
                load_tokenizer(folder)
            continue
        tokenizer, expected = load_tokenizer(folder), of_file(folder)
        digits_apart = len(tokenizer("366", add_special_tokens=False)["input_ids"]) == 3
        assert digits_apart == bool(asked)
        assert asked or tokenizer("366")["input_ids"] == expected.encode("366").ids


def test_tokens_of_other_files_are_added_and_defaults_of_the_class_are_not(published):
    folder = published("gemma", tokenizer_class="GemmaTokenizer", additional_special_tokens=["<|new|>"])
    tokenizer, size = load_tokenizer(folder), of_file(folder).get_vocab_size()
    assert tokenizer("<|new|>", add_special_tokens=False)["input_ids"] == [size]
    assert len(tokenizer) == size + 1
    assert max(tokenizer("<mask> <pad> <|endoftext|>")["input_ids"]) < size


def test_a_stated_added_token_keeps_its_spaces(published):
    plain = {"content": ENDED, "normalized": False, "single_word": False, "special": True}
    last = of_file(published("gpt2")).token_to_id(ENDED)
    stated = {str(last): plain | {"lstrip": True, "rstrip": True}}
    tokenizer = load_tokenizer(published("gpt2", tokenizer_class="GPT2Tokenizer", added_tokens_decoder=stated))
    assert tokenizer("a  <|im_end|>  ")["input_ids"] == [tokenizer("a")["input_ids"][0], last]
    assert tokenizer.decode([last], skip_special_tokens=True) == ""


def test_the_file_for_this_version_is_the_one_read(published):
    folder = published("smollm2", tokenizer_class="GPT2Tokenizer", fast_tokenizer_files=["tokenizer.4.1.0.json"])
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.1.0.json")
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(STYLES["gpt2"][1]().to_str())))
    assert_same(load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.4.1.0.json")))


def test_what_the_newest_transformers_saves_is_read_by_all(published):
    folder = published("llama3", tokenizer_class="TokenizersBackend", backend="tokenizers", extra_special_tokens=[ENDED])
    tokenizer = load_tokenizer(folder)
    assert_same(tokenizer, of_file(folder))
    assert ENDED in tokenizer.all_special_tokens


def test_case_of_a_bert_is_as_stated_or_as_in_the_file(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "abc": 1, "ABC": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokens = {f"{name}_token": "[UNK]" for name in ("unk", "sep", "pad", "cls", "mask")}
    for stated, ids in (({}, [2]), ({"do_lower_case": True}, [1]), ({"do_lower_case": False}, [2])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens | {"tokenizer_class": "BertTokenizer"} | stated))
        assert load_tokenizer(tmp_path)("ABC", add_special_tokens=False)["input_ids"] == ids


def test_a_tokenizer_with_code_of_its_own_is_left_alone(published):
    """GPT-2 with another pre-tokenizer than its file, on purpose."""
    folder = published("gpt2", auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")
    (folder / "own.py").write_text(
        "from tokenizers import pre_tokenizers\nfrom transformers import PreTrainedTokenizerFast\n\n"
        "class Own(PreTrainedTokenizerFast):\n    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)\n"
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("days")["input_ids"])[0].startswith("Ġ")


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 1}', "[]"])
def test_a_damaged_file_is_one_line_of_error(published, content):
    folder = published("gpt2", tokenizer_class="GPT2Tokenizer")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert re.match(r"The tokenizer cannot be read: \S[^\n]*$", caught.value.cause)
