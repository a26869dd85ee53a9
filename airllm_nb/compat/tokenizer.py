"""The tokenizer that ``tokenizer.json`` describes, on whatever transformers is installed.

transformers 5 builds the tokenizer of many classes (GPT2Tokenizer, LlamaTokenizer, ...) anew from the vocabulary in that file, by
the class's own idea of the rest; transformers 4 changes its ends and its prefix by defaults that no file names. Either gives ids
that the model was not trained with, without a word. So the file is read a second time, as it is, changed only as
``tokenizer_config.json`` says in so many words, and put into transformers' tokenizer where that one differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from airllm_nb.compat import versions
from airllm_nb.compat.config import first_line
from airllm_nb.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
"""A folder that has none of these has no tokenizer."""
Step = dict[str, Any]
"""One JSON object: a step of a tokenizer.json, or a whole file."""
READ_ENDS = frozenset(("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer"))
"""Classes that obeyed ``add_bos_token`` and ``add_eos_token`` in transformers 4. No other did beside a tokenizer.json."""
READ_PREFIX = frozenset(("LlamaTokenizer", "CodeLlamaTokenizer", "CohereTokenizer", "BloomTokenizer"))
"""Classes that made of ``add_prefix_space`` something else in each version; to others it is a ByteLevel's."""
OWN_ENDS = ("set_src_lang_special_tokens", "set_prefix_tokens")
"""Methods of the classes that choose the ends by language."""
BERT_FLAGS = {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NOT_COMPARED = ("version", "truncation", "padding", "post_processor")  # set at each call; the last is compared by what it does


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' tokenizer of a checkpoint folder; its ids are those of the published ``tokenizer.json``.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    trust_remote_code : bool
        The user's own word that code from the checkpoint may run.

    Raises
    ------
    CheckpointError
        If the files cannot be read, or contradict each other in what no rule decides.
    """
    import transformers

    try:
        config = _read(folder / "tokenizer_config.json")
        _check_template(config.get("chat_template"))
        file = folder / _file_name(config)
        tokenizer = _transformers_own(folder, file, config, trust_remote_code=trust_remote_code)
        fast = isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
        foreign = not type(tokenizer).__module__.startswith("transformers.")  # the checkpoint's own code knows what it does
        if fast and file.is_file() and not foreign and not any(hasattr(tokenizer, method) for method in OWN_ENDS):
            _repair(tokenizer, folder, file, config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever it is, these files are its reason
        raise CheckpointError(
            f"The tokenizer cannot be read: {first_line(error)}",
            "Install what it names, or fetch the tokenizer's files again.",
        ) from error
    return tokenizer


def _check_template(template: Any) -> None:
    """Refuse what is no chat template: some versions take it for none, and then the model gets other prompts."""
    named = isinstance(template, list) and template and all(isinstance(one, dict) for one in template)
    if not (template is None or isinstance(template, str) or named):
        raise CheckpointError(
            f"tokenizer_config.json has a chat_template that is none: {json.dumps(template)[:40]}.",
            "Fetch the tokenizer's files again.",
        )


def _transformers_own(folder: Path, file: Path, config: Step, *, trust_remote_code: bool) -> Any:
    """Return what AutoTokenizer gives, after putting into words of version 4 what only version 5 writes."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words: dict[str, Any] = {}
    auto = AutoTokenizer
    if versions.installed() < (5,) and file.is_file():
        if isinstance(extra := config.get("extra_special_tokens"), list):
            words |= {"additional_special_tokens": extra, "extra_special_tokens": {}}
        if config.get("tokenizer_class") == "TokenizersBackend":
            auto = PreTrainedTokenizerFast
        if "from_slow" in config:  # it and the next would want sentencepiece and its file
            words["from_slow"] = False
        if _class_name(config) == "LlamaTokenizer" and "add_prefix_space" in config:
            words["add_prefix_space"] = None
    return auto.from_pretrained(folder, trust_remote_code=trust_remote_code, **words)


def _repair(tokenizer: Any, folder: Path, file: Path, config: Step) -> None:
    """Put the published tokenizer into transformers' one, if they differ."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    try:
        loaded = _parts(backend)
    except Exception:  # noqa: BLE001  # a part in Python, which is the class's own (RoFormer's jieba): no file can hold it
        return
    published = Tokenizer.from_file(str(file))
    _add_tokens(published, backend, folder, config)
    data = _read(file)
    normalizer, pre_tokenizer = (data.get(part) or {} for part in ("normalizer", "pre_tokenizer"))
    _state_prefix(published, tokenizer, config, normalizer, pre_tokenizer)
    _state_bert_flags(published, config, normalizer)
    _state_ends(published, tokenizer, config)
    if any(getattr(either, "fix_mistral_regex", False) for either in (tokenizer, backend)):  # stated, and obeyed
        published.pre_tokenizer = backend.pre_tokenizer
    if loaded != _parts(published) or _ends(backend) != _ends(published):
        published.encode_special_tokens = backend.encode_special_tokens
        tokenizer._tokenizer = published  # noqa: SLF001  # the same name in all versions, and no other way in


def _add_tokens(published: Any, backend: Any, folder: Path, config: Step) -> None:
    """Add the tokens that other files name; they also say how a token of tokenizer.json meets the spaces around it.

    A default of the class that no file names gets no id: it would be one that the model does not have.
    """
    held = {token.content for token in published.get_added_tokens_decoder().values()}
    stated = {*_strings(config.get("added_tokens_decoder", {}))}
    named = {text for name in NAMING_FILES for text in _strings(_read(folder / name))}
    for _, token in sorted(backend.get_added_tokens_decoder().items()):
        text = token.content
        missing = text not in held and (text in named or published.token_to_id(text) is not None)
        if missing or text in stated:
            published.add_tokens([token])


def _state_prefix(published: Any, tokenizer: Any, config: Step, normalizer: Step, pre_tokenizer: Step) -> None:
    """Obey a stated ``add_prefix_space`` where it has one meaning: in a ByteLevel that stands alone."""
    from tokenizers import pre_tokenizers

    stated = config.get("add_prefix_space")
    if not isinstance(stated, bool) or stated == (_prefixes(normalizer) or _prefixes(pre_tokenizer)):
        return
    if pre_tokenizer.get("type") == "ByteLevel":
        published.pre_tokenizer = pre_tokenizers.ByteLevel(**_options(pre_tokenizer) | {"add_prefix_space": stated})
    elif _class_name(config, tokenizer) in READ_PREFIX:
        raise CheckpointError(
            f"tokenizer_config.json says add_prefix_space: {json.dumps(stated)}, tokenizer.json does the opposite, "
            "and which of them counts depends on the version of transformers.",
            "Ask the checkpoint's authors which is right; to follow tokenizer.json, remove that line from tokenizer_config.json.",
        )


def _state_bert_flags(published: Any, config: Step, normalizer: Step) -> None:
    """Obey what is stated about case and accents."""
    from tokenizers import normalizers

    if normalizer.get("type") == "BertNormalizer":
        stated = {name: config[flag] for flag, name in BERT_FLAGS.items() if config.get(flag) is not None}
        published.normalizer = normalizers.BertNormalizer(**_options(normalizer) | stated)


def _state_ends(published: Any, tokenizer: Any, config: Step) -> None:
    """Obey a stated ``add_bos_token`` or ``add_eos_token``; one that is not stated leaves its end as in tokenizer.json."""
    from tokenizers.processors import TemplateProcessing

    if _class_name(config, tokenizer) not in READ_ENDS:
        return
    before, after = _ends(published)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    first, last = ([published.token_to_id(token)] if token else [] for token in (bos, eos))
    add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
    wanted = before if add_bos is None else first if add_bos else [], after if add_eos is None else last if add_eos else []
    if wanted == (before, after):
        return
    if before not in ([], first) or after not in ([], last):
        raise CheckpointError(
            "tokenizer_config.json and tokenizer.json add different tokens at the ends of a text, more than bos and eos.",
            "Ask the checkpoint's authors which is right; to follow tokenizer.json, remove add_bos_token and add_eos_token "
            "from tokenizer_config.json.",
        )
    add_bos, add_eos = map(bool, wanted)
    single, pair = ([bos] * add_bos + [f"${name}"] + [eos] * add_eos for name in "AB")
    published.post_processor = TemplateProcessing(
        single=single,
        pair=single + [f"{piece}:1" for piece in pair],
        special_tokens=[(token, published.token_to_id(token)) for token in dict.fromkeys([bos] * add_bos + [eos] * add_eos)],
    )


def _ends(backend: Any) -> tuple[list[int], list[int]]:
    """Return the ids that are put before and after a text."""
    encoding = backend.encode("a")
    inside = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence is not None] or [len(encoding.ids)]
    return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]


def _options(step: Step) -> Step:
    return {name: value for name, value in step.items() if name != "type"}


def _prefixes(step: Step) -> bool:
    """Tell whether a step puts a space before a text."""
    if step.get("type") == "Sequence":
        return any(map(_prefixes, step.get("normalizers") or step.get("pretokenizers") or []))
    if step.get("type") == "Metaspace":
        return step["prepend_scheme"] != "never" if "prepend_scheme" in step else bool(step.get("add_prefix_space"))
    return step.get("type") == "Prepend" or bool(step.get("add_prefix_space"))


def _parts(backend: Any) -> Step:
    return {name: part for name, part in json.loads(backend.to_str()).items() if name not in NOT_COMPARED}


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, keys too: added_tokens.json has the tokens there."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _class_name(config: Step, tokenizer: Any = None) -> str:
    """Return the class that the checkpoint names, or that transformers chose, in the words of version 5."""
    return str(config.get("tokenizer_class") or type(tokenizer).__name__).removesuffix("Fast")


def _read(file: Path) -> Step:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _file_name(config: Step) -> str:
    """Return which file transformers reads: a checkpoint may hold several, for later versions."""
    from transformers.tokenization_utils_base import get_fast_tokenizer_file

    return str(get_fast_tokenizer_file(config["fast_tokenizer_files"])) if "fast_tokenizer_files" in config else "tokenizer.json"
