"""Tiny real checkpoints, made on the spot, and a real IPython shell."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAYERS = 4


def make_checkpoint(folder, *, chat=True, context=4096, generation=None, tokenizer=True):
    """A llama of random weights whose greedy text is not one token over and over, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, "<user>": 1, "<assistant>": 2, "<system>": 3}
    vocabulary |= {letter: len(vocabulary) + index for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<user>", "<assistant>", "<system>"])
    if tokenizer:
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
        fast.chat_template = CHAT_TEMPLATE if chat else None
        fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(**(generation or {}))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint with a chat template."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A checkpoint without a chat template, and with a short context."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "plain", chat=False, context=40)


class Shell:
    """A real shell, and what a cell shows."""

    def __init__(self, capsys):
        self.ip = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "NoColor"}}))
        self._capsys = capsys

    def __getitem__(self, name):
        return self.ip.user_ns[name]

    def run(self, cell):
        """Run a cell that must succeed; returns what it printed."""
        result = self.ip.run_cell(cell)
        shown = self._capsys.readouterr()
        assert result.success, shown.out + shown.err
        assert not shown.err
        return shown.out

    def fail(self, cell):
        """Run a cell that must fail with one or two lines and no traceback; returns them."""
        result = self.ip.run_cell(cell)
        assert not result.success
        shown = self._capsys.readouterr()
        text = shown.out + shown.err
        assert "Traceback" not in text
        return text.strip()


@pytest.fixture
def shell(capsys):
    shell = Shell(capsys)
    shell.run("%load_ext airllm_nb")
    yield shell
    shell.ip.run_line_magic("unload_ext", "airllm_nb")
