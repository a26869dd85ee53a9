"""The magics: ``%airllm`` and ``%%airllm``. Parse the line, call the session, show what comes back."""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display as publish
from traitlets import Enum, TraitError, Unicode

from airllm_nb.compat import versions
from airllm_nb.errors import AirLLMError
from airllm_nb.notebook import options, sources
from airllm_nb.notebook.answers import MapInterrupted
from airllm_nb.notebook.children import run_printing
from airllm_nb.notebook.complete import complete
from airllm_nb.notebook.imports import import_engine
from airllm_nb.notebook.session import Session
from airllm_nb.notebook.summary import Answer, Interrupted

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from IPython.core.interactiveshell import InteractiveShell

    from airllm_nb.notebook.answers import Answers
    from airllm_nb.notebook.progress import Renderer

COMMANDS = ("%airllm", "%%airllm")


@magics_class
class AirLLMMagics(Magics):  # type: ignore[misc]  # IPython's types are not followed
    """Defaults for the %airllm magics, and the session that they work on."""

    device = Unicode("auto", help="Where to compute when --device is not given.").tag(config=True)
    dtype = Unicode("auto", help="What to compute in when --dtype is not given.").tag(config=True)
    memory = Unicode("auto", help="Budget for weights when --memory is not given.").tag(config=True)
    display = Enum(
        ("auto", "widget", "text", "silent"),
        "auto",
        help="How the layers at work are shown: auto is widget in a notebook, text in a terminal.",
    ).tag(config=True)

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.session = Session(self._new_renderer)
        self._output: tuple[Answer | None, str | None] = None, None  # the last cell's answer, and its -o

    @no_var_expand  # type: ignore[untyped-decorator]
    @line_magic("airllm")  # type: ignore[untyped-decorator]
    def line(self, line: str) -> Answers | None:
        """Show `options.HELP`: see below."""
        words = options.split(line, self.shell.user_ns)
        if not words:
            self._open()
            return None
        if words[0] in ("-h", "--help", "help"):
            print(options.HELP)
            return None
        verb, *rest = words
        if verb not in options.VERBS:
            near = difflib.get_close_matches(verb, options.VERBS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(options.VERBS)}, and %%airllm for a prompt."
            raise UsageError(f"%airllm: unknown verb {verb!r}; {hint}")
        parser = options.VERBS[verb]
        if "-h" in rest or "--help" in rest:
            print(parser.format_help())
            return None
        result: Answers | None = getattr(self, f"_{verb}")(parser.parse_args(rest))
        return result

    @no_var_expand  # type: ignore[untyped-decorator]
    @cell_magic("airllm")  # type: ignore[untyped-decorator]
    def cell(self, line: str, cell: str) -> None:
        """Show `options.HELP`: see below."""
        words = options.split(line, self.shell.user_ns)
        if "-h" in words or "--help" in words:
            print(options.CELL.format_help())
            return
        settings = vars(options.CELL.parse_args(words))
        output, lens = settings.pop("output"), settings.pop("lens")
        settings["stop"] = tuple(settings["stop"])
        before, self._output = self._output, (None, output)
        try:
            self._show(lambda: self.session.ask(cell.removesuffix("\n"), **settings), output)
        except AirLLMError:  # what can be gone on with is still the cell before
            self._output = before
            raise
        if lens:
            self._look()

    line.__doc__ = cell.__doc__ = options.HELP  # what %airllm? and %%airllm? show

    def _open(self) -> None:
        """Open the panel; where there are no widgets, say what there is instead."""
        if getattr(self.shell, "kernel", None) is None or versions.problem() is not None:
            print(options.SUMMARY + "\n\n%airllm --help shows all options and examples.")
            return
        import_engine()
        from airllm_nb.notebook.panel import Panel
        from airllm_nb.notebook.result import StaticResult

        def leave(answer: Answer) -> None:
            self.shell.user_ns["_airllm"] = answer
            said = self.session.conversation.messages
            place.update(StaticResult(answer, with_text=True, messages=said, mark=panel.mark))

        panel = Panel(self.session, {"device": self.device, "dtype": self.dtype, "memory": self.memory}, leave)
        publish(panel)
        place = publish({"text/plain": "", "text/html": ""}, raw=True, display_id=True)  # what stays when the widgets are gone
        answer, said = self.session.answer, self.session.conversation.messages
        if answer is not None and said and said[-1]["content"] == answer.text:  # perhaps of a panel whose page was reloaded
            leave(answer)
        self.shell.user_ns["_airllm_panel"] = panel
        if isinstance(self.shell.user_ns.get("panel", panel), Panel):  # never in place of something of the user's
            self.shell.user_ns["panel"] = panel

    def _load(self, arguments: argparse.Namespace) -> None:
        model = self.session.load(**self._load_options(arguments))
        from airllm_nb.notebook import report

        print(report.one_line(model))
        if model.plan.hint:
            print(model.plan.hint)

    def _continue(self, _: argparse.Namespace) -> None:
        answer, output = self._output
        self._show(self.session.proceed, output if answer is self.session.answer else None)

    def _map(self, arguments: argparse.Namespace) -> Answers:
        """Answer many prompts; the result is the value of the line, so that a notebook shows it."""
        settings = vars(arguments)
        output = settings.pop("output")
        settings["stop"] = tuple(settings["stop"])
        prompts = sources.prompts(settings.pop("prompts"), self.shell.user_ns)

        def keep(answers: Answers) -> Answers:
            self.shell.user_ns["_airllm"] = answers
            if output:
                self.shell.user_ns[output] = answers
            if self._display_kind() != "widget":
                print(answers)
            return answers

        try:
            return keep(self.session.map(prompts, **settings))
        except MapInterrupted as stop:
            keep(stop.answers)
            raise

    def _unload(self, _: argparse.Namespace) -> None:
        was_loaded = self.session.loaded
        self.session.unload()
        print("The model is unloaded." if was_loaded else "No model was loaded.")

    def _status(self, _: argparse.Namespace) -> None:
        if not self.session.loaded:
            print("No model is loaded. Load one with, for example: %airllm load demo")
            return
        from airllm_nb.notebook import report

        print(report.status(self.session.model))

    def _devices(self, _: argparse.Namespace) -> None:
        import_engine()
        from airllm_nb.engine.devices import devices
        from airllm_nb.notebook import report

        print(report.devices(devices()))

    def _plan(self, arguments: argparse.Namespace) -> None:
        import_engine()
        from airllm_nb import plan
        from airllm_nb.notebook import report

        print(report.plan(plan(**self._load_options(arguments))))

    def _doctor(self, arguments: argparse.Namespace) -> None:
        from airllm_nb.notebook import doctor

        print(doctor.text(**self._model_options(arguments)))

    def _bench(self, arguments: argparse.Namespace) -> None:
        options = vars(arguments)
        rows = options.pop("rows")
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        run_printing([sys.executable, "-m", "airllm_nb.bench", *words, "--", *rows])

    def _cache(self, arguments: argparse.Namespace) -> None:
        import_engine()
        from airllm_nb.engine.kept import clear, kept
        from airllm_nb.notebook import report

        entries = kept()
        if arguments.clear is None:
            print(report.kept(entries))
            return
        wanted = [entry for entry in entries if arguments.clear.lower() in entry.name.lower()]
        clear(wanted)
        print(report.cleared(wanted))

    def _load_options(self, arguments: argparse.Namespace) -> dict[str, Any]:
        return self._model_options(arguments) | {"kernels": arguments.kernels, "quantize": arguments.quantize}

    def _model_options(self, arguments: argparse.Namespace) -> dict[str, Any]:
        return {
            "model": arguments.model,
            "device": arguments.device or self.device,
            "dtype": arguments.dtype or self.dtype,
            "memory": arguments.memory or self.memory,
            "revision": arguments.revision,
            "trust_remote_code": arguments.trust_remote_code,
            "shared": arguments.shared,
        }

    def _show(self, run: Callable[[], Answer], output: str | None) -> None:
        """Run, and put the answer into `_airllm` and the variable `output`, also if it is stopped."""
        try:
            answer = run()
        except Interrupted as stop:
            if stop.answer is not None:
                self._leave(stop.answer, output)
            if output:
                stop.args = (str(stop).replace("_airllm holds", f"{output} holds"),)
            raise
        self._leave(answer, output)

    def _leave(self, answer: Answer, output: str | None) -> None:
        """Keep the answer in variables, and in a notebook what can be seen of it when the widget is gone."""
        self.shell.user_ns["_airllm"] = answer
        if output:
            self.shell.user_ns[output] = answer
        self._output = answer, output
        if self._display_kind() == "widget":
            from airllm_nb.notebook.result import StaticResult

            publish(StaticResult(answer))

    def _look(self) -> None:
        """Show what each layer would have said of the last text, and keep the trace in `_airllm_trace`."""
        self.shell.user_ns["_airllm_trace"] = trace = self.session.trace()
        if self._display_kind() == "widget":
            publish(trace.lens_picture())
        else:
            print(trace.lens_text())

    def _display_kind(self) -> str:
        if self.display != "auto":
            return self.display
        return "text" if getattr(self.shell, "kernel", None) is None else "widget"

    def _new_renderer(self) -> Renderer:
        from airllm_nb.notebook import renderers

        return renderers.KINDS[self._display_kind()](self.session.stop)


