"""The panel without a browser: what its buttons do to the session, and what they say."""

import gc
import threading
import weakref

import ipywidgets
import pytest
from waiting import wait_for

from airllm_nb.notebook import background, report, strip
from airllm_nb.notebook.panel import Panel
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session

DEFAULTS = {"device": "cpu", "dtype": "float32", "memory": "auto"}


class Person:
    """Clicks, types, and reads."""

    def __init__(self, panel):
        self.panel = panel

    def click(self, button):
        widget = getattr(self.panel, f"{button}_button")
        assert not widget.disabled, f"{button} is disabled"
        widget.click()

    def done(self):
        wait_for(lambda: not self.panel._working and self.panel.stop_button.disabled, 60)  # the last is set after what it shows
        return self

    def load(self, folder):
        self.panel.chooser.model.value = str(folder)
        self.click("load")
        return self.done()

    def ask(self, prompt, most=12):
        self.panel.chat.prompt.value = prompt
        self.panel.chat.most.value = most
        self.click("ask")
        return self

    @property
    def conversation(self):
        return self.panel.chat._turns.value

    @property
    def said(self):
        return self.panel.chat._said.value + self.panel._said.value + "".join(
            place.value for place in self.panel.chooser._problems.values()
        )  # fmt: skip


@pytest.fixture
def published():
    return []


@pytest.fixture
def person(monkeypatch, published):
    monkeypatch.setattr(background, "RESTS", 0.02)
    monkeypatch.setattr("airllm_nb.engine.plan.predict", lambda *_, **__: None)
    session = Session(SilentRenderer)
    panel = Panel(session, DEFAULTS, published.append)
    yield Person(panel)
    panel.close()
    session.unload()


def test_load_ask_and_unload(person, chat, published):
    panel = person.panel
    assert "no model is loaded" in panel._head.value
    assert panel.chat.layout.display == "none"
    person.load(chat)
    assert "layers, all resident" in panel._head.value
    assert panel.chooser.layout.display == "none"
    assert not person.said
    person.ask("Hello <b>you</b>").done()
    expected = panel.session.answer
    assert [message["role"] for message in panel.session.conversation.messages] == ["user", "assistant"]
    assert "Hello &lt;b&gt;you&lt;/b&gt;" in person.conversation
    assert f"{len(expected.token_ids)} tokens in" in person.conversation
    assert panel.chat.prompt.value == ""
    assert published == [expected]
    assert panel.stop_button.disabled
    person.ask("And now?").done()
    assert len(panel.session.conversation.messages) == 4
    assert "were in the KV cache" in person.conversation
    person.click("text")
    assert panel._plain.value.startswith("user: Hello <b>you</b>\n\nassistant: ")
    person.click("forget")
    assert "Hello" not in person.conversation
    person.click("unload")
    assert not panel.session.loaded
    assert panel.chooser.layout.display is None


def test_stop_and_go_on_is_as_if_nothing_had_happened(person, chat):
    panel = person.load(chat).panel
    person.ask("Hello", most=30).done()
    whole = panel.session.conversation.messages[-1]["content"]
    person.click("forget")
    original = panel.chat.write

    def stop_soon(text):
        original(text)
        panel.session.stop()

    panel.chat.write = stop_soon
    person.ask("Hello", most=30).done()
    panel.chat.write = original
    assert "stopped" in person.conversation
    part = panel.session.conversation.messages[-1]["content"]
    assert len(part) < len(whole)
    person.click("proceed")
    person.done()
    assert panel.session.conversation.messages[-1]["content"] == whole
    assert panel.session.answer.stopped == "length"  # the tiny model never ends
    person.click("proceed")
    person.done()
    assert panel.session.conversation.messages[-1]["content"].startswith(whole)


def test_stop_right_after_ask_stops_it(person, chat, monkeypatch):
    """Between the click and the thread's first step, nothing is under way yet."""
    person.load(chat)
    held = []
    monkeypatch.setattr(background, "run", held.append)
    person.ask("Hello", most=100)
    person.click("stop")
    held.pop()()
    person.done()
    assert "stopped" in person.said
    person.ask("Hello", most=3)
    held.pop()()
    assert len(person.done().panel.session.answer.token_ids) == 3


