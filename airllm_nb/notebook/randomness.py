"""PyTorch's random state, of the CPU and of CUDA where that is in use: what it is, and putting it back."""

from __future__ import annotations

import torch

State = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
"""Of the CPU's generator, and of each GPU's."""


def state() -> State:
    """Return what it is now."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), tuple(gpus)


def put_back(before: State) -> None:
    """Make it what it was."""
    cpu, gpus = before
    torch.set_rng_state(cpu)
    for number, gpu in enumerate(gpus):
        torch.cuda.set_rng_state(gpu, number)