def load(shell: InteractiveShell) -> None:
    """Register the magics, their configuration and their completion in `shell`."""
    settings = shell.config.pop(
        AirLLMMagics.__name__, {}
    )  # an invalid one, which %config keeps as well, would stop the next line
    magics = AirLLMMagics(shell)
    for name, value in settings.items():
        _configure(magics, name, value)
    shell.register_magics(magics)
    for command in COMMANDS:
        shell.set_hook("complete_command", complete, str_key=command)
    if (problem := versions.problem()) is not None:
        print(f"{problem.cause} {problem.remedy}")


def _configure(magics: AirLLMMagics, name: str, value: Any) -> None:
    """Set a trait and the shell's configuration of it; an invalid value is dropped from both with a word."""
    try:
        setattr(magics, name, value)
    except TraitError as error:
        print(f"%config AirLLMMagics.{name} is dropped. {error}")
    else:
        magics.shell.config[AirLLMMagics.__name__][name] = value


def unload(shell: InteractiveShell) -> None:
    """Close the panels, stop what they run, free the model and undo `load`."""
    magics = shell.magics_manager.registry.get(AirLLMMagics.__name__)
    if magics is None:
        return
    magics.session.end()
    del shell.magics_manager.registry[AirLLMMagics.__name__]
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("airllm", None)
    shell.configurables.remove(magics)
    for command in COMMANDS:
        shell.strdispatchers["complete_command"].strs.pop(command, None)
