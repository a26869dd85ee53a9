"""What a user can cause: each error carries a cause and a remedy and is shown without a traceback."""

from __future__ import annotations

_LONGEST = 600
"""Characters of a cause; a damaged file can have names of any length."""


class AirLLMError(Exception):
    """An expected failure: what went wrong, and what the user can do about it.

    Anything that is *not* an ``AirLLMError`` is a bug and keeps its traceback.

    Parameters
    ----------
    cause : str
        One sentence that names what went wrong.
    remedy : str
        One sentence that says what to do now.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        cause = _readable(cause)
        super().__init__(f"{cause} {remedy}")
        self.cause = cause
        self.remedy = remedy

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: the lines that are shown in place of a traceback."""
        return [f"{type(self).__name__}: {self.cause}", f"  → {self.remedy}"]


def _readable(text: str) -> str:
    """Return a text that may hold names from a file so that it can be shown: of bearable length, with no control characters."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text)


class CheckpointError(AirLLMError):
    """The files of a checkpoint are missing, damaged, changed, or of a kind that is refused."""


class UnsupportedError(AirLLMError):
    """The model, or this model on the installed transformers, cannot be computed exactly."""


class DeviceError(AirLLMError):
    """The device or dtype asked for cannot be used on this machine."""


class MemoryBudgetError(AirLLMError):
    """The memory budget is not a size, or below the least that works."""


class SharingError(AirLLMError):
    """The weights cannot be shared with other processes, because their files could be changed underneath."""


class HubError(AirLLMError):
    """A model cannot be fetched: no network, no such repository, or a login is needed."""


class PromptError(AirLLMError):
    """What is asked makes no sense: an empty prompt or a table of them, a length beyond the context, an option out of range."""