def test_a_full_context_is_named(person, chat):
    panel = person.load(chat).panel
    panel.session.model.config.max_position_embeddings = 40
    person.ask("Hello", most=100).done()
    assert panel.session.conversation.last.full
    assert "the model&#x27;s context is full" in person.conversation


def test_a_dtype_by_its_short_name():
    panel = Panel(Session(SilentRenderer), DEFAULTS | {"dtype": "bf16"})
    assert panel.chooser.dtype.value == "bfloat16"
    panel.close()


def test_while_it_works_only_stop_can_be_pressed(person, chat):
    panel = person.load(chat).panel
    seen = {}

    def look(_text):
        names = ("load", "unload", "change", "ask", "proceed", "forget", "text", "stop")
        seen.update({name: getattr(panel, f"{name}_button").disabled for name in names})

    panel.chat.write = look
    person.ask("Hello").done()
    assert seen == dict.fromkeys(("load", "unload", "change", "ask", "proceed", "forget", "text"), True) | {"stop": False}
    assert panel.stop_button.disabled


def test_what_is_wrong_with_a_prompt_loses_nothing(person, chat):
    panel = person.load(chat).panel
    person.ask("   ").done()
    assert "There is no prompt." in person.said
    assert panel.chat.prompt.value == "   "
    panel.chat.seed.value = "<seven>"
    person.ask("Hello").done()
    assert "The seed is &#x27;&lt;seven&gt;&#x27;." in person.said
    assert panel.chat.prompt.value == "Hello"
    panel.chat.seed.value = ""
    person.ask("Hello " * 5000).done()
    assert "context of 4096" in person.said
    assert panel.chat.prompt.value.startswith("Hello Hello")
    assert not panel.session.conversation.messages
    person.ask("Hello").done()
    assert not person.said
    assert len(panel.session.conversation.messages) == 2


def test_a_load_that_fails_says_why_beside_the_control(person, chat, tmp_path):
    panel = person.load(tmp_path).panel
    assert "✗" in panel.chooser._problems["model"].value
    assert not panel.session.loaded
    panel.chooser.memory.value = "lots"
    person.load(chat)
    assert "is not a size" in panel.chooser._problems["memory"].value
    panel.chooser.memory.value = "auto"
    person.load(chat)
    assert panel.session.loaded


def test_a_bug_keeps_its_traceback(person, chat, monkeypatch):
    person.load(chat)
    monkeypatch.setattr(person.panel.session, "chat", lambda *_, **__: 1 / 0)
    person.ask("Hello").done()
    assert "ZeroDivisionError" in person.said
    assert "Traceback" in person.said


def test_two_panels_of_one_session(person, chat):
    other = Panel(person.panel.session, DEFAULTS)
    person.load(chat)
    other.refresh()
    assert "layers, all resident" in other._head.value
    Person(other).ask("Hello").done()
    person.panel.refresh()
    assert "Hello" in person.conversation
    other.close()


def test_going_on_that_is_stopped_is_left_too(person, chat, published):
    panel = person.load(chat).panel
    person.ask("Hello", most=30).done()
    original = panel.chat.write

    def stop_soon(text):
        original(text)
        panel.session.stop()

    panel.chat.write = stop_soon
    person.click("proceed")
    person.done()
    assert len(published[-1].token_ids) > 30
    assert published == [published[0], panel.session.answer]
    assert f"{len(published[-1].token_ids)} tokens in" in person.conversation


def test_only_the_conversation_can_be_gone_on_with(person, chat):
    """Not a cell's text, though it is the same."""
    session = person.load(chat).panel.session
    person.ask("Hello").done()
    assert not person.panel.proceed_button.disabled
    session.ask("Hello", max_new_tokens=12, write=lambda _: None)
    assert session.answer.text == session.conversation.messages[-1]["content"]
    assert session.can_proceed
    assert person.panel.proceed_button.disabled


def test_a_prompt_that_was_said_before_is_not_lost_either(person, chat):
    panel = person.load(chat).panel
    person.ask("Hello").done()
    panel.chat.system.value = "long " * 2000
    person.ask("Hello").done()
    assert "context of 4096" in person.said
    assert panel.chat.prompt.value == "Hello"


