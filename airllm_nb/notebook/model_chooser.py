"""Which model to load and how: the controls, and below them what that would mean, live as they move."""

from __future__ import annotations

import contextlib
import traceback
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets

from airllm_nb import demo, plan
from airllm_nb.compat.config import quiet
from airllm_nb.engine.devices import DTYPES as NAMED
from airllm_nb.engine.memory import format_size, parse_size
from airllm_nb.errors import AirLLMError, DeviceError, MemoryBudgetError
from airllm_nb.notebook import background, report, strip
from airllm_nb.notebook.background import Latest
from airllm_nb.notebook.complete import models
from airllm_nb.notebook.device_selector import DeviceSelector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airllm_nb.engine.plan import Plan
    from airllm_nb.engine.prediction import Prediction

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("no", "int8", "int4", "int4-32")  # the last is what a GGUF file's plan advises
STEPS = 200
LABEL = "76px"
EXPECTED = "Type a name and press Enter: a model of the hub such as org/name, a local folder, or demo."


class ModelChooser(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets publishes no types
    """Model, device, dtype and memory, each with room beside it for what is wrong with it, and the plan.

    Parameters
    ----------
    defaults : dict of str to str
        ``device``, ``dtype`` and ``memory`` to begin with.
    """

    def __init__(self, defaults: dict[str, str]) -> None:
        style = {"description_width": LABEL}
        self.model = ipywidgets.Combobox(
            description="Model", value="demo", placeholder="org/name, a folder, a .gguf file, or demo",
            continuous_update=False, style=style, layout={"width": "auto", "max_width": "560px"},
        )  # fmt: skip
        self.device = DeviceSelector()
        if defaults["device"] != "auto":
            with contextlib.suppress(DeviceError):  # of %config: told by %airllm load, where it is used
                self.device.value = defaults["device"]
        self.dtype = ipywidgets.ToggleButtons(options=DTYPES, value=_named(defaults["dtype"]))
        self.quantize = ipywidgets.ToggleButtons(
            options=QUANTIZE,
            tooltips=["The weights as they are published", "8 bits a weight: half the memory, nearly the same text",
                      "4 bits a weight: a quarter of the memory and faster, but a worse model",
                      "5 bits a weight: a little better, and as it was where a file has 4 bits in such groups already"],
        )  # fmt: skip
        for buttons in (self.dtype, self.quantize):
            buttons.style.button_width = "auto"
        self.memory = ipywidgets.Text(
            description="Memory", value=defaults["memory"], placeholder="auto, or 4GB", continuous_update=False,
            style=style, layout={"width": "190px"},
        )  # fmt: skip
        self.slider = ipywidgets.IntSlider(
            min=0, max=STEPS, readout=False, disabled=True, layout={"width": "260px"}, tooltip="From the least to everything"
        )
        self._range = (0, 0)
        self._following = False
        self.plan = ipywidgets.HTML()
        self._problems = {name: ipywidgets.HTML() for name in ("model", "device", "memory")}
        device, dtype = _labelled("Device", self.device), _labelled("Dtype", self.dtype)
        quantize = _labelled("Quantize", self.quantize)
        memory = ipywidgets.HBox([self.memory, self.slider])
        memory.add_class("airllm-row")
        problems = self._problems
        super().__init__([
            self.model, problems["model"], device, problems["device"], dtype, quantize, memory, problems["memory"], self.plan,
        ])  # fmt: skip
        self._planner = Latest(self._show_plan)
        for control in (self.model, self.device, self.dtype, self.quantize, self.memory):
            control.observe(self._changed, "value")
        self.slider.observe(self._slid, "value")
        background.run(self._offer)
        self._changed()

    def __repr__(self) -> str:
        return "<airllm_nb: which model>"

    @property
    def options(self) -> dict[str, Any]:
        """What is chosen, as `Session.load` takes it."""
        return {
            "model": self.model.value.strip(),
            "device": self.device.value,
            "dtype": self.dtype.value,
            "memory": self.memory.value.strip() or "auto",
            "quantize": None if self.quantize.value == "no" else self.quantize.value,
        }

    def explain(self, error: AirLLMError) -> None:
        """Say what is wrong, beside the control that caused it."""
        kinds = {MemoryBudgetError: "memory", DeviceError: "device"}
        self._problems[kinds.get(type(error), "model")].value = problem(error)

    def all_is_well(self) -> None:
        """Take back what was said to be wrong."""
        for place in self._problems.values():
            place.value = ""

    def enable(self, *, yes: bool) -> None:
        """Let the controls be used, or not."""
        self.device.disabled = not yes
        for control in (self.model, self.dtype, self.quantize, self.memory):
            control.disabled = not yes
        self.slider.disabled = not yes or self._range[0] >= self._range[1]

    def close(self) -> None:
        """Take the controls away, and plan no more."""
        self._planner.close()
        super().close()

    def _offer(self) -> None:
        """Offer what is here; finding it may take a while on a network's disk."""
        self.model.options = models()

    def _changed(self, _change: Any = None) -> None:
        if not self.plan.value:  # else the old plan stays until the new one is there
            self.plan.value = '<div class="airllm-why">reading the model\'s headers …</div>'
        self._planner.ask()

    def _slid(self, change: Any) -> None:
        if not self._following:
            self.memory.value = self._size_at(change["new"])

    def _size_at(self, step: int) -> str:
        least, most = self._range
        return f"{-(-(least + (most - least) * step // STEPS) // 10**6)}MB"

    def _show_plan(self, is_latest: Callable[[], bool]) -> None:
        """Draw what loading would mean; the speed, which has to be measured first, a moment later."""
        options = self.options
        if not options["model"]:
            self.plan.value = f'<div class="airllm-why">{EXPECTED}</div>'
            return
        if options["model"] == "demo" and demo.here() is None:
            self.plan.value = (
                '<div class="airllm-why">The demo model is fetched once, when it is loaded: 93 MB, or 270 MB from the hub.</div>'
            )
            return
        try:
            with quiet():
                decided = plan(**options)
                if not is_latest():
                    return
                self.all_is_well()
                self._fit_slider(decided)
                self.plan.value = describe(decided, None)
                prediction = decided.predict()
        except AirLLMError as error:
            if is_latest():
                self.all_is_well()
                self.explain(error)
                self.plan.value = ""
            return
        except Exception:  # noqa: BLE001  # a bug, which keeps its traceback: a thread has no other place for it
            if is_latest():
                self.plan.value = bug(traceback.format_exc())
            return
        if is_latest():
            self.plan.value = describe(decided, prediction)

    def _fit_slider(self, decided: Plan) -> None:
        """Let the slider go from the least to everything, and stand where the budget is."""
        least, most = self._range = (decided.least, decided.total_nbytes)
        budget = decided.used_nbytes
        with contextlib.suppress(MemoryBudgetError):
            budget = parse_size(self.memory.value)
        with self._follow():
            self.slider.disabled = self.model.disabled or least >= most
            if self.memory.value != self._size_at(self.slider.value):  # or it would jump back while it is drawn
                self.slider.value = min(max(STEPS * (budget - least) // max(most - least, 1), 0), STEPS)

    @contextlib.contextmanager
    def _follow(self) -> Iterator[None]:
        self._following = True
        try:
            yield
        finally:
            self._following = False


def _named(dtype: str) -> str:
    """Return the button for a dtype as ``%config`` may name it; what is wrong there is told by ``%airllm load``."""
    return str(NAMED[dtype]).removeprefix("torch.") if dtype in NAMED else "auto"


def _labelled(text: str, control: ipywidgets.DOMWidget) -> ipywidgets.HBox:
    """Put a label before what has none of its own, as wide as those of the others."""
    row = ipywidgets.HBox([ipywidgets.HTML(f'<div class="airllm-label" style="width:{LABEL}">{text}</div>'), control])
    row.add_class("airllm-row")
    return row


def describe(decided: Plan, prediction: Prediction | None) -> str:
    """Draw a plan: its layers, and in words what it takes."""
    read = f"{format_size(decided.streamed_nbytes)} read from disk" if decided.streamed_nbytes else "nothing read from disk"
    used, budget, least = map(format_size, (decided.used_nbytes, decided.budget, decided.least))
    dtype = str(decided.dtype).removeprefix("torch.")
    rows = {
        "layers": report.layers(decided),
        "memory": f"{used} of {budget} ({decided.reasons[2]}); at least {least}",
        "computes in": f"{dtype} ({decided.reasons[1]})",
        "quantized": decided.quantized,
        "hint": decided.hint,
        "per token": read if decided.experts is None else f"{read}, and the experts that are hit",
        "speed": str(prediction) if prediction else "…" if decided.device.type == "cpu" else "not predicted for this device",
    }
    lines = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows.items() if text)
    return f'<div class="airllm">{strip.render_layers(decided.layers)}</div><dl class="airllm-plan">{lines}</dl>'


def problem(error: AirLLMError) -> str:
    """Show a cause and its remedy."""
    return f'<div class="airllm-problem" role="alert">✗ {escape(error.cause)}<br>→ {escape(error.remedy)}</div>'


def bug(trace: str) -> str:
    """Show the traceback of what nobody expected."""
    return (
        '<div class="airllm-problem" role="alert">✗ This is a bug in airllm_nb; please report it with this text:'
        f"<pre>\n{escape(trace)}</pre></div>"
    )
