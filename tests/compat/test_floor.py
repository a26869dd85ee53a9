"""With a transformers that nothing can run on, the extension still loads, says in one line what to do, and what can work works.

In the environment below the floor (see `tests/matrix.py`) that is what is really installed; elsewhere its metadata say so.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import IPython
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from airllm_nb.compat import versions
from airllm_nb.errors import UnsupportedError

REALLY = "as it is"
UPGRADE = 'Run  %pip install -U "transformers>=4.43"  and restart the kernel.'
SITUATIONS = {
    REALLY: (f"transformers {versions.version_of('transformers')} is too old: airllm_nb needs 4.43 or newer.", UPGRADE),
    "4.40.2": ("transformers 4.40.2 is too old: airllm_nb needs 4.43 or newer.", UPGRADE),
    "4.42.0.dev0": ("transformers 4.42.0.dev0 is too old: airllm_nb needs 4.43 or newer.", UPGRADE),
    "6.0.0": (
        f"transformers 6.0.0 is too new: airllm_nb is tested up to {versions.TESTED[-1]} and needs a version below 6.",
        'Run  %pip install "transformers>=4.43,<6"  and restart the kernel, or update airllm_nb.',
    ),
    "6.1.dev0": ("transformers 6.1.dev0 is too new", 'Run  %pip install "transformers>=4.43,<6"  and restart the kernel'),
    "none": ("transformers is not installed: airllm_nb needs 4.43 or newer.", UPGRADE),
}


@pytest.fixture(params=SITUATIONS)
def said(request, monkeypatch, tmp_path):
    """Put another version of transformers, or none, in place of the installed one; returns the cause and the remedy."""
    if request.param == REALLY:
        if versions.installed() >= versions.FLOOR:
            pytest.skip("needs a transformers below the floor: tests/matrix.py has one")
        return SITUATIONS[REALLY]
    pretend(request.param, monkeypatch, tmp_path)
    return SITUATIONS[request.param]


def pretend(version, monkeypatch, tmp_path):
    """Let importlib.metadata find this version of transformers, or none, as in a kernel that has just been started."""
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    if version == "none":
        find = importlib.metadata.distribution

        def missing(name):
            if name == "transformers":
                raise importlib.metadata.PackageNotFoundError(name)
            return find(name)

        monkeypatch.setattr(importlib.metadata, "distribution", missing)
        return
    folder = tmp_path / f"transformers-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def run(capsys):
    """Return a function that runs a cell in a real shell, and gives whether it succeeded and what it showed."""
    colors = "nocolor" if IPython.version_info >= (9,) else "NoColor"
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}, InteractiveShell={"colors": colors}))

    def run(cell):
        result = shell.run_cell(cell)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return result.success, (shown.out + shown.err).strip()

    yield run
    shell.extension_manager.unload_extension("airllm_nb")


def test_loading_says_it_in_one_line(said, run):
    cause, remedy = said
    loaded, shown = run("%load_ext airllm_nb")
    assert loaded
    assert shown.startswith(cause)
    assert remedy in shown
    assert "\n" not in shown


@pytest.mark.parametrize("cell", ["%airllm load org/name", "%airllm plan /no/folder", "%airllm load demo", "%%airllm\nHello"])
def test_what_needs_transformers_gives_the_same_cause_and_remedy(said, run, cell):
    cause, remedy = said
    run("%load_ext airllm_nb")
    succeeded, shown = run(cell)
    assert not succeeded
    first, second = shown.splitlines()
    assert first.startswith(f"UnsupportedError: {cause}")
    assert second.startswith(f"  → {remedy}")


@pytest.mark.parametrize(
    ("cell", "shows"),
    [
        ("%airllm", "%airllm load MODEL"),
        ("%airllm?", "--max-new-tokens"),
        ("%airllm load --help", "--memory"),
        ("%airllm devices", "✓ cpu"),
        ("%airllm doctor", "✓ cpu"),
        ("%airllm doctor --help", "--memory"),
        ("%airllm status", "No model is loaded."),
        ("%airllm unload", "No model was loaded."),
        ("%unload_ext airllm_nb", ""),
    ],
)
@pytest.mark.usefixtures("said")
def test_what_needs_no_transformers_works(run, cell, shows):
    run("%load_ext airllm_nb")
    succeeded, shown = run(cell)
    assert succeeded, shown
    assert shows in shown


@pytest.mark.parametrize("model", ["", " org/name"])
def test_the_doctor_says_it_first(said, run, model):
    run("%load_ext airllm_nb")
    succeeded, shown = run(f"%airllm doctor{model}")
    assert succeeded
    answer, _, rest = shown.partition("\n\n")
    assert " ".join(answer.split()).startswith(f"✗ {model.strip() or 'No model'} can{'not' if model else ''} run here: {said[0]}")
    assert said[1].partition(",<")[0] in answer
    assert "✗ transformers" in rest


def test_python_gets_it_before_anything_is_fetched(said):
    import airllm_nb

    for call in (airllm_nb.plan, airllm_nb.LayeredModel.from_pretrained):
        with pytest.raises(UnsupportedError) as refusal:
            call("org/name")
        assert refusal.value.cause.startswith(said[0])
        assert refusal.value.remedy.startswith(said[1])


def test_a_version_within_the_range_is_not_mentioned(run, monkeypatch, tmp_path):
    pretend("5.24.0.dev0", monkeypatch, tmp_path)
    assert run("%load_ext airllm_nb") == (True, "")
    assert versions.installed() == (5, 24, 0)


def test_a_version_that_was_installed_over_the_one_in_memory(run, monkeypatch, tmp_path):
    """The remedies say `%pip install`: whoever then forgets to restart would compute with the old version, guarded as the new."""
    import transformers

    pretend("5.24.0", monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    run("%load_ext airllm_nb")
    shown = run("%airllm plan org/name")[1]
    assert f"transformers {transformers.__version__} is in memory, and 5.24.0 has been installed since." in shown
    assert "→ Restart the kernel." in shown


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("4.57.6", (4, 57, 6)), ("5.24.0.dev0", (5, 24, 0)), ("4.57.6.post1", (4, 57, 6)), ("5.0.0rc1", (5, 0, 0)),
        ("5.2rc0", (5, 2)), ("4.57.6+cu12", (4, 57, 6)), ("6", (6,)), ("unknown", ()),
    ],
)  # fmt: skip
def test_versions_are_read(text, version):
    assert versions.parse(text) == version


def test_loading_the_extension_imports_nothing_heavy():
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell().run_line_magic("load_ext", "airllm_nb")
print(sorted({"torch", "transformers", "ipywidgets"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.skipif(
    versions.installed() >= versions.FLOOR, reason="needs a transformers below the floor: tests/matrix.py has one"
)
def test_installed_with_no_deps(tmp_path):
    """Into a session whose transformers pip would otherwise have replaced."""
    site = tmp_path / "site"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, root], check=True)
    code = "%load_ext airllm_nb\nimport airllm_nb\nprint(airllm_nb.__file__)"
    command = [sys.executable, "-m", "IPython", "--quick", "--no-banner", "-c", code]
    environ = os.environ | {"PYTHONPATH": str(site), "IPYTHONDIR": str(tmp_path / "ipython")}
    shown = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    said, where = shown.stdout.splitlines()
    assert said == " ".join(SITUATIONS[REALLY])
    assert Path(where).is_relative_to(site)
