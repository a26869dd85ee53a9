"""What the doctor says: the answer first, then what it depends on; a patient that is ill is no reason to faint."""

import json
import re
import subprocess
import sys

import pytest
from families import FAMILIES
from tiny import make_checkpoint

from airllm_nb.compat import versions
from airllm_nb.notebook import doctor, findings

OPTIONS = {"device": "cpu", "dtype": "float32", "memory": "auto"}
INSTALLED = versions.installed()
HERE = f"{versions.version_of('transformers')}"
OLD = pytest.mark.skipif(INSTALLED >= (5,), reason="needs transformers 4: tests/matrix.py has it")


def rewrite(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def sections(text):
    """Return the answer, and the other paragraphs by their titles; checks what holds for all that the doctor says."""
    assert "Traceback" not in text
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    for line in text.splitlines():
        assert len(line) <= 100 or " " not in line.strip(" ✓✗→"), line  # a word that cannot be broken, such as a path
    answer, *rest = text.split("\n\n")
    return answer, {part.partition("\n")[0]: part.partition("\n")[2] for part in rest}


def flat(text):
    return " ".join(text.split())


def ask(folder, **options):
    answer, parts = sections(doctor.text(str(folder), **OPTIONS | options))
    return flat(answer), flat(parts["model"])


def test_the_environment(shell):
    answer, parts = sections(shell.run("%airllm doctor").rstrip("\n"))
    assert answer.startswith("✓ Models can run here")
    for name in ("Python", "airllm_nb", "transformers", *findings.PACKAGES):
        assert re.search(rf"^✓ {name} +\d+\.\d+", parts["versions"], re.MULTILINE), name
    assert f"{HERE}  (tested: {versions.TESTED[0]} to {versions.TESTED[-1]}; this is inside)" in parts["versions"]
    assert parts["devices"] == shell.run("%airllm devices").rstrip("\n")
    assert re.search(r"^✓ compute threads  \d+  \(.+\)$", parts["processor"])
    assert "✓ available memory" in parts["memory"]
    assert parts["memory"].count("← decides") == 1


def test_what_the_installed_version_cannot_compute():
    parts = sections(doctor.text(None, **OPTIONS))[1]
    unmet = [need for need in versions.TABLE if not need.met(INSTALLED)]
    shown = parts.get(f"refused, because transformers {HERE} does not compute it exactly", "")
    assert shown.splitlines() == [
        f"✗ {need.what:{2 + max(len(other.what) for other in unmet)}}needs {versions.dotted(need.exact)}" for need in unmet
    ]


def test_the_limit_that_decides(monkeypatch):
    monkeypatch.setenv("MEM_LIMIT", "1000")
    memory = sections(doctor.text(None, **OPTIONS))[1]["memory"]
    assert re.search(r"JupyterHub's MEM_LIMIT +0 B  ← decides", memory)
    assert memory.count("← decides") == 1


@pytest.mark.parametrize(
    ("version", "said"),
    [("5.99.0", "this is newer"), ("4.43.0", "this is older"), ("6.0.0", "is too new"), ("4.40.2", "is too old")],
)
def test_the_range_of_versions(monkeypatch, version, said):
    monkeypatch.setattr(versions, "version_of", lambda _: version)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert said in findings.transformers().text


def test_packages_that_are_missing_or_too_old(monkeypatch):
    found = {"torch": "1.13.1", "IPython": "9.0"}
    monkeypatch.setattr(versions, "version_of", lambda name: found.get(name, HERE if name == "transformers" else None))
    said = {one.subject: one for one in findings.packages()}
    assert (said["torch"].ok, said["torch"].text) == (False, "1.13.1, and airllm_nb needs 2.4")
    assert '%pip install -U "torch>=2.4"' in said["torch"].remedy
    assert said["IPython"].ok
    assert (said["safetensors"].ok, said["safetensors"].text) == (False, "not installed")
    assert "%pip install safetensors" in said["safetensors"].remedy
    assert "only a notebook needs it" in said["ipykernel"].text


@pytest.mark.parametrize("absent", ["torch", "safetensors"])
def test_an_engine_that_cannot_be_imported(absent):
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == {absent!r} or name.startswith({absent + "."!r}):
            raise ModuleNotFoundError("No module named " + name, name={absent!r})
sys.meta_path.insert(0, Refuse())
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
shell.run_cell("%load_ext airllm_nb")
shell.run_cell("%airllm doctor demo")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    answer, parts = sections(run.stdout.rstrip("\n"))
    assert answer.startswith("✗ demo cannot run here:"), run.stderr
    assert absent in answer
    assert "%pip install" in answer
    assert "✓ Python" in parts["versions"]


def test_a_model_that_can_run(shell, chat):
    answer, parts = sections(shell.run(f"%airllm doctor {chat} --device cpu --dtype float32").rstrip("\n"))
    assert answer == f"✓ {chat} can run here."
    assert re.sub(r"of [\d.]+ .B", "of SIZE", flat(parts["model"])) == (
        f"✓ exact transformers {HERE} computes llama exactly ✓ device cpu (as asked) ✓ dtype float32 (as asked) "
        "✓ weights 313 kB on disk ✓ memory 626 kB of SIZE (auto: available memory less 202 MB for the KV cache and activations); "
        "at least 313 kB ✓ layers 4 layers, all resident"
    )
    assert list(parts)[:2] == ["model", "versions"]


def test_what_streams(chat):
    assert "✓ layers 4 layers, all streamed; 247 kB read from disk per token" in ask(chat, memory="380kB")[1]
    assert "✓ layers 4 layers, 1 resident, 3 streamed; 185 kB read" in ask(chat, memory="510kB")[1]


def test_what_is_shared(chat):
    assert "✓ shared 313 kB mapped from the files" in ask(chat, dtype="auto", shared="insist")[1]
    assert "✓ shared nothing, because no weight that stays" in ask(chat, shared="insist")[1]


def test_defaults_count(shell, chat):
    shell.run("%config AirLLMMagics.memory = '1kB'")
    assert "A budget of 1.00 kB is too small" in shell.run(f"%airllm doctor {chat} --device cpu --dtype float32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "1kB"}, ["✗ memory A budget of 1.00 kB is too small", 'Give memory="1MB" or more']),
        ({"memory": "lots"}, ["✗ memory 'lots' is not a size."]),
        ({"dtype": "int3"}, ["✗ dtype There is no dtype 'int3'", "✓ device cpu"]),
        ({"shared": True}, ["✗ shared model-00001-of-00004.safetensors cannot be shared", "→ Load it without shared"]),
        ({"device": "gpu9"}, ["✗ device There is no device 'gpu9'.", 'Use "auto"', "✓ dtype float32"]),
    ],
)  # fmt: skip
def test_options_that_cannot_be(chat, options, said):
    answer, model = ask(chat, **options)
    assert answer.startswith(f"✗ {chat} cannot run here: ")
    assert "→ " in answer
    assert "✓ exact" in model
    assert all(words in model for words in said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/such/folder", "✗ files There is no folder"),
        ("org/name", '✗ files HF_HUB_OFFLINE is set, and "org/name" is not complete in the cache'),
        ("no name at all", "no valid name of a model on the hub"),
        ("~nouser/x", "✗ files There is no folder"),
    ],
)
def test_a_model_that_is_not_there(name, said):
    answer, model = ask(name)
    assert answer.startswith(f"✗ {name} cannot run here: ")
    assert said in model


