"""What all tests share: no network, one thread per worker, tiny checkpoints made once."""

import gc
import os
import signal
import sys
from pathlib import Path

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell that starts tests in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers run beside each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "compat"))
sys.path.insert(0, str(Path(__file__).parent / "faults"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from outcomes import pytest_terminal_summary  # noqa: F401  # a hook

from airllm_nb.engine.interrupts import free_locks


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a function that gives the folder of a tiny checkpoint of a kind. Read only: copy it before you hurt it."""
    from tiny import make_checkpoint

    made = {}

    def get(kind="llama", **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(kind), kind, **options)
        return made[key]

    return get


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_is_no_garbage():
    """Or whoever collects garbage, as every session that unloads a model does, looks through all of it for 0.3 seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """PyTorch's mode is the session's, and no test may leave it changed for the next one."""
    yield
    assert "torch" not in sys.modules or sys.modules["torch"].is_grad_enabled()


@pytest.fixture(autouse=True)
def locks_stay_free():
    """Tests interrupt at random moments; see `free_locks`."""
    yield
    free_locks()


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """Return a function that gives a copy of a tiny checkpoint, to be hurt."""
    import shutil

    def get(kind="llama", **options):
        return Path(shutil.copytree(checkpoint(kind, **options), tmp_path / "damaged"))

    return get
