"""The magics, through a real IPython shell and the real engine."""

import gc
import subprocess
import sys
import weakref

import pytest
from waiting import wait_for

LOAD = "%airllm load {} --device cpu --dtype float32"


def test_load_ask_status_unload(shell, chat):
    name = chat.name
    assert shell.run(LOAD.format(chat)) == f"{name} · 4 layers, all resident · cpu · float32 · 626 kB\n"
    shown = shell.run("%%airllm --max-new-tokens 12 -o answer\nHello {there} $HOME")
    answer = shell["answer"]
    assert shown == answer.text + "\n"
    assert shell["_airllm"] is answer
    assert len(answer.token_ids) == 12
    assert answer.prompt_tokens == len("<user>Hello {there} $HOME\n<assistant>")  # the prompt is not expanded
    assert answer.stopped == "length"
    assert [layer.passes for layer in answer.layers] == [12] * 4
    status = shell.run("%airllm status")
    assert name in status
    assert "all 4 layers stay" in status
    assert "context   4096 tokens" in status
    assert "s per token" in status
    assert shell.run("%airllm unload") == "The model is unloaded.\n"
    assert shell.run("%airllm unload") == "No model was loaded.\n"
    assert "No model is loaded" in shell.run("%airllm status")
    assert "No model is loaded" in shell.fail("%%airllm\nHello")


def test_streaming_layers_give_the_same_text(shell, chat):
    from airllm_nb import plan

    shell.run(LOAD.format(chat))
    resident = shell.run("%%airllm --max-new-tokens 8\nHello")
    least = plan(chat, device="cpu", dtype="float32").least
    assert "4 layers, all streamed" in shell.run(f"{LOAD.format(chat)} --memory {least}")
    assert shell.run("%%airllm --max-new-tokens 8 -o answer\nHello") == resident
    for layer in shell["answer"].layers:
        # Reading ahead began before the run, and goes on into a pass that never comes.
        assert layer.disk_nbytes + layer.cache_nbytes >= 7 * layer.nbytes
        assert layer.read_seconds > 0


def test_devices_and_plan(shell, chat):
    devices = shell.run("%airllm devices")
    assert devices.startswith("✓ cpu")
    planned = shell.run(f"%airllm plan {chat} --device cpu --dtype float32")
    assert "4 layers stay" in planned
    assert "\nthreads   " in planned
    assert "\nspeed     about " in planned
    assert "No model is loaded" in shell.run("%airllm status")


def test_help(shell):
    assert "%airllm plan MODEL" in shell.run("%airllm")
    for word in ("--help", "-h", "help"):
        assert "--max-new-tokens" in shell.run(f"%airllm {word}")
    assert "--trust-remote-code" in shell.run("%airllm load --help")
    assert "--max-new-tokens" in shell.run("%%airllm --help\n-")
    for magic in ("%airllm", "%%airllm"):
        text = shell.ip.object_inspect(magic)["docstring"]
        for part in (
            "load",
            "continue",
            "unload",
            "status",
            "devices",
            "plan",
            "doctor [MODEL]",
            "bench [ROW ...]",
            "--memory",
            "--top-p",
            "--stop",
            "-o NAME",
            "Examples",
        ):
            assert part in text


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%airllm laod demo", "unknown verb 'laod'; did you mean load?"),
        (
            "%airllm xyzzy",
            "there are load, continue, map, unload, status, devices, plan, doctor, cache, bench, and %%airllm for a prompt.",
        ),
        ("%airllm load", "required: MODEL"),
        ("%airllm load x --dvice cpu", "unrecognized arguments: --dvice"),
        ("%airllm load 'x", "a quotation mark is not closed"),
        ("%airllm bench --loops 3", "unrecognized arguments: --loops"),
        ("%airllm status now", "unrecognized arguments: now"),
        ("%airllm load /no/such/folder", "/no/such/folder"),
        ("%%airllm --max-new-tokens many\nHi", "invalid int value: 'many'"),
        ("%%airllm -o 2x\nHi", "'2x' is no name for a variable"),
        ("%%airllm -o class\nHi", "'class' is no name for a variable"),
        ("%%airllm --stop --\nHi", "argument --stop: expected one argument, as in --memory=4GB or --stop=--"),
        ("%%airllm\n", "the cell body is empty"),
        ("%%airllm\nHi", "No model is loaded."),
    ],
)
def test_bad_lines_get_one_line(shell, cell, said):
    assert said in shell.fail(cell)


