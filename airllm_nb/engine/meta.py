"""Builds the real transformers model without its weights: parameters on meta, buffers real."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from airllm_nb.compat import config as compat_config
from airllm_nb.compat import initialize, versions
from airllm_nb.engine.interrupts import interrupt_later
from airllm_nb.errors import CheckpointError, UnsupportedError

_building = threading.Lock()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Send parameters to meta as modules register them, and leave buffers real.

    ``torch.device("meta")`` would send buffers there too, and a rotary embedding whose ``inv_freq`` is on meta is silently wrong
    on some versions of transformers. accelerate's ``init_empty_weights`` works the same way. Other threads build their own
    modules meanwhile, which must not end up on meta; and only one thread at a time may put the method in and take it out.
    """
    register = nn.Module.register_parameter
    builder = threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if threading.get_ident() != builder or parameter is None:
            return
        if not parameter.is_meta:  # one that is on meta already may be a tied one
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)  # noqa: SLF001

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def empty_model(config: Any, dtype: torch.dtype, folder: Path, *, trust_remote_code: bool) -> Any:
    """Build the causal language model of a config, as ``from_pretrained`` would for a folder, with its parameters on meta.

    Raises
    ------
    UnsupportedError
        If the installed transformers cannot build it.
    CheckpointError
        If ``generation_config.json`` cannot be read.
    """
    import transformers

    argument = {"dtype" if versions.installed() >= (5,) else "torch_dtype": dtype}
    rng = torch.random.get_rng_state()  # initialising weights that are replaced must not change the user's random numbers
    try:
        # An interrupt within could leave methods of ours in torch's classes, or a mode of PyTorch's where it was not.
        with interrupt_later(), _building, _parameters_on_meta(), initialize.uninitialised(), torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **argument, **compat_config.attention(config)
            )
            initialize.compute_buffers(model)
        model.tie_weights()
    except Exception as error:  # whatever the model's own code finds wrong with the config
        raise UnsupportedError(
            f"{versions.installed_text()} cannot build this as a causal language model: {compat_config.first_line(error)}",
            "Check config.json, or try  %pip install -U transformers  and restart the kernel.",
        ) from error
    finally:
        torch.random.set_rng_state(rng)
    if getattr(model.config, "is_encoder_decoder", False):  # models with both that can go without take it back
        raise UnsupportedError(
            "config.json says that this model has an encoder, and it is a causal language model without one.",
            "Fetch the checkpoint again, or correct is_encoder_decoder by the model's page on the hub.",
        )
    _load_generation_config(model, folder)
    return model.eval()


def _load_generation_config(model: Any, folder: Path) -> None:
    import transformers

    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"generation_config.json cannot be read: {error}", "Correct it, or delete it.") from error
    model.config._name_or_path = model.name_or_path = str(folder)  # noqa: SLF001  # as from_pretrained does
