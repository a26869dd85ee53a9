"""A real IPython shell, and tiny checkpoints that can talk."""

import shutil

import IPython
import pytest
from IPython.core.interactiveshell import InteractiveShell
from runs import Written
from traitlets.config import Config

from airllm_nb.notebook.magics import AirLLMMagics
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session


@pytest.fixture
def written():
    """What the session of a test has written."""
    return Written()


@pytest.fixture
def session(written):
    session = Session(SilentRenderer, written.append)
    yield session
    session.unload()


@pytest.fixture(scope="session")
def chat(checkpoint):
    """A checkpoint with a chat template, and a context long enough for a run to be interrupted."""
    return checkpoint("llama", tokenizer=True, max_position_embeddings=4096)


@pytest.fixture(scope="session")
def plain(checkpoint, tmp_path_factory):
    """A checkpoint without a chat template, and with a context of 40 tokens."""
    from tiny import make_tokenizer

    folder = shutil.copytree(
        checkpoint("llama", tokenizer=True, max_position_embeddings=40), tmp_path_factory.mktemp("plain") / "plain"
    )
    make_tokenizer(folder, chat_template=None)
    return folder


class Shell:
    """A real shell, and what its cells show."""

    def __init__(self, capsys):
        colors = "nocolor" if IPython.version_info >= (9,) else "NoColor"
        self.ip = InteractiveShell(config=Config(HistoryManager={"enabled": False}, InteractiveShell={"colors": colors}))
        self._capsys = capsys

    @property
    def magics(self):
        return self.ip.magics_manager.registry[AirLLMMagics.__name__]

    def __getitem__(self, name):
        return self.ip.user_ns[name]

    def run(self, cell):
        """Run a cell that must succeed with nothing on stderr; returns what it printed."""
        result = self.ip.run_cell(cell)
        shown = self._capsys.readouterr()
        assert result.success, shown.out + shown.err
        assert not shown.err
        return shown.out

    def fail(self, cell):
        """Run a cell that must fail with a line or two and no traceback; returns them."""
        result = self.ip.run_cell(cell)
        shown = self._capsys.readouterr()
        text = (shown.out + shown.err).strip()
        assert not result.success
        assert "Traceback" not in text
        assert text.count("\n") <= 1
        return text


@pytest.fixture
def shell(capsys):
    shell = Shell(capsys)
    shell.run("%load_ext airllm_nb")
    yield shell
    shell.ip.extension_manager.unload_extension("airllm_nb")
