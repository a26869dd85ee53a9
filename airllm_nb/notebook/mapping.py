"""One map: many prompts in, their answers out; drawn meanwhile, and stopped without losing what is complete."""

from __future__ import annotations

import dataclasses
import traceback
from typing import TYPE_CHECKING, Any

from airllm_nb.compat.config import quiet
from airllm_nb.engine.decoding import Sampling
from airllm_nb.engine.many import each_text
from airllm_nb.events import BatchEnd, Event
from airllm_nb.notebook.answers import Answers, MapInterrupted
from airllm_nb.notebook.progress import Renderer, drawn
from airllm_nb.notebook.run_state import RunState
from airllm_nb.notebook.summary import Settings
from airllm_nb.notebook.verdict import memory_left

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Iterable, Iterator

    from airllm_nb import LayeredModel


def run(
    model: LayeredModel,
    prompts: Iterable[str],
    renderer: Renderer,
    halt: threading.Event,
    *,
    results: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Answers:
    """Answer many prompts with `LayeredModel.map`, which takes the `options`.

    Raises
    ------
    MapInterrupted
        If the user interrupts, or `halt` is set; its `answers` hold what was complete.
    """
    asked = list(_until(halt, each_text(prompts)))
    sampling = Sampling(**{part.name: options[part.name] for part in dataclasses.fields(Sampling) if part.name in options})
    settings = Settings.of(model, sampling, options.get("system"))
    state = RunState(model.name, model.layers, sampling.max_new_tokens, memory_left(model))
    texts: dict[int, str] = {}

    def answers() -> Answers:
        computed, seconds = (state.batches.computed, state.batches.seconds) if state.batches else (0, 0.0)
        found = tuple(texts.get(index) for index in range(len(asked)))
        return Answers(tuple(asked), found, computed, seconds, settings, None if results is None else str(results))

    try:
        with drawn(state, renderer, halt) as progress, quiet():

            def listen(event: Event) -> None:
                if type(event) is BatchEnd:
                    texts.update(event.texts)
                progress(event)

            texts.update(enumerate(model.map(_until(halt, asked), results=results, progress=listen, **options)))
    except KeyboardInterrupt as interrupt:
        traceback.clear_frames(interrupt.__traceback__)  # IPython keeps it, and so the KV cache of the batch
        made = answers()
        goes_on = "the same again goes on" if results is not None else "with results in a file, the next call would go on"
        raise MapInterrupted(f"stopped after {made.done} of {len(asked)} prompts: {goes_on}", made) from None
    return answers()


def _until(halt: threading.Event, texts: Iterable[str]) -> Iterator[str]:
    """Go through texts until somebody stops it: there are no layers yet before which that could be seen."""
    for text in texts:
        if halt.is_set():
            raise KeyboardInterrupt
        yield text
