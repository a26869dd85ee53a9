"""Generated ids become text as they come, whole characters only and never a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airllm_nb.engine.interrupts import interrupt_later

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding puts where a character's bytes are not complete."""


class TextStream:
    """A streamer for transformers' ``generate`` (it has ``put`` and ``end``) that writes text as soon as it is certain.

    transformers' own ``TextStreamer`` holds back whole words, decodes a line again for every token, and loses the space
    after a line break with sentencepiece tokenizers. This one decodes two short windows and writes how they differ.

    Parameters
    ----------
    tokenizer
        transformers' tokenizer.
    write : callable
        Takes each piece of text.
    stop : sequence of str, optional
        The text ends before the first of these; they may arrive in pieces.
    ids : sequence of int, optional
        The beginning of a text that is gone on with; it is written again.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object], stop: Sequence[str] = (), ids: Sequence[int] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False  # a stop string came
        self._tokenizer = tokenizer
        self._write = write
        self._stop = [text for text in stop if text]
        self._prompt_is_next = True
        self._begin = self._end = 0  # ids[begin:end] are written and give the next ids their context
        self._held = ""  # text that may be the beginning of a stop string
        for number in ids:
            self.take([number])

    def put(self, value: Any) -> None:
        """Take the prompt's ids first, then those of each new token: what ``generate`` calls."""
        if self._prompt_is_next:
            self._prompt_is_next = False
        else:
            self.take(value.reshape(-1).tolist())

    def take(self, ids: list[int]) -> None:
        """Take the next ids."""
        self.ids += ids  # at once: whatever comes after may be interrupted, and is made again from the ids
        text = self._new_text()
        if text and not text.endswith(REPLACEMENT):
            self._begin, self._end = self._end, len(self.ids)
            self._show(text)

    def end(self) -> None:
        """Write what was held back; may be called again."""
        if self.stopped:
            return
        text = self._held + self._new_text()
        self._begin = self._end = len(self.ids)
        self._held = ""
        self._emit(text)

    def _new_text(self) -> str:
        known = self._decode(self.ids[self._begin : self._end])
        return self._decode(self.ids[self._begin :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _show(self, text: str) -> None:
        if self.stopped:
            return
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._emit(self._held[: min(found)])
            return
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        sure = len(self._held) - keep
        text, self._held = self._held[:sure], self._held[sure:]
        self._emit(text)

    def _emit(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class Unseen:
    """Writes what the reader has not seen yet of a text that is made again from its beginning.

    Parameters
    ----------
    seen : str
        What stands above already. Its end may be a guess that the text does not keep, such as half of a character.
    write : callable
        Takes each new piece.
    """

    def __init__(self, seen: str, write: Callable[[str], object]) -> None:
        self._made = ""
        self._above = seen  # as far as the text has not come to it
        self._write = write

    @property
    def seen(self) -> str:
        """What the reader has seen by now."""
        return self._made + self._above

    def __call__(self, text: str) -> None:
        """Take the next piece of the text."""
        pairs = enumerate(zip(text, self._above, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(text), len(self._above)))
        with interrupt_later():  # or who knows what was written
            self._above = self._above[same:] if same == len(text) else ""
            self._made += text
            if new := text[same:]:
                self._write(new)

    def close(self) -> None:
        """Write no more: what takes the text may be large, and is not held."""
        self._write = _nowhere


def _nowhere(_: str) -> None:
    pass
