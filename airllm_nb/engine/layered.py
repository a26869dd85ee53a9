"""A transformers model made aware that its weights come and go."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch

from airllm_nb.engine.runtime import Runtime
from airllm_nb.errors import AirLLMError, DeviceError


def make_layered(model: Any, runtime: Runtime, device: torch.device, dtype: torch.dtype) -> Any:
    """Give a transformers model passes that the runtime brackets, and the device and dtype that it really has.

    The class is replaced by a subclass of the same name, so that whatever transformers calls (`generate`, a pipeline, a
    speculative decoder) goes through it. ``device`` must not be taken from the parameters, which may be on meta.
    """
    base = type(model)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        tokens = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() > 1 else 0
        return runtime.run(lambda: base.forward(self, *args, **kwargs), tokens, kwargs.get("past_key_values"))

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved, number, *_ = torch._C._nn._parse_to(*args, **kwargs)  # as nn.Module.to reads its arguments  # noqa: SLF001  # as nn.Module.to reads its arguments
        if moved not in (None, device) or number not in (None, dtype):
            _refuse_move()
        return self

    for name, buffer in model.named_buffers():
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._buffers[attribute] = buffer.to(device)  # noqa: SLF001
    members = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "forward": forward, "to": stay, "_apply": lambda *_, **__: _refuse_move(),
        "save_pretrained": lambda *_, **__: _refuse_save(),
        "device": property(lambda _: device), "dtype": property(lambda _: dtype),
    }  # fmt: skip
    model.__class__ = type(base.__name__, (base,), members)
    model.hf_device_map = {"": device}  # transformers' mark of a model that is placed already
    return model


def _refuse_move() -> NoReturn:
    raise DeviceError(
        "A layered model stays on the device and in the dtype it was loaded with.", "Load it again with device= or dtype=."
    )


def _refuse_save() -> NoReturn:
    raise AirLLMError(
        "A layered model is not saved: its weights are the checkpoint's own.", "Copy the folder model.path instead."
    )