def test_notes_are_of_one_conversation(person, chat, tmp_path):
    other = Person(Panel(person.panel.session, DEFAULTS))
    person.load(chat)
    other.ask("Hello").done()
    assert "12 tokens in" in other.conversation
    other.click("change")
    other.load(tmp_path)  # which fails: model and conversation stay
    assert "12 tokens in" in other.conversation
    person.click("forget")
    person.ask("Hello again", most=3).done()
    wait_for(lambda: "Hello again" in other.conversation)
    assert "tokens in" not in other.conversation
    other.panel.close()


def test_a_click_while_a_cell_runs_is_answered(person, chat):
    """It may overtake the word that buttons are disabled."""
    panel = person.load(chat).panel
    begun, go = threading.Event(), threading.Event()

    def write(_text):
        begun.set()
        assert go.wait(60)

    cell = threading.Thread(target=panel.session.ask, args=("Hello",), kwargs={"max_new_tokens": 3, "write": write})
    cell.start()
    assert begun.wait(60)
    for click in (panel._unload, panel._forget):
        click()
        assert "The model is busy" in person.said
    go.set()
    cell.join()
    assert panel.session.loaded
    assert not panel.unload_button.disabled


def test_the_model_may_go_while_it_is_looked_at(person, chat, monkeypatch):
    panel = person.load(chat).panel
    with monkeypatch.context() as patch:
        patch.setattr(Session, "loaded", True)  # a moment ago
        panel.session.unload()
    assert "no model is loaded" in panel._head.value


def test_of_two_threads_the_last_look_is_shown(person, chat, monkeypatch):
    panel = person.load(chat).panel
    looked, go = threading.Event(), threading.Event()
    one_line = report.one_line

    def slow(model):
        if threading.current_thread() is first:
            looked.set()
            assert go.wait(60)
        return one_line(model)

    monkeypatch.setattr(report, "one_line", slow)
    panel._working = True
    first = threading.Thread(target=panel.refresh)
    first.start()
    assert looked.wait(60)
    panel._working = False
    second = threading.Thread(target=panel.refresh)
    second.start()
    second.join(0.2)
    go.set()
    first.join()
    second.join()
    assert not panel.ask_button.disabled


def test_a_panel_that_is_closed_is_not_kept(person):
    panel = Panel(person.panel.session, DEFAULTS)
    gone = weakref.ref(panel)
    panel.close()
    del panel
    wait_for(lambda: gc.collect() is not None and gone() is None)


def test_closing_stops_the_run(person, chat):
    panel = person.load(chat).panel
    panel.chat.write = lambda _text: panel.close()
    person.ask("Hello", most=2000).done()
    assert len(panel.session.answer.token_ids) < 100


def test_it_is_closed_with_the_extension(shell):
    panel = Panel(shell.magics.session, DEFAULTS)
    session = shell.magics.session
    shell.run("%reload_ext airllm_nb")
    assert shell.magics.session is not session
    assert not list(session.watchers)
    assert panel.load_button.comm is None


def test_its_text_is_short_and_constant(person):
    assert repr(person.panel) == "<airllm_nb: the panel>"


def test_what_is_wrong_with_a_prompt_is_said_beside_it_and_not_at_another_model(person, chat):
    panel = person.load(chat).panel
    person.click("change")
    person.ask("  ").done()
    assert "There is no prompt." in panel.chat._said.value
    assert not panel.chooser._problems["model"].value


def test_a_seed_of_thousands_of_digits_is_refused(person, chat):
    panel = person.load(chat).panel
    panel.chat.seed.value = "9" * 5000
    panel.chat.prompt.value = "Hello"
    panel._ask()  # what is raised in a click is lost
    assert "Use a whole number from 0 up" in person.said


def test_an_empty_system_prompt_takes_the_one_there_is_away(person, chat):
    panel = person.load(chat).panel
    panel.chat.system.value = "Be brief."
    person.ask("Hello").done()
    assert panel.session.conversation.messages[0]["role"] == "system"
    panel.chat.system.value = ""
    person.ask("And now?").done()
    assert [message["role"] for message in panel.session.conversation.messages] == ["user", "assistant"] * 2


def stop_when(panel, at, monkeypatch):
    """Press Stop in each run as soon as `at` holds of its picture."""
    original = strip.render

    def render(state):
        if at(state):
            panel.session.stop()
        return original(state)

    monkeypatch.setattr(strip, "render", render)


