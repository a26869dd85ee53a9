"""What a map leaves: prompts and answers, as a table in the notebook, as lists, or as a DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from airllm_nb.engine.data_frame import data_frame
from airllm_nb.notebook.summary import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airllm_nb.notebook.summary import Settings

MOST_ROWS = 200
MOST_CHARACTERS = 2000
"""What the table shows: a page with more of it would be slow, and nobody reads it there."""

BOX = "max-width:960px;padding:4px 2px 6px;font-size:13px;line-height:1.6"
QUIET = "font-size:12px;opacity:0.8"
CELL = "padding:3px 14px 3px 0;text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"


@dataclass(frozen=True, repr=False)
class Answers(Sequence[str | None]):
    """The result of a map; it is a sequence of its texts.

    Attributes
    ----------
    prompts : tuple of str
        What was asked, in the order in which it was given.
    texts : tuple of str or None
        The answers in the same order; None for those that a stop came before.
    computed : int
        How many of them this call has given, equal ones that were computed once among them: the others were in the file of
        results.
    seconds : float
        From the begin of the first batch to the end of the last.
    settings : Settings
        What they were made with.
    results : str or None
        The file that holds them, too.
    """

    prompts: tuple[str, ...]
    texts: tuple[str | None, ...]
    computed: int
    seconds: float
    settings: Settings
    results: str | None = None

    @property
    def done(self) -> int:
        """How many prompts have an answer."""
        return sum(text is not None for text in self.texts)

    @property
    def seconds_per_prompt(self) -> float:
        """Amortised: the seconds, shared among all prompts that they gave an answer to; 0.0 if there was none."""
        return self.seconds / self.computed if self.computed else 0.0

    def to_pandas(self) -> Any:
        """Return a DataFrame with the columns ``prompt`` and ``answer``.

        Raises
        ------
        AirLLMError
            If pandas is not installed.
        """
        return data_frame({"prompt": self.prompts, "answer": self.texts}, ".prompts and .texts")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        return self.texts[index]

    def __iter__(self) -> Iterator[str | None]:
        return iter(self.texts)

    def __str__(self) -> str:
        """Say how it went, in one line."""
        if not self.prompts:
            return "There were no prompts to answer."
        made = f"{self.done} of {len(self)} prompts answered"
        if not self.computed:
            return f"{made}, all of them before" if self.done else made
        before = f", {self.done - self.computed} of them before" if self.done > self.computed else ""
        return f"{made}{before} · {self.seconds:.1f} s · {self.seconds_per_prompt:.3g} s per prompt"

    def __repr__(self) -> str:  # without times, as `Answer`
        return f"Answers({self.done} of {len(self)} prompts)"

    def _repr_html_(self) -> str:
        return "".join(self._render())

    def _render(self) -> Iterator[str]:
        settings = self.settings
        yield f'<div class="airllm-result" style="{BOX}"><div><b>{escape(str(self))}</b></div>'
        kept = f" · results in {self.results}" if self.results else ""
        words = f"{settings.model} · {settings.device} · {settings.dtype} · at most {settings.max_new_tokens} new tokens{kept}"
        yield f'<div style="{QUIET}">{escape(words)}</div><table style="border-collapse:collapse;margin:6px 0;font-size:13px">'
        yield _row("th", ("", "prompt", "answer"))
        for number, (prompt, text) in enumerate(zip(self.prompts[:MOST_ROWS], self.texts, strict=False)):
            yield _row("td", (str(number), _short(prompt), "(no answer yet)" if text is None else _short(text)))
        more = len(self) - MOST_ROWS
        yield f"</table>{f'<div>and {more} more, in .texts</div>' if more > 0 else ''}</div>"


def _row(tag: str, cells: tuple[str, ...]) -> str:
    inner = "".join(f'<{tag} style="{CELL}">{escape(cell)}</{tag}>' for cell in cells)
    return f'<tr style="background-color:transparent">{inner}</tr>'


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"


class MapInterrupted(Interrupted):
    """The user stopped a map: `answers` holds what was complete by then."""

    def __init__(self, message: str, answers: Answers) -> None:
        super().__init__(message)
        self.answers = answers
