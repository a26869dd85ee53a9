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

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved, number, *_ = torch._C._nn._parse_to(*args, **kwargs)  # noqa: SLF001  # as nn.Module.to reads its arguments
        elsewhere = moved is not None and (moved.type != device.type or moved.index not in (None, device.index))
        if elsewhere or number not in (None, dtype):
            _refuse_move()
        return self

    for path, module in model.named_modules():
        for attribute, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                module._buffers[attribute] = buffer.to(device)  # noqa: SLF001
        if path == model.base_model_prefix:  # often called for its hidden states
            module.__class__ = _bracketed(type(module), runtime)
    members = {
        "to": stay,
        "cpu": lambda self: stay(self, "cpu"),
        "cuda": lambda self, index=None: stay(self, torch.device("cuda", index)),
        "float": lambda self: stay(self, torch.float32),
        "half": lambda self: stay(self, torch.float16),
        "bfloat16": lambda self: stay(self, torch.bfloat16),
        "_apply": lambda *_, **__: _refuse_move(),
        "save_pretrained": lambda *_, **__: _refuse_save(),
        "device": property(lambda _: device),
        "dtype": property(lambda _: dtype),
    }
    model.__class__ = _bracketed(type(model), runtime, **members)
    model.hf_device_map = {"": device}  # transformers' mark of a model that is placed already
    return model


def _bracketed(base: type, runtime: Runtime, **members: Any) -> type:
    """Return a subclass of the same name whose forward passes go through the runtime."""
    inner: Any = base

    @functools.wraps(inner.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        tokens = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() > 1 else 0
        past = next((kwargs[name] for name in ("past_key_values", "cache_params") if kwargs.get(name) is not None), None)
        return runtime.run(lambda: inner.forward(self, *args, **kwargs), tokens, past)

    same = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), same | members | {"forward": forward})


def _refuse_move() -> NoReturn:
    raise DeviceError(
        "A layered model stays on the device and in the dtype it was loaded with.", "Load it again with device= or dtype=."
    )


def _refuse_save() -> NoReturn:
    raise AirLLMError(
        "A layered model is not saved: its weights are the checkpoint's own.", "Copy the folder model.path instead."
    )