def test_bench(shell, tmp_path):
    """Row a is measured, or refused because other tests compute: a line of the table in either case."""
    shown = shell.run(f"%airllm bench a --shape tiny --tokens 1 --root {tmp_path} --json {tmp_path}/found.json")
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert table[0] == "| row | measure | goal | measured |"
    assert table[2].startswith("| a | fits in memory")
    assert (tmp_path / "found.json").exists()
    assert "there is no row 'z'" in shell.run("%airllm bench z")


def test_sharing(shell, chat):
    load = f"%airllm load {chat} --device cpu"
    refused = shell.fail(f"{load} --shared")
    assert "model-00001-of-00004.safetensors cannot be shared" in refused
    assert "--shared-insist" in refused
    shown = shell.run(f"{load} --shared-insist")
    assert shown == f"{chat.name} · 4 layers, all resident · cpu · bfloat16 · 314 kB, 313 kB shared\n"
    assert "\nshared    313 kB mapped from the files" in shell.run("%airllm status")
    shell.run("%%airllm --max-new-tokens 3 -o answer\nHello")
    text = shell["answer"].text
    shell.run(f"{load} --dtype bfloat16")
    shell.run("%%airllm --max-new-tokens 3 -o answer\nHello")
    assert shell["answer"].text == text
    assert "shared" not in shell.run("%airllm status")


def test_bad_input_for_a_loaded_model(shell, chat, plain):
    shell.run(LOAD.format(chat))
    for cell, said in [
        ("%%airllm\n \n", "There is no prompt."),
        ("%%airllm --max-new-tokens 0\nHi", "max-new-tokens is 0."),
        ("%%airllm --temperature -1\nHi", "The temperature is -1.0."),
        ("%%airllm --temperature nan\nHi", "The temperature is nan."),
        ("%%airllm --top-p 0.5\nHi", "top-p has no effect without sampling."),
        ("%%airllm --temperature 1 --top-p 1.5\nHi", "top-p is 1.5."),
        ("%%airllm --seed -1\nHi", "The seed is -1."),
        ("%%airllm --stop ''\nHi", "A stop text is empty."),
        ("%%airllm --raw --system Hello\nHi", "needs a chat template"),
        ("%%airllm\n" + "x" * 5000, "has a context of 4096"),
    ]:
        assert said in shell.fail(cell)
    shell.run("%%airllm --max-new-tokens 2\nstill usable")
    shell.run(LOAD.format(plain))
    assert "needs a chat template" in shell.fail("%%airllm --system Hello\nHi")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{chat} --device", "expected one argument, as in --memory=4GB"),
        ("{chat} --device gpu9", "gpu9"),
        ("{chat} --dtype int3", "int3"),
        ("{chat} --memory lots", "'lots' is not a size"),
        ("{chat} --memory=-1GB", "'-1GB' is not a size"),
        ("{chat} --memory 1kB", "1.00 kB"),
        ("/no/such/folder", "/no/such/folder"),
        ("~nouser/x", "~nouser/x"),
        ("{chat}/config.json", "it is a file"),
        ("org/name", "org/name"),
    ],
)
def test_a_load_that_cannot_succeed_keeps_the_model(shell, chat, line, said):
    shell.run(LOAD.format(chat))
    model = shell.magics.session.model
    assert said in shell.fail("%airllm load " + line.format(chat=chat))
    assert shell.magics.session.model is model


def test_a_load_that_fails_midway_leaves_no_model(shell, chat, monkeypatch):
    from airllm_nb.engine.reader import Reader
    from airllm_nb.errors import CheckpointError

    def changed(*_):
        raise CheckpointError("The file has changed.", "Fetch it again.")

    shell.run(LOAD.format(chat))
    model = weakref.ref(shell.magics.session.model)
    monkeypatch.setattr(Reader, "__init__", changed)
    assert "has changed" in shell.fail(LOAD.format(chat))
    assert model() is None
    assert "No model is loaded" in shell.run("%airllm status")


