"""`%%airllm --lens`: after the answer, what each layer would have said."""

import pytest

from airllm_nb.notebook.one_at_a_time import SessionError
from airllm_nb.notebook.session import LENS_TOKENS
from airllm_nb.notebook.summary import Interrupted

LOAD = "%airllm load {} --device cpu --dtype float32"


def test_the_answer_comes_first_and_then_the_layers(shell, chat):
    shell.run(LOAD.format(chat))
    plain = shell.run("%%airllm --max-new-tokens 6 -o answer\nHello")
    shown = shell.run("%%airllm --max-new-tokens 6 --lens -o answer\nHello")
    assert shown.startswith(plain)
    lines = shown[len(plain) :].splitlines()
    assert lines[0].startswith("After ")
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2", "3"]
    trace, answer = shell["_airllm_trace"], shell["answer"]
    assert trace.ids[answer.prompt_tokens :] == answer.token_ids[:-1]
    assert trace.norms.shape[1] == LENS_TOKENS
    assert trace.top_ids[-1, -len(answer.token_ids) :, 0].tolist() == list(answer.token_ids)  # what the last layer says is said


def test_in_a_notebook_it_is_a_picture(shell, chat, monkeypatch):
    from airllm_nb.notebook import magics

    published = []
    monkeypatch.setattr(magics, "publish", lambda what, **_: published.append(what))
    monkeypatch.setattr(shell.magics, "_display_kind", lambda: "widget")
    shell.run(LOAD.format(chat))
    shell.run("%%airllm --max-new-tokens 6 --lens\n<script>alert(1)</script>")
    html = published[-1]._repr_html_()
    assert html.startswith('<div class="airllm-trace"')
    assert "<script" not in html
    assert html.count("<td") == 4 * LENS_TOKENS


def test_continuing_still_works(shell, chat):
    shell.run(LOAD.format(chat))
    shell.run("%%airllm --max-new-tokens 8 -o whole\nHello")
    shell.run("%%airllm --max-new-tokens 4 --lens\nHello")
    shell.run("%airllm continue")
    assert shell["_airllm"].token_ids == shell["whole"].token_ids


def test_without_a_text_there_is_nothing_to_look_into(session, chat):
    with pytest.raises(SessionError, match="No model is loaded"):
        session.trace()
    session.load(str(chat), device="cpu", dtype="float32")
    with pytest.raises(SessionError, match="no text"):
        session.trace()
    session.ask("Hello", max_new_tokens=2)
    session.trace(last=3)
    session.unload()
    session.load(str(chat), device="cpu", dtype="float32")
    with pytest.raises(SessionError, match="no text"):
        session.trace()


def test_it_can_be_stopped(session, chat):
    session.load(str(chat), device="cpu", dtype="float32")
    expected = session.ask("Hello", max_new_tokens=2).text

    class Stopping:
        def update(self, *_args):
            session.stop()

        def __getattr__(self, _name):
            return self.update

    with pytest.raises(Interrupted):
        session.trace(renderer=Stopping())
    assert not session.busy
    assert session.model.progress is None
    assert session.ask("Hello", max_new_tokens=2).text == expected
