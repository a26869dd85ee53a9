"""LayeredModel: a transformers model whose weights need not fit in memory."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from airllm_nb.compat import cache, longrope
from airllm_nb.compat.tokenizer import TOKENIZER_FILES, load_tokenizer
from airllm_nb.compat.versions import require_supported
from airllm_nb.engine import context, hub, many, taps, threads, tracing
from airllm_nb.engine.experts import ExpertStore
from airllm_nb.engine.freeing import free
from airllm_nb.engine.gguf_checkpoint import open_checkpoint
from airllm_nb.engine.layered import make_layered
from airllm_nb.engine.loading import load_weights
from airllm_nb.engine.mapped import SharingReader
from airllm_nb.engine.plan import Plan
from airllm_nb.engine.planning import named, plan, prepare
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.runtime import Runtime
from airllm_nb.engine.sharing import Shared
from airllm_nb.engine.skeleton import Skeleton
from airllm_nb.engine.stream import WeightStream
from airllm_nb.engine.weights import GroupReader
from airllm_nb.errors import AirLLMError, CheckpointError
from airllm_nb.events import LayerInfo, Listener

__all__ = ["LayeredModel", "plan"]

OWN = frozenset(("_hf", "_runtime", "_reader", "_skeleton", "_path", "_trust", "_tokenizer", "_streams", "_free", "progress"))


class LayeredModel:
    """A causal language model that reads its decoder layers from disk just before they compute, as far as memory demands.

    Behaves as the transformers model that it runs: what is not defined here is that model's own, and ``isinstance`` and
    ``pipeline`` take it for one. Made by `from_pretrained`.

    Attributes
    ----------
    plan : Plan
        Sizes, and what stays and what streams.
    layers : tuple of LayerInfo
        The decoder layers in the order of computation.
    device : torch.device
        Where it computes.
    dtype : torch.dtype
        What it computes in.
    path : Path
        The checkpoint's folder.
    """

    def __init__(self, skeleton: Skeleton, reader: Reader, plan: Plan, path: Path, *, trust_remote_code: bool) -> None:
        self._skeleton = skeleton
        self._reader = reader
        self._path = path
        self._trust = trust_remote_code
        self._tokenizer: Any = None
        self._runtime = Runtime(skeleton.layers, plan)
        groups = (skeleton.always, *filter(None, (skeleton.embedding,)), *(layer.group for layer in skeleton.layers))
        self._streams: list[WeightStream | ExpertStore] = []
        self._free = weakref.finalize(self, free, weakref.ref(self), os.getpid(), self._streams, groups, reader)
        self._hf = make_layered(skeleton.model, self._runtime, plan.device, plan.dtype)
        self._hf.__dict__["_layered"] = self  # whoever holds only the inner model keeps its weights from being closed

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        memory: str | float = "auto",
        kernels: str = "exact",
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        shared: Shared = False,
        quantize: str | None = None,
        progress: Listener | None = None,
    ) -> LayeredModel:
        """Load a model.

        Parameters
        ----------
        model : str or path
            A hub id, a local folder with ``config.json`` and safetensors files, a GGUF file, or ``"demo"``.
        device : str or torch.device
            ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:0"``, ``"mps"`` ...
        dtype : str or torch.dtype
            ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        memory : str or number
            Budget for weights and read-ahead buffers on the device: ``"auto"``, a size such as ``"4GB"``, or bytes.
        kernels : str
            ``"exact"`` computes bit for bit as transformers does. ``"measured"`` takes, for each shape of linear layer, the
            kernel of PyTorch that multiplies one row fastest on this CPU: no larger errors, but other last bits.
        revision, token : optional
            Branch, tag or commit of a hub model, and the token that opens it.
        trust_remote_code : bool
            Allow code from the checkpoint to run. Off unless you say so.
        shared : bool or "insist"
            True maps the weights that stay from the checkpoint's files, so that all processes that do hold one copy together:
            on the CPU, and where this user cannot change the files (another owner and no permission to write, or a read-only
            mount). ``"insist"`` does it anyway: then a file that is rewritten changes the model, or kills the process.
        quantize : str, optional
            ``"int8"`` or ``"int4"`` keeps the linear layers' weights in so many bits, ``"int4-32"`` with groups of 32 instead
            of 64: other numbers, in less memory and faster on a CPU. They are written once to our cache, and read from there.
            ``"int4+head"`` also keeps the head, in 8 bits. ``"int4-gptq"`` rounds 4-bit weights so that their errors make up for
            each other on a short text: nearer to the model as it is published, but writing them takes many times as long.
        progress : callable(event), optional
            Told of every event, see `airllm_nb.events`.

        Returns
        -------
        LayeredModel

        Raises
        ------
        AirLLMError
            One of its kinds, with cause and remedy; nothing stays in memory then.
        """
        require_supported()  # before gigabytes are fetched in vain
        name, model = named(model, progress)
        path = hub.locate(model, revision=revision, token=token, progress=progress)
        checkpoint = open_checkpoint(path)
        skeleton, decided, stacks, packed = prepare(
            name, checkpoint, device=device, dtype=dtype, memory=memory, kernels=kernels, shared=shared,
            trust_remote_code=trust_remote_code, quantize=quantize,
        )  # fmt: skip
        if decided.device.type == "cpu":
            threads.apply()
        if packed is not None:
            packed.fill(progress)
            checkpoint = packed.joined()
            decided = replace(decided, quantized=str(packed), work=replace(decided.work, checkpoint=checkpoint))
        reader = Reader(checkpoint)
        loaded = cls(skeleton, reader, decided, checkpoint.folder, trust_remote_code=trust_remote_code)
        try:
            loaded.progress = progress
            groups = (SharingReader if shared else GroupReader)(checkpoint, reader)
            load_weights(skeleton, decided, groups, loaded._runtime, loaded._streams, stacks)
        except BaseException:
            loaded.close()
            raise
        return loaded

    # What the model does

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate token ids: transformers' own ``generate``, with all its options.

        Raises
        ------
        PromptError
            If prompt and new tokens do not fit the context.
        UnsupportedError
            If the installed transformers would generate wrongly from a padded batch.
        """
        args, kwargs = self._on_device(args), self._on_device(kwargs)
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        prompt = context.count_tokens(ids)
        new = context.new_tokens(kwargs, self._hf.generation_config, prompt or 0)
        self._require_fit(prompt, new)
        longrope.refuse_padded_growth(self.config, kwargs.get("attention_mask"), (prompt or 0) + new)
        if isinstance(assistant := kwargs.get("assistant_model"), LayeredModel):
            kwargs["assistant_model"] = assistant._hf  # noqa: SLF001  # transformers inspects and copies it
        moving = self._streams or self.plan.by_rows or self._runtime.taps  # what comes and goes breaks the graph
        if moving and hasattr(self._hf.generation_config, "disable_compile"):
            kwargs.setdefault("disable_compile", True)
        with self._runtime.lock:
            self._runtime.keeps_cache = kwargs.get("past_key_values") is not None
            grad = torch.is_grad_enabled()
            try:
                return self._hf.generate(*args, **kwargs)
            finally:
                torch.set_grad_enabled(grad)  # as in Runtime.run
                self._runtime.keeps_cache = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass; arguments and result are those of the transformers model."""
        args, kwargs = self._on_device(args), self._on_device(kwargs)
        tokens = context.count_tokens(args[0] if args else kwargs.get("input_ids"))
        self._require_fit(tokens and tokens + cache.length(kwargs.get("past_key_values")), 0)
        return self._hf(*args, **kwargs)

    forward = __call__
    map = many.map_prompts

    # What can be seen of it

    on_layer = taps.on_layer
    trace = tracing.trace

    def to(self, *args: Any, **kwargs: Any) -> LayeredModel:
        """Return this model if that is where and what it is already.

        Raises
        ------
        DeviceError
            If another device or dtype is asked for.
        """
        self._hf.to(*args, **kwargs)
        return self

    def eval(self) -> LayeredModel:
        """Return this model: it never trains."""
        return self.train(mode=False)

    def train(self, mode: bool = True) -> LayeredModel:
        """Refuse to train: its weights come and go.

        Raises
        ------
        AirLLMError
            Unless `mode` is False.
        """
        if mode:
            raise AirLLMError("A layered model does not train: its weights come and go.", "Train it with transformers itself.")
        self._hf.train(mode=False)
        return self

    def close(self) -> None:
        """Free the weights and stop reading. May be called more than once."""
        self._runtime.close()
        self._free()

    def __enter__(self) -> LayeredModel:  # noqa: PYI034  # typing.Self is new in Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # What it is

    @property
    def name(self) -> str:
        """Short name of the model."""
        return self.plan.name

    @property
    def plan(self) -> Plan:
        """Sizes, and what stays and what streams; another one when memory became short, see `airllm_nb.engine.pressure`."""
        return self._runtime.plan

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The decoder layers in the order of computation."""
        return self.plan.layers

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.plan.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.plan.dtype

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self._path

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, read when first asked for.

        Raises
        ------
        CheckpointError
            If the checkpoint has none, or it cannot be read.
        """
        if self._tokenizer is None:
            if not any((self._path / file).is_file() for file in TOKENIZER_FILES):
                raise CheckpointError(
                    f"{self._path.name} has no tokenizer files, so there is no model.tokenizer.",
                    "Pass token ids as input_ids, or copy the tokenizer's files into the folder.",
                )
            self._tokenizer = load_tokenizer(self._path, trust_remote_code=self._trust)
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        """Most tokens that fit, prompt and answer together; None if the model sets no limit."""
        return context.length(self.config)

    @property
    def progress(self) -> Listener | None:
        """Who is told of events. Settable at any time; without one, layers that stay have no hooks from the next pass on."""
        return self._runtime.listener

    @progress.setter
    def progress(self, listener: Listener | None) -> None:
        self._runtime.listener = listener

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the transformers model: a proxy's usual way of being taken for what it stands for."""
        return type(self._hf) if "_hf" in self.__dict__ else LayeredModel

    def __getattr__(self, name: str) -> Any:
        if name in OWN:
            raise AttributeError(name)
        return getattr(self._hf, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN or hasattr(LayeredModel, name):  # a property without a setter refuses
            object.__setattr__(self, name, value)
        else:
            setattr(self._hf, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._hf)})

    def __repr__(self) -> str:
        if self._runtime.closed:
            return f"LayeredModel({self.name}: closed)"
        streamed = sum(not layer.resident for layer in self.layers)
        stay = f"{streamed} of {len(self.layers)} layers stream" if streamed else f"{len(self.layers)} layers, all resident"
        return f"LayeredModel({self.name}: {stay}, {self.device}, {str(self.dtype).removeprefix('torch.')})"

    def _require_fit(self, tokens: int | None, new: int) -> None:
        context.require_fit(self.name, self.context_length, tokens, new)

    def _on_device(self, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: self._on_device(value) for key, value in values.items()}
        if isinstance(values, tuple):
            return tuple(self._on_device(value) for value in values)
        return values.to(self.device) if type(values) is torch.Tensor else values
