"""How a version of transformers is told to compute no more in a pass than is looked at."""

from __future__ import annotations

import inspect
from typing import Any


def one_pass(model: Any) -> dict[str, Any]:
    """Return the arguments by which one pass keeps nothing for a next one, and gives logits for the last token alone.

    ``num_logits_to_keep`` came with 4.45 and was renamed with 4.49; before, all tokens' logits are computed.
    """
    known = inspect.signature(type(model).forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1, "num_logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in known}
