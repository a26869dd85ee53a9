"""One run of a loaded model: a prompt goes in, text comes out as it is written, an `Answer` is left."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from airllm_nb.errors import PromptError
from airllm_nb.notebook.decoding import Sampling, in_words, refusals
from airllm_nb.notebook.progress import Ended, Progress, Renderer, RunState
from airllm_nb.notebook.streaming import TextStream
from airllm_nb.notebook.summary import Answer, Interrupted, Settings, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airllm_nb import LayeredModel


def encode(model: LayeredModel, prompt: str, system: str | None, *, raw: bool) -> dict[str, torch.Tensor]:
    """Turn a prompt into ids: through the tokenizer's chat template where it has one, unless `raw`.

    Raises
    ------
    PromptError
        If there is no prompt, `system` is given and there is no place for it, or the chat template fails.
    """
    if not prompt.strip():
        raise PromptError("There is no prompt.", "Write it below the line with %%airllm.")
    for text in (prompt, system or ""):
        if lone := re.search("[\ud800-\udfff]", text):
            raise PromptError(f"The prompt holds {lone[0]!r}, half of a character.", "Remove it, or write the whole character.")
    tokenizer = model.tokenizer
    if raw or not tokenizer.chat_template:
        if system is not None:
            why = "is not used with --raw" if raw else f"of {model.name} does not exist"
            raise PromptError(f"A system prompt needs a chat template, which {why}.", "Write it into the prompt itself.")
        return _tensors(tokenizer(prompt, return_tensors="pt"))
    messages = [{"role": "user", "content": prompt.strip()}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program of the checkpoint, and can fail in any way
        remedy = "Leave --system out, or use --raw." if system is not None else "Use --raw."
        raise PromptError(f"The chat template of {model.name} fails with {in_words(error)}.", remedy) from error
    return _tensors(encoded)


def _tensors(encoded: Any) -> dict[str, torch.Tensor]:
    """Take what every causal model knows; some tokenizers also give token types, which ``generate`` refuses."""
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def generate(
    model: LayeredModel,
    inputs: dict[str, torch.Tensor],
    sampling: Sampling,
    renderer: Renderer,
    write: Callable[[str], object],
    stop: threading.Event | None = None,
    system: str | None = None,
) -> Answer:
    """Run the model on encoded `inputs`, write the text as it comes, and return the answer; `system` is only noted in it.

    Raises
    ------
    PromptError
        If the prompt leaves no room in the model's context.
    UnsupportedError
        If the checkpoint asks for a decoding that transformers refuses, or computes what is not a number.
    Interrupted
        If the user interrupts, or `stop` is set; it carries the answer so far.
    """
    prompt_tokens = inputs["input_ids"].shape[1]
    wanted = _fit(model, prompt_tokens, sampling.max_new_tokens, write)
    state = RunState(model.name, model.layers, wanted)
    progress = Progress(state, renderer, stop)

    def show(text: str) -> None:
        progress.before_text()
        write(text)

    stream = TextStream(model.tokenizer, show, sampling.stop)

    def answer(stopped: Stopped) -> Answer:
        seconds = time.perf_counter() - began
        settings = Settings.of(model, sampling, system)
        layers, timeline = progress.totals(), progress.timeline()
        return Answer(stream.text, tuple(stream.ids), prompt_tokens, seconds, stopped, layers, settings, timeline)

    ends = _end_ids(model)
    options = {
        **sampling.options(model),
        **inputs,
        "max_new_tokens": wanted,
        "pad_token_id": _pad_id(model, ends),
        "streamer": stream,
        "stopping_criteria": [_StopFlag(stream)],
    }
    ended: Ended = "failed"
    began = time.perf_counter()
    model.progress = progress
    try:
        with _seeded(sampling.seed), refusals(model, state):
            model.generate(**options)
        ended = "done"
    except KeyboardInterrupt:
        ended = "interrupted"
    finally:
        model.progress = None
        stream.end()
        if stream.text and not stream.text.endswith("\n"):
            write("\n")
        progress.finish(ended)
    if ended == "interrupted":
        where = f"after {len(stream.ids)} tokens; _airllm holds the text so far" if stream.ids else "before the first token"
        raise Interrupted(f"stopped {where}", answer("interrupted"))
    if stream.stopped:
        return answer("stop")
    return answer("end" if len(stream.ids) < wanted or stream.ids[-1] in ends else "length")


class _StopFlag:
    """A stopping criterion for ``generate``, which asks it right after it has handed the token to the streamer."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._stream.stopped, dtype=torch.bool, device=input_ids.device)


def _fit(model: LayeredModel, prompt_tokens: int, wanted: int, write: Callable[[str], object]) -> int:
    """Return how many of the `wanted` tokens the context has room for, and say so if it is fewer."""
    if model.context_length is None:
        return wanted
    room = model.context_length - prompt_tokens
    if room < 1:
        raise PromptError(
            f"The prompt has {prompt_tokens} tokens, and {model.name} has a context of {model.context_length}.",
            "Shorten it: the answer needs room too.",
        )
    if room < wanted:
        write(f"(The context of {model.context_length} tokens leaves room for {room}, not {wanted}.)\n")
    return min(room, wanted)


def _end_ids(model: LayeredModel) -> set[int]:
    """Return the ids that end a text: the generation config's where it names some, else the tokenizer's."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.tokenizer.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _pad_id(model: LayeredModel, ends: set[int]) -> int | None:
    """Return the padding id; one sequence needs none, but transformers warns if it is not given."""
    pad: int | None = model.tokenizer.pad_token_id
    return min(ends, default=None) if pad is None else pad


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed PyTorch for the length of a block, and put the states of the CPU and CUDA generators back."""
    if seed is None:
        yield
        return
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield
