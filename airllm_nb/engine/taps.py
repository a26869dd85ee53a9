"""Taps: functions of the user's that see the hidden state between two decoder layers, and may put another in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from airllm_nb.compat import cache
from airllm_nb.errors import AirLLMError, UnsupportedError
from airllm_nb.events import LayerInfo

if TYPE_CHECKING:
    from airllm_nb.engine.model import LayeredModel
    from airllm_nb.engine.runtime import Runtime


@dataclass(frozen=True)
class LayerVisit(LayerInfo):
    """A layer that has just computed, as a function given to ``on_layer`` sees it.

    Attributes
    ----------
    index, name, nbytes, resident
        The layer, as in `airllm_nb.events.LayerInfo`.
    before : torch.Tensor
        The hidden state that entered it, of shape (batch, tokens, width), in the model's dtype and on its device. A function that
        returns it has skipped the layer.
    """

    before: torch.Tensor = field(repr=False, compare=False)
    _compute: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False, compare=False)  # None: it is over

    def again(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the layer once more, on `hidden`; a function that returns what comes out has repeated it.

        Works within the visit alone, and without a KV cache: the layer has one place in it, and that is taken.

        Parameters
        ----------
        hidden : torch.Tensor
            Of the shape, dtype and device of what entered the layer.

        Returns
        -------
        torch.Tensor
            Of the same shape, dtype and device.

        Raises
        ------
        AirLLMError
            If there is a KV cache, the visit is over, or `hidden` is no such tensor.
        """
        if self._compute is None:
            raise AirLLMError(
                f"{self.name} cannot compute again: the function that on_layer called with it has returned.",
                "Call layer.again(hidden) within the function.",
            )
        return self._compute(hidden)

    def _end(self) -> None:
        object.__setattr__(self, "_compute", None)  # or a visit that somebody keeps would keep the model


Function = Callable[[LayerVisit, torch.Tensor], "torch.Tensor | None"]
"""What ``on_layer`` takes."""


class Tap:
    """A function that is called with what leaves each layer, until it is removed; a context manager that removes it.

    Parameters
    ----------
    runtime : Runtime
        Whose layers.
    function : callable(layer, hidden)
        See `LayeredModel.on_layer`.

    Attributes
    ----------
    removed : bool
        Whether it is called no more.
    """

    def __init__(self, runtime: Runtime, function: Function) -> None:
        self.function = function
        self.removed = False
        self._runtime = runtime

    def add(self) -> None:
        """Have the function called from the next pass on."""
        with self._runtime.taps_lock:
            self._runtime.taps = (*self._runtime.taps, self)

    def remove(self) -> None:
        """Have it called no more, from now on. May be called again."""
        self.removed = True
        with self._runtime.taps_lock:
            self._runtime.taps = tuple(tap for tap in self._runtime.taps if tap is not self)

    def __enter__(self) -> Tap:  # noqa: PYI034  # typing.Self is new in Python 3.11
        if self.removed:
            raise AirLLMError("This function was removed from the layers.", "Give it to model.on_layer again.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def on_layer(model: LayeredModel, function: Function) -> Tap:
    """Have a function called with the hidden state that leaves each decoder layer, from the next pass on.

    Several are called in the order in which they came; each sees what the one before has put in its place. What one raises
    ends the pass as an interrupt does. Without any, nothing is paid.

    Parameters
    ----------
    function : callable(layer, hidden)
        `layer` is a `LayerVisit`: the layer's `index` and `name`, `layer.before`, what entered it, and
        ``layer.again(hidden)``, which computes it once more. `hidden` has the shape (batch, tokens, width), and while text
        is generated with a KV cache only the new tokens. It returns None, or what the next layer shall get instead; a change
        of `hidden` in place takes effect, too.

    Returns
    -------
    Tap
        Has ``remove()``, and is a context manager that does it.

    Raises
    ------
    AirLLMError
        If that is no function, or the model was closed. (In the pass: if it returns a tensor of another shape, dtype, device
        or layout.)
    """
    runtime = model._runtime  # noqa: SLF001
    runtime.require_open()
    if not callable(function):
        raise AirLLMError("on_layer was given what cannot be called.", "Give it a function of layer and hidden.")
    tap = Tap(runtime, function)
    tap.add()
    return tap


def visit(
    taps: Sequence[Tap], info: LayerInfo, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Any:
    """Call each tap's function with what leaves a layer, one after the other.

    Parameters
    ----------
    taps : sequence of Tap
        In the order in which they were added; each sees what the one before has made of the hidden state. Those that were
        removed meanwhile are left out.
    info : LayerInfo
        The layer.
    module : nn.Module
        Its module, with its weights in place.
    args, kwargs
        What it was called with.
    output : torch.Tensor, tuple or list
        What it has returned; of several, which transformers 4 has, the first one is the hidden state.

    Returns
    -------
    torch.Tensor, tuple, list or None
        What the layer shall have returned instead; None if nothing is replaced.

    Raises
    ------
    AirLLMError
        If a function returns anything but None or a tensor like the hidden state.
    UnsupportedError
        If the layer hands on something else than a hidden state.
    """
    before, hidden = _entered(args, kwargs), _hidden(output)
    if before is None or hidden is None:
        raise UnsupportedError(
            f"What passes through {info.name} of this model is not one hidden state.", "Run the model without on_layer and trace."
        )

    def compute(state: torch.Tensor) -> torch.Tensor:
        if cache.within(args[1:], kwargs):
            raise AirLLMError(
                f"{info.name} cannot compute again: it has one place in the KV cache, and that is taken.",
                "Run a pass that keeps none: model.trace(prompt), or use_cache=False for the model or generate.",
            )
        state = _like(before, state, f"layer.again of {info.name} was given")
        first, rest = ((state, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": state})
        try:
            result = _hidden(module.forward(*first, **rest))
        except UnsupportedError as error:  # its weights were away
            raise AirLLMError(
                f"{info.name} cannot compute again: {error.cause}", "Call layer.again before what else runs the model."
            ) from error
        assert result is not None
        return result

    entered = hidden
    layer = LayerVisit(info.index, info.name, info.nbytes, info.resident, before, compute)
    try:
        for tap in taps:
            made = None if tap.removed else tap.function(layer, hidden)
            if made is not None:
                hidden = _like(hidden, made, f"The function on {info.name} returned")
    finally:
        layer._end()  # noqa: SLF001
    if hidden is entered:
        return None
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _entered(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, torch.Tensor) else None


def _hidden(output: Any) -> torch.Tensor | None:
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    return value if isinstance(value, torch.Tensor) else None


def _like(hidden: torch.Tensor, made: Any, who: str) -> torch.Tensor:
    """Return what a function has made, if it can stand in place of the hidden state."""
    if isinstance(made, torch.Tensor) and _form(made) == _form(hidden):
        return made
    raise AirLLMError(
        f"{who} {_in_words(made)}, and the hidden state is {_in_words(hidden)}.",
        "It takes a tensor of the same shape, dtype and device; a function may also return None to leave it as it is.",
    )


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.layout


def _in_words(made: Any) -> str:
    if not isinstance(made, torch.Tensor):
        return type(made).__name__
    shape, dtype, device, layout = _form(made)
    return f"{shape} {dtype} {device}" + ("" if layout == torch.strided else f" {layout}")
