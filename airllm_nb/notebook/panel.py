"""The panel that ``%airllm`` opens: choose a model, see what that would mean, load it, watch, ask, stop."""

from __future__ import annotations

import threading
import traceback
import uuid
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets

from airllm_nb.errors import AirLLMError
from airllm_nb.notebook import background, report, strip
from airllm_nb.notebook.chat_box import ChatBox
from airllm_nb.notebook.model_chooser import ModelChooser, bug, problem
from airllm_nb.notebook.panel_style import STYLE
from airllm_nb.notebook.result import StaticResult
from airllm_nb.notebook.stop_button import keep_subshell_route
from airllm_nb.notebook.summary import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airllm_nb.notebook.run_state import RunState
    from airllm_nb.notebook.session import Session
    from airllm_nb.notebook.summary import Answer


class Panel(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets publishes no types
    """Everything that a person needs to run a model, without code.

    What a click starts works on a thread of its own, so that the kernel stays free and Stop can be pressed.

    Parameters
    ----------
    session : Session
        What it works on: the same as ``%airllm`` and ``%%airllm``.
    defaults : dict of str to str
        ``device``, ``dtype`` and ``memory`` to begin with.
    publish : callable(answer), optional
        Told of every answer on the thread that computed it, to leave something that stays when the widgets are gone.

    Attributes
    ----------
    session : Session
        For code in the next cell: ``panel.session.model`` is the loaded model, ``panel.session.answer`` the last answer.
    mark : str
        A class that is not seen as long as the panel is: of what it leaves for the time when the widgets are gone.
    """

    def __init__(
        self, session: Session, defaults: dict[str, str], publish: Callable[[Answer], object] = lambda _answer: None
    ) -> None:
        self.session = session
        self.mark = f"airllm-of-{uuid.uuid4().hex[:8]}"
        self._publish = publish
        self._working = False
        self._stopping = False  # the work that is under way
        self._was_loaded = False
        self._refreshing = threading.Lock()
        self._noted = session.conversation
        self._notes: dict[tuple[int, str], str] = {}  # of that conversation's messages, by their number and text
        self.chooser = ModelChooser(defaults)
        self.load_button = _button("Load", "download", self._load, primary=True)
        self.unload_button = _button("Unload", "eject", self._unload, "Frees its memory, and forgets the conversation")
        self.change_button = _button("Another model", "exchange", self._change)
        self.ask_button = _button("Ask", "paper-plane", self._ask, primary=True)
        self.stop_button = _button("Stop", "stop", self._stop)
        self.stop_load_button = _button("Stop", "stop", self._stop)
        self.proceed_button = _button("Continue", "play", self._proceed, "Goes on with the last answer, as it was begun")
        self.forget_button = _button("New conversation", "eraser", self._forget)
        self.text_button = _button("As text", "copy", self._as_text, "Shows the conversation as plain text, to be copied")
        self._plain = ipywidgets.Textarea(rows=6, layout={"width": "auto", "display": "none"})
        self._head = ipywidgets.HTML()
        self._picture = ipywidgets.HTML()
        self._said = ipywidgets.HTML()
        loading = _row(self.load_button, self.stop_load_button, self.unload_button, self.change_button)
        asking = _row(self.ask_button, self.stop_button, self.proceed_button, self.forget_button, self.text_button)
        self.chat = ChatBox(ipywidgets.VBox([asking, self._plain]))
        super().__init__([
            ipywidgets.HTML(strip.STYLE + STYLE + f"<style>.{self.mark} {{ display: none; }}</style>"),
            self._head, self.chooser, loading, self._said, self._picture, self.chat,
        ])  # fmt: skip
        self.add_class("airllm-panel")
        for widget in _within(self):  # one route for all: a click must not overtake what was typed, nor wait for a cell
            keep_subshell_route(widget.comm)
        self.session.watchers.add(self)
        self.refresh()

    def __repr__(self) -> str:  # short and always the same, for viewers without widgets and for nbval
        return "<airllm_nb: the panel>"

    def refresh(self) -> None:
        """Show the session as it is now: a cell, or another panel, may have changed it."""
        with self._refreshing:  # or of two threads the one that looked first could be the last to draw
            self._refresh()

    def close(self) -> None:
        """Stop what is under way, and take the panel away."""
        if self._working:
            self.session.stop()
        self.session.watchers.discard(self)
        for widget in [*_within(self)][1:]:  # ipywidgets keeps every open one, and a button keeps the panel
            for part in (widget.layout, getattr(widget, "style", None), widget):
                if isinstance(part, ipywidgets.Widget):
                    part.close()
        self.layout.close()
        super().close()

    def _refresh(self) -> None:
        if self._stopping and self._working and self.session.busy:
            self.session.stop()  # again: what has just begun takes a stop for one of what was before
        working = self._working or self.session.busy
        try:
            about, loaded = report.one_line(self.session.model), True
        except AirLLMError:  # there is none, or it has just been unloaded
            about, loaded = "no model is loaded", False
        if loaded != self._was_loaded and not working:
            self._was_loaded = loaded
            _show(self.chooser, yes=not loaded)
            if not loaded:
                self._picture.value = ""
        self._head.value = f'<div class="airllm-head"><b>airllm_nb</b><span>{escape(about)}</span></div>'
        _show(self.load_button, yes=_shown(self.chooser))
        _show(self.unload_button, yes=loaded)
        _show(self.change_button, yes=loaded)
        self.change_button.description = "Keep this model" if _shown(self.chooser) else "Another model"
        _show(self.chat, yes=loaded)
        _show(self.stop_load_button, yes=_shown(self.chooser))
        conversation = self.session.conversation
        if conversation is not self._noted:
            self._noted, self._notes = conversation, {}
            self.chat.say("")
            self.chat.look_back()
        messages = conversation.messages if loaded else []
        if not self._working:  # before anything can be pressed again
            self.chat.show(messages, self._notes, "; Continue goes on" if self.session.can_proceed_in_conversation else "")
            self._write_plain()
        self.load_button.disabled = self.unload_button.disabled = self.change_button.disabled = working
        self.ask_button.disabled = working
        self.stop_button.disabled = self.stop_load_button.disabled = not working
        self.proceed_button.disabled = working or not self.session.can_proceed_in_conversation
        self.forget_button.disabled = self.text_button.disabled = working or not messages
        self.chooser.enable(yes=not working)
        self.chat.enable(yes=not working)

    # What the buttons do

    def _load(self) -> None:
        def work() -> None:
            self.chooser.all_is_well()
            self.session.load(**self.chooser.options, renderer=_Drawing(self._picture))
            _show(self.chooser, yes=False)
            self._was_loaded = True

        self._start(work, loads=True)

    def _unload(self) -> None:
        self._start(self.session.unload, quick=True)

    def _stop(self) -> None:
        self._stopping = self._working
        self.session.stop()

    def _change(self) -> None:
        _show(self.chooser, yes=not _shown(self.chooser))
        self.refresh()

    def _ask(self) -> None:
        prompt = self.chat.prompt.value
        try:
            sampling = self.chat.sampling
        except AirLLMError as error:
            self.chat.say(problem(error))
            return

        def work() -> None:
            said = self.session.conversation.messages
            before = len(said)
            self.chat.show([*said, {"role": "user", "content": prompt}], self._notes)
            self.chat.begin()
            self.chat.prompt.value = ""
            try:
                self._answer(lambda: self.session.chat(prompt, **self._shown_here(), **sampling))
            finally:
                if len(said) == before and not self.chat.prompt.value:
                    self.chat.prompt.value = prompt  # it was refused: nothing that was written is lost

        self._start(work)

    def _proceed(self) -> None:
        def work() -> None:
            messages = self.session.conversation.messages
            self.chat.show(messages[:-1], self._notes)
            self.chat.begin("".join(message["content"] for message in messages[-1:]))
            self._answer(lambda: self.session.proceed(**self._shown_here()))

        self._start(work)

    def _shown_here(self) -> dict[str, Any]:
        return {"renderer": _Drawing(self._picture), "write": self.chat.write}

    def _answer(self, run: Callable[[], Answer]) -> None:
        """Have an answer made, and keep what there is of it when it is stopped."""
        try:
            self._keep(run())
        except Interrupted as stop:
            if stop.answer is not None:
                self._keep(stop.answer)
            raise

    def _forget(self) -> None:
        self._plain.layout.display = "none"
        self._start(self.session.forget, quick=True)

    def _as_text(self) -> None:
        """Show the conversation to be selected and copied: no core widget reaches the clipboard."""
        _show(self._plain, yes=not _shown(self._plain))
        self._write_plain()

    def _write_plain(self) -> None:
        if _shown(self._plain):
            messages = self.session.conversation.messages
            self._plain.value = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)

    def _keep(self, answer: Answer) -> None:
        conversation = self.session.conversation
        about = f"{len(answer.token_ids)} tokens in {answer.seconds:.1f} s"
        if answer.tokens_per_second:
            about += f" · {answer.tokens_per_second:.1f} tok/s"
        if conversation.reused:
            about += f" · {conversation.reused} of {answer.prompt_tokens} prompt tokens were in the KV cache"
        if conversation.note:
            about += f" · {conversation.note}"
        if answer.stopped == "interrupted":
            about += " · stopped"
        if answer.stopped == "length":
            full = conversation.last is not None and conversation.last.full
            about += " · the model's context is full" if full else " · longest answer reached"
        self._notes[len(conversation.messages) - 1, answer.text] = about
        self.chat.look_back(StaticResult(answer).html)
        self._publish(answer)

    def _start(self, work: Callable[[], object], *, quick: bool = False, loads: bool = False) -> None:
        """Do what a click asks for, and show what comes of it where the click was; what is `quick` needs no thread."""
        if self._working:
            return
        self._working, self._stopping = True, False
        self._said.value = ""
        self.chat.say("")
        self.refresh()
        if quick:
            self._do(work, loads=loads)
        else:
            background.run(lambda: self._do(work, loads=loads))

    def _do(self, work: Callable[[], object], *, loads: bool) -> None:
        try:
            work()
        except Interrupted as stop:
            if stop.answer is None or not stop.answer.token_ids:  # else it stands below the text
                self._say(f'<div class="airllm-why" role="status">{escape(str(stop).partition(",")[0])}</div>', loads=loads)
        except AirLLMError as error:
            if loads:
                self.chooser.explain(error)
            else:
                self._say(problem(error), loads=False)
        except BaseException:  # noqa: BLE001  # a bug, which keeps its traceback: a thread has no other place for it
            self._say(bug(traceback.format_exc()), loads=loads)
        finally:
            self._working = self._stopping = False
            self.refresh()

    def _say(self, html: str, *, loads: bool) -> None:
        if loads or not self.session.loaded:
            self._said.value = html
        else:
            self.chat.say(html)


class _Drawing:
    """Draws one load or run into a widget of the panel."""

    def __init__(self, picture: ipywidgets.HTML) -> None:
        self._picture = picture

    def draw(self, state: RunState) -> None:
        """Replace the picture."""
        self._picture.value = strip.render(state)

    def before_text(self) -> None:
        """Do nothing: text has its own place."""

    def close(self) -> None:
        """Take the picture away."""
        self._picture.value = ""


def _button(text: str, icon: str, click: Callable[[], object], tooltip: str = "", *, primary: bool = False) -> ipywidgets.Button:
    button = ipywidgets.Button(
        description=text, icon=icon, tooltip=tooltip or text, button_style="primary" if primary else "", layout={"width": "auto"}
    )
    button.on_click(lambda _: click())
    return button


def _row(*children: Any) -> ipywidgets.HBox:
    row = ipywidgets.HBox(children)
    row.add_class("airllm-row")
    return row


def _show(widget: ipywidgets.DOMWidget, *, yes: bool) -> None:
    widget.layout.display = None if yes else "none"


def _shown(widget: ipywidgets.DOMWidget) -> bool:
    return bool(widget.layout.display != "none")


def _within(widget: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    """Yield a widget and all within it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from _within(child)
