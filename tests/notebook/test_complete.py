"""Tab completion, asked as the terminal asks and as Jupyter asks."""

import pytest

CASES = [
    ("%airllm ", {"load", "unload", "status", "devices", "plan", "doctor"}, set()),
    ("%airllm lo", {"load"}, {"unload"}),
    ("%airllm load ", {"demo", "--device", "--trust-remote-code"}, {"load"}),
    ("%airllm load de", {"demo"}, {"--device"}),
    ("%airllm load demo --d", {"--device", "--dtype"}, {"demo", "--memory"}),
    ("%airllm load demo --device ", {"auto", "cpu"}, {"--device", "demo"}),
    ("%airllm load demo --device=c", {"cpu"}, {"auto"}),
    ("%airllm load demo --dtype fl", {"float32", "float16"}, {"bfloat16"}),
    ("%airllm load demo --sh", {"--shared", "--shared-insist"}, {"--memory"}),
    ("%airllm load --shared ", {"demo", "--memory"}, set()),
    ("%airllm doctor ", {"demo", "--memory", "--trust-remote-code"}, {"load"}),
    ("%airllm unload ", set(), {"demo", "load"}),
    ("%airllm nonsense ", set(), {"demo", "load"}),
    ("%%airllm --t", {"--temperature", "--top-p"}, {"--seed", "load"}),
    ("%%airllm --max-new-tokens 5 --sy", {"--system"}, {"--seed"}),
]


@pytest.mark.parametrize(("text", "offered", "not_offered"), CASES)
@pytest.mark.filterwarnings("ignore:.Completer.complete. is pending:PendingDeprecationWarning")
def test_as_the_terminal_asks(shell, text, offered, not_offered):
    _, found = shell.ip.complete(None, text, len(text))
    assert offered <= set(found)
    assert not not_offered & set(found)


@pytest.mark.parametrize(("text", "offered", "not_offered"), CASES)
@pytest.mark.filterwarnings("ignore::IPython.core.completer.ProvisionalCompleterWarning")
def test_as_jupyter_asks(shell, text, offered, not_offered):
    completed = {text[: one.start] + one.text for one in shell.ip.Completer.completions(text, len(text))}
    head, _, word = text.rpartition(" ")
    option = word.partition("=")[0] + "=" if "=" in word else ""
    assert {f"{head} {option}{end}" for end in offered} <= completed
    assert not {f"{head} {option}{end}" for end in not_offered} & completed


def test_folders(shell, tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / ".hidden").mkdir()
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    assert shell.ip.complete(None, "%airllm load mo", 15)[1] == ["models/"]
    assert shell.ip.complete(None, "%airllm load models/", 20)[1] == ["models/tiny/"]
    text = f"%airllm plan {tmp_path}/mod"
    assert shell.ip.complete(None, text, len(text))[1] == [f"{tmp_path}/models/"]