def test_damaged_files(damaged):
    folder = damaged("llama")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    answer, model = ask(folder)
    assert f"cannot run here: {shard.name} is missing" in answer
    assert "✓ exact" in model
    assert "✗ files" in model
    (folder / "config.json").write_text("[")
    assert "✗ files config.json is damaged" in ask(folder)[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, ["✗ exact The weights of this checkpoint are quantized (aqlm)"]),
        ({"model_type": "nosuchmodel"}, ["✗ config.json", "does not know the architecture 'nosuchmodel'"]),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}, ["it brings its own code", "--trust-remote-code"]),
        ({"rope_scaling": {"rope_type": "foo", "factor": 2.0}}, ["of type 'foo'", "Write one of", "llama3"]),
        ({"intermediate_size": 95}, ["✓ exact", "✗ weights Tensor", "has shape", "asks for"]),
        ({"hidden_act": "foo"}, ["✗ weights", "cannot build this"]),
    ],
)
def test_a_model_that_cannot_run(damaged, fields, said):
    answer, model = ask(rewrite(damaged("llama"), **fields))
    assert "cannot run here: " in answer
    assert "→ " in answer
    assert all(words in model for words in said)
    assert "✓ device cpu (as asked) ✓ dtype float32 (as asked) ✓ weights 313 kB on disk" in model


def test_all_that_an_old_version_would_compute_wrongly_is_told(chat, monkeypatch):
    from airllm_nb.compat import config

    raw = {"model_type": "deepseek_v2", "rope_scaling": {"type": "yarn", "factor": 4.0}}
    refusals = config.refusals
    monkeypatch.setattr(config, "refusals", lambda _: refusals(raw, (4, 50)))
    model = ask(chat)[1]
    assert "✗ exact transformers 4.50 cannot compute DeepSeek-V2 exactly." in model
    assert "✗ exact transformers 4.50 would silently compute yarn of DeepSeek-V2 wrongly." in model
    assert '→ Run %pip install -U "transformers>=5.20" and restart the kernel.' in model


@OLD
def test_a_config_of_version_5_is_rewritten_and_that_is_told(damaged):
    folder = damaged("llama")
    rewrite(folder, transformers_version="5.23.0", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    said = f"✓ config.json written by transformers 5.23.0, rewritten in memory for {HERE}: rope_parameters → rope_theta"
    assert said in ask(folder)[1]


def test_a_family_that_is_not_compared(tmp_path):
    folder = make_checkpoint(tmp_path / "opt", raw={
        "model_type": "opt", "vocab_size": 259, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    })  # fmt: skip
    assert f"✓ exact nothing is known against opt on transformers {HERE}; it is not among the families" in ask(folder)[1]


def test_each_family_is_computed_exactly_or_the_doctor_says_what_can(tmp_path):
    for name in ("gemma2", "llama-head-dim", "phi4", "granite"):
        raw = FAMILIES[name]
        unmet = list(versions.unmet(raw, INSTALLED))
        folder = tmp_path / name
        if not unmet:
            assert f"✓ exact transformers {HERE} computes {raw['model_type']} exactly" in ask(make_checkpoint(folder, raw=raw))[1]
        else:
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(raw))
            assert all(f'"transformers>={versions.dotted(need.exact)}"' in ask(folder)[1] for need in unmet)


def test_a_fault_of_ours_is_a_finding_too(chat, monkeypatch):
    from airllm_nb.engine import planning

    def fail(*_, **__):
        raise RuntimeError("one\n  two")

    monkeypatch.setattr(planning, "build", fail)
    answer, model = ask(chat)
    assert "cannot run here: RuntimeError: one two → This is a fault of airllm_nb: please report it" in answer
    assert "✗ weights RuntimeError: one two" in model


def test_commands_are_never_broken():
    command = '%pip install -U "transformers>=4.43"'
    for length in range(100):
        one = findings.Finding(False, "x", "y", f"{'a ' * length}Run  {command}  and restart the kernel.")
        assert command in "\n".join(doctor._marked(one, 10))
