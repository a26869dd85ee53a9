"""Which values a field of a config may have, as functions that tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]


def anything(_: Any) -> bool:
    """Allow every value: the field tells how a checkpoint was made, or is a wish."""
    return True


def one_of(*values: Any) -> Check:
    """Allow these values, of just these types: True is not 1."""
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def names(value: Any) -> bool:
    """Allow a list of names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def block(value: Any) -> bool:
    """Allow the rows and columns of a block."""
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)  # noqa: PLR2004


def group_size(value: Any) -> bool:
    """Allow how many columns form a group: -1 for all of them."""
    return type(value) is int and (value > 0 or value == -1)


def only_names(value: Any) -> bool:
    """Allow rules that say nothing but which modules: that they are quantized as all are, or (``-:``) that they are not."""
    return isinstance(value, dict) and all(rule == {} for rule in value.values())


def known(value: Any, fields: dict[str, Check]) -> bool:
    """Tell whether an object has only these fields, each with a value that is allowed, or null."""
    return isinstance(value, dict) and all(
        given is None or (name in fields and fields[name](given)) for name, given in value.items()
    )