def test_what_was_stopped_before_its_first_word_is_drawn_once_when_it_goes_on(person, chat, monkeypatch):
    panel = person.load(chat).panel
    stop_when(panel, lambda state: state.kind == "prefill", monkeypatch)
    person.ask("Hello").done()
    monkeypatch.undo()
    seen = []
    panel.chat.write = lambda _text: seen.append(person.conversation)
    person.click("proceed")
    person.done()
    assert seen
    assert "airllm-assistant" not in seen[0]  # it grows below
    assert "airllm-assistant" in person.conversation


def test_a_line_about_an_answer_is_not_left_below_another(person, chat):
    panel = person.load(chat).panel
    person.ask("Hello", most=5).done()
    assert "5 tokens in" in person.conversation
    panel.session.proceed(write=lambda _text: None)  # as a cell does
    assert "tokens in" not in person.conversation
    panel.session.forget()
    panel.session.chat("Hello", max_new_tokens=5, write=lambda _text: None)
    assert "Hello" in person.conversation
    assert "tokens in" not in person.conversation


def test_an_unloaded_model_leaves_no_picture_in_any_panel(person, chat):
    panel = person.load(chat).panel
    person.ask("Hello").done()
    assert panel._picture.value
    panel.session.unload()
    assert not panel._picture.value


def test_the_plain_text_follows_the_conversation(person, chat):
    panel = person.load(chat).panel
    person.ask("Hello", most=3).done()
    person.click("text")
    person.ask("And now?", most=3).done()
    assert "And now?" in panel._plain.value


def test_a_click_that_comes_while_a_cell_runs_is_answered(person, chat):
    panel = person.load(chat).panel
    said, drawn = [], []

    def click(_text):
        if said:
            return
        for button in ("unload", "forget"):  # not disabled in the page yet
            thread = threading.Thread(target=getattr(panel, f"_{button}"))
            thread.start()
            thread.join()
            said.append(person.said)
        panel.chat.prompt.value = "Hi"
        panel._ask()
        wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "airllm_nb-panel"])
        said.append(panel.chat._said.value)
        drawn.append(person.conversation + panel.chat._growing.value)

    panel.session.ask("Hello", max_new_tokens=5, write=click)
    assert len(said) == 3
    assert all("The model is busy with another run." in text for text in said)
    assert drawn == [""]
    assert panel.chat.prompt.value == "Hi"
    panel._proceed()  # and one that comes too late
    person.done()
    assert "bug" not in person.said


def test_only_the_last_answer_goes_on(person, chat):
    person.load(chat)
    person.ask("Hello", most=3).done()
    assert person.conversation.count("Continue goes on") == 1
    person.ask("And now?", most=3).done()
    assert person.conversation.count("longest answer reached") == 2
    assert person.conversation.count("Continue goes on") == 1


def test_a_new_model_can_be_looked_for_without_losing_the_old_one(person, chat):
    panel = person.load(chat).panel
    person.ask("Hello", most=3).done()
    person.click("change")
    assert panel.chooser.layout.display is None
    assert panel.change_button.description == "Keep this model"
    person.click("change")
    assert panel.chooser.layout.display == "none"
    assert "Hello" in person.conversation


def test_what_one_panel_said_goes_with_the_conversation_that_another_ends(person, chat, monkeypatch):
    panel = person.load(chat).panel
    other = Panel(panel.session, DEFAULTS)
    stop_when(panel, lambda state: state.kind == "prefill", monkeypatch)
    person.ask("Hello").done()
    assert "stopped before the first token" in person.said
    other.unload_button.click()
    assert not person.said
    other.close()


def test_a_closed_panel_leaves_no_widget():
    known = ipywidgets.widgets.widget  # before version 8 the class has them
    widgets = known._instances if hasattr(known, "_instances") else ipywidgets.Widget.widgets
    before = set(widgets)
    panel = Panel(Session(SilentRenderer), DEFAULTS)
    assert len(widgets) > len(before) + 50
    panel.close()
    assert set(widgets) <= before


def test_what_is_folded_away_is_opened_by_a_button(person):
    for fold in (person.panel.chat.settings, person.panel.chat.times):
        assert fold.children[1].layout.display == "none"
        fold.heading.value = True
        assert fold.children[1].layout.display is None
