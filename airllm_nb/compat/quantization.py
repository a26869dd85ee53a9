"""What a ``quantization_config`` says of the weights, as far as all of it is understood.

Checkpoints that others have quantized are read where their weights can be unpacked to just what transformers makes of them when
it dequantizes. A field that is not known here may change what the numbers mean: then the checkpoint is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from airllm_nb.compat import bitsandbytes, compressed
from airllm_nb.compat.fields import anything, block, group_size, names, one_of, only_names
from airllm_nb.compat.versions import Raw
from airllm_nb.errors import UnsupportedError

BITSANDBYTES, COMPRESSED = "bitsandbytes", "compressed-tensors"
GPTQ, GPTQ_V2 = "gptq", "gptq_v2"
PLAIN = "Use the checkpoint with bfloat16, float16 or float32 weights."

MADE = (
    "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment", "damp_percent", "dataset",
    "disable_exllama", "exllama_config", "hyb_act", "max_input_length", "meta", "model_file_base_name", "model_name_or_path",
    "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "pack_impl", "pad_token_id",
    "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip
"""Fields of GPTQ that tell how the numbers were found, or by which kernel to multiply."""

FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # transformers/utils/quantization_config.py: FineGrainedFP8Config; `fmt` is DeepSeek's, `ignored_layers` MiniMax's.
    "fp8": {
        "activation_scheme": one_of("dynamic", "static"), "dequantize": anything, "expert_dtype": one_of("fp8"),
        "fmt": one_of("e4m3"), "ignored_layers": names, "modules_to_convert": one_of([]), "modules_to_not_convert": names,
        "scale_fmt": one_of("float", "ue8m0"), "weight_block_size": block,
    },
    # Mxfp4Config
    "mxfp4": {"dequantize": anything, "modules_to_not_convert": names},
    # GPTQConfig, and what AutoGPTQ and GPTQModel write beside
    GPTQ: {
        "bits": one_of(4, 8), "group_size": group_size, "desc_act": one_of(True, False), "sym": one_of(True, False),
        "checkpoint_format": one_of(GPTQ, GPTQ_V2), "format": one_of(GPTQ, GPTQ_V2), "is_marlin_format": one_of(False),
        "lm_head": one_of(False), "pack_dtype": one_of("int32"), "dynamic": only_names, "act_group_aware": anything,
        "method": one_of(GPTQ),
    } | dict.fromkeys(MADE, anything),
    # AwqConfig, and from "method" on what GPTQModel writes beside
    "awq": {
        "bits": one_of(4), "group_size": group_size, "zero_point": one_of(True), "version": one_of("gemm", "GEMM"),
        "format": one_of("gemm"), "modules_to_not_convert": names, "do_fuse": one_of(False), "fuse_max_seq_len": anything,
        "backend": one_of("auto", "autoawq"), "method": one_of("awq"), "checkpoint_format": one_of("gemm"),
        "desc_act": one_of(False), "dynamic": only_names, "lm_head": one_of(False), "meta": anything,
        "pack_dtype": one_of("int32"), "pack_impl": anything, "sym": one_of(True, False),
    },
    "bitsandbytes": bitsandbytes.FIELDS,
    COMPRESSED: {
        "config_groups": compressed.well_formed, "dequantize": anything, "format": one_of(*compressed.FORMATS),
        "global_compression_ratio": anything, "ignore": names, "quantization_status": one_of("compressed"),
        "run_compressed": anything, "sparsity_config": compressed.is_dense, "transform_config": one_of({}),
        "use_optimized_inference": anything, "version": anything,
    },
}  # fmt: skip
"""The methods that are read, their fields, and which values of them. Each may also be absent or null, and others may be null."""


STATED = {GPTQ: ("bits", "group_size", "desc_act", "sym"), "awq": ("bits", "group_size", "zero_point", "version")}
"""What must stand there: defaults differ between those who write and who read."""
TRANSPOSED = ("gpt2", "openai-gpt")
"""Models whose layers keep their matrices the other way round (``Conv1D``). Quantized they lie as others do, and a
square one would look as it should."""


def config_of(raw: Raw) -> Raw | None:
    """Return the ``quantization_config`` of a config.json, be it that of its text part; None where the weights are plain.

    Raises
    ------
    UnsupportedError
        If weights of this kind are not read.
    """
    for part in _parts(raw):
        if found := part.get("quantization_config"):
            for refusal in refusals(part):
                raise refusal
            config: Raw = found
            return config
    return None


def method_of(config: Raw) -> Any:
    """Return the ``quant_method``. Before there was that field, only bitsandbytes wrote a config."""
    loads = config.get("load_in_4bit") or config.get("load_in_8bit")
    return config.get("quant_method") or (BITSANDBYTES if loads else "?")


def _parts(raw: Raw) -> Iterator[Raw]:
    yield raw
    if isinstance(text := raw.get("text_config"), dict):
        yield text


def refusals(part: Raw) -> Iterator[UnsupportedError]:
    """Yield every reason not to read the quantized weights of a config.json, or of its text part."""
    config = part.get("quantization_config")
    if not config:
        return
    method = method_of(config) if isinstance(config, dict) else config
    said = f"The weights of this checkpoint are quantized ({method})"
    if not isinstance(method, str) or method not in FIELDS:
        yield UnsupportedError(f"{said}, which this engine does not read.", PLAIN)
        return
    for name, value in config.items():
        known = FIELDS[method].get(name)
        if name == "quant_method" or value is None or (known and known(value)):
            continue
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."  # noqa: PLR2004  # to read
        yield UnsupportedError(f"{said} with {name} {shown}, which this engine does not read.", PLAIN)
    for clause in _faults(method, config, part.get("model_type")):
        yield UnsupportedError(f"{said}{clause}.", PLAIN)


def _faults(method: str, config: Raw, model_type: Any) -> Iterator[str]:
    """Yield what is wrong with a config whose fields are known, each for itself."""
    for name in bitsandbytes.stated(config) if method == BITSANDBYTES else STATED.get(method, ()):
        if config.get(name) is None:
            yield f", and {name} is not said, by which they would be read"
    odd = {COMPRESSED: compressed.odd, BITSANDBYTES: bitsandbytes.odd}.get(method)
    if odd and (found := odd(config)):
        yield f" with {found}, which this engine does not read"
    if method == GPTQ and len({config.get(name) for name in ("checkpoint_format", "format")} - {None}) > 1:
        yield ", and checkpoint_format and format contradict each other"
    if method in (BITSANDBYTES, GPTQ, "awq") and model_type in TRANSPOSED:
        yield f", and those of {model_type} are stored transposed, which this engine does not read"
    if method == "mxfp4" and model_type != "gpt_oss":
        yield f", which is read of gpt_oss, and this is {model_type!r}"


def forget(config: Any) -> None:
    """Let transformers' config object say nothing of quantized weights: the model gets unpacked ones."""
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and "quantization_config" in vars(part):
            del part.quantization_config
