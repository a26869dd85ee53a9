"""One run of a loaded model: a prompt goes in, text comes out as it is written, an `Answer` is left."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from airllm_nb.errors import PromptError
from airllm_nb.notebook.progress import Ended, Progress, Renderer, RunState
from airllm_nb.notebook.streaming import TextStream
from airllm_nb.notebook.summary import Answer, Interrupted, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airllm_nb import LayeredModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when the text ends.

    What is not named here, such as ``top_k`` or a repetition penalty, is as the model's own generation config has it.

    Parameters
    ----------
    max_new_tokens : int
        The text's largest length.
    temperature : float
        0 takes the most likely token every time (greedy); above 0 samples.
    top_p : float, optional
        Sample from the most likely tokens that have this probability together.
    seed : int, optional
        Makes sampling repeatable, and leaves PyTorch's own random state as it was.
    stop : tuple of str
        The text ends before the first of these.

    Raises
    ------
    PromptError
        If a value makes no sense.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise PromptError(f"max-new-tokens is {self.max_new_tokens}.", "Ask for 1 token or more.")
        if not 0 <= self.temperature < float("inf"):
            raise PromptError(f"The temperature is {self.temperature}.", "Use 0 (no sampling) or more, such as 0.7.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise PromptError(f"top-p is {self.top_p}.", "Use a share above 0 and up to 1, such as 0.9.")
        if self.top_p is not None and not self.temperature:
            raise PromptError("top-p has no effect without sampling.", "Give a temperature above 0 as well.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise PromptError(f"The seed is {self.seed}.", "Use a whole number from 0 up.")
        if "" in self.stop:
            raise PromptError("A stop text is empty.", "Write the text at which to stop, or leave it out.")

    def options(self) -> dict[str, Any]:
        """Return what ``generate`` takes; None unsets what the model's generation config says of sampling."""
        if not self.temperature:
            return {"num_beams": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        top_p = {} if self.top_p is None else {"top_p": self.top_p}
        return {"num_beams": 1, "do_sample": True, "temperature": self.temperature, **top_p}


def encode(model: LayeredModel, prompt: str, system: str | None, *, raw: bool) -> dict[str, torch.Tensor]:
    """Turn a prompt into ids: through the tokenizer's chat template where it has one, unless `raw`.

    Raises
    ------
    PromptError
        If there is no prompt, or `system` is given and there is no place for it.
    """
    if not prompt.strip():
        raise PromptError("There is no prompt.", "Write it below the line with %%airllm.")
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
    except jinja2.TemplateError as error:
        remedy = "Leave --system out, or use --raw." if system is not None else "Use --raw."
        raise PromptError(f"The chat template of {model.name} refuses this: {error}.", remedy) from error
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
) -> Answer:
    """Run the model on encoded `inputs`, write the text as it comes, and return the answer.

    Raises
    ------
    PromptError
        If the prompt leaves no room in the model's context.
    Interrupted
        If the user interrupts; it carries the answer so far.
    """
    prompt_tokens = inputs["input_ids"].shape[1]
    wanted = _fit(model, prompt_tokens, sampling.max_new_tokens, write)
    state = RunState(model.name, model.layers, wanted)
    progress = Progress(state, renderer)

    def show(text: str) -> None:
        progress.before_text()
        write(text)

    stream = TextStream(model.tokenizer, show, sampling.stop)

    def answer(stopped: Stopped) -> Answer:
        seconds = time.perf_counter() - began
        return Answer(stream.text, tuple(stream.ids), prompt_tokens, seconds, stopped, progress.totals())

    ends = _end_ids(model)
    ended: Ended = "failed"
    began = time.perf_counter()
    model.progress = progress
    try:
        with _seeded(sampling.seed):
            model.generate(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                **sampling.options(),
                max_new_tokens=wanted,
                pad_token_id=_pad_id(model, ends),
                streamer=stream,
                stopping_criteria=[_StopFlag(stream)],
            )
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