def test_defaults_are_configurable(shell, chat):
    shell.run("%config AirLLMMagics.device = 'cpu'\n%config AirLLMMagics.dtype = 'bfloat16'")
    assert "cpu · bfloat16" in shell.run(f"%airllm load {chat}")
    assert "cpu · float32" in shell.run(f"%airllm load {chat} --dtype float32")
    shell.run("%config AirLLMMagics.memory = 'lots'")
    assert "'lots' is not a size" in shell.fail(f"%airllm load {chat}")


def test_an_invalid_default_is_dropped(shell):
    shell.run("%config AirLLMMagics.dtype = 'float32'")
    shell.ip.run_cell("%config AirLLMMagics.display = 'x'")  # prints an error, and keeps the value in the shell's configuration
    shell._capsys.readouterr()
    shown = shell.run("%reload_ext airllm_nb")
    assert shown.startswith("%config AirLLMMagics.display is dropped.")
    assert shown.count("\n") == 1
    assert (shell.magics.display, shell.magics.dtype) == ("auto", "float32")
    assert shell.run("%reload_ext airllm_nb") == ""
    assert (shell.magics.display, shell.magics.dtype) == ("auto", "float32")


def test_displays_of_past_cells_are_not_held(shell, chat, monkeypatch):
    from airllm_nb.notebook import renderers

    made = []

    class Renderer(renderers.SilentRenderer):
        def __init__(self, _stop):
            made.append(weakref.ref(self))

    monkeypatch.setitem(renderers.KINDS, "text", Renderer)
    shell.run(LOAD.format(chat))
    shell.run("%%airllm --max-new-tokens 2\nHello")
    gc.collect()
    assert [renderer() for renderer in made] == [None, None]


def test_variables_and_quotes_in_the_line(shell, chat):
    shell.run(f"folder = {str(chat)!r}\nwho = 'a poet of few words'\ncount = 3")
    shell.run("%airllm load {folder} --device cpu --dtype float32")
    shell.run('%%airllm --max-new-tokens {count} --system "You are {who}, {unknown}" -o answer\nHi')
    expected = "<system>You are a poet of few words, {unknown}\n<user>Hi\n<assistant>"
    assert shell["answer"].prompt_tokens == len(expected)
    assert len(shell["answer"].token_ids) == 3


def test_unload_ext_really_unloads(shell, chat):
    shell.run(LOAD.format(chat))
    model = weakref.ref(shell.magics.session.model)
    shell.run("%unload_ext airllm_nb")
    gc.collect()
    assert model() is None
    assert "not found" in shell.fail("%airllm status")
    assert "not found" in shell.fail("%%airllm\nHello")
    assert shell.ip.complete("%airllm lo", "%airllm lo")[1] == []
    assert not [one for one in shell.ip.configurables if type(one).__name__ == "AirLLMMagics"]
    shell.run("%load_ext airllm_nb")
    shell.run(LOAD.format(chat))
    shell.run("%reload_ext airllm_nb")
    assert "No model is loaded" in shell.run("%airllm status")


def test_unload_ext_ends_what_a_panel_runs_and_closes_it(shell, chat):
    from airllm_nb.notebook import panel

    shell.run(LOAD.format(chat))
    session = shell.magics.session
    opened = panel.Panel(session, {"device": "cpu", "dtype": "auto", "memory": "auto"})
    opened.chat.prompt.value, opened.chat.most.value = "Hello", 4000
    opened.ask_button.click()
    wait_for(lambda: session.busy)
    shell.run("%unload_ext airllm_nb")
    assert not session.busy
    assert not session.loaded
    assert opened.comm is None
    wait_for(lambda: not opened._working)
    assert "not found" in shell.fail("%airllm status")


def test_loading_the_extension_imports_nothing_heavy():
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
shell.run_line_magic("load_ext", "airllm_nb")
shell.run_line_magic("airllm", "status")
shell.complete("%airllm load --device ", "%airllm load --device ")
print(sorted({"torch", "transformers", "ipywidgets"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr
