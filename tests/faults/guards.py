"""The lines that keep a fault from doing harm, each with what it becomes when it is taken away, and the tests that then fail.

`disable_guards.py` takes each away in turn and runs its tests. The text of a line stands here a second time on purpose: who
changes a guard shall look at what shows that it is one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

VARIABLE = "AIRLLM_NB_WITHOUT_GUARD"


class Guard(NamedTuple):
    """Where it stands, what is put in its place, and pytest's ``-k`` for what must fail then."""

    module: str
    line: str
    without: str
    file: str
    tests: str


WEIGHTS, SETTINGS, MEANWHILE, INTERRUPTED = (
    f"test_{name}.py" for name in ("damaged_weights", "damaged_settings", "damaged_meanwhile", "interrupted_hooks")
)
ENGINE = "airllm_nb.engine"
GUARDS = {
    "small files are looked at before they are opened": Guard(
        f"{ENGINE}.checkpoint", "require_readable(folder)\n", "pass\n", WEIGHTS, "huge_files"
    ),
    "a pipe is not waited for": Guard(f"{ENGINE}.readable", 'getattr(os, "O_NONBLOCK", 0)', "0", WEIGHTS, "pipes"),
    "a header is no longer than any is": Guard(
        f"{ENGINE}.checkpoint", "min(MAX_HEADER, state.size - 8)", "state.size - 8", WEIGHTS, "header_length_huge"
    ),
    "tensors cover the file exactly once": Guard(
        f"{ENGINE}.checkpoint", "if entry.offset != position:", "if False:", WEIGHTS, "offsets_overlap"
    ),
    "a tensor has as many bytes as its shape": Guard(
        f"{ENGINE}.checkpoint", "if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:", "if False:", WEIGHTS,
        "wrong_dtype",
    ),
    "a shape has few dimensions": Guard(
        f"{ENGINE}.checkpoint", "len(shape) <= MOST_DIMENSIONS and ", "", WEIGHTS, "wrong_shape"
    ),
    "entries are what they must be": Guard(
        f"{ENGINE}.checkpoint", "        if not whole:", "        if False:", WEIGHTS, "header_entries or offsets_out_of_range"
    ),
    "no key twice": Guard(f"{ENGINE}.checkpoint", "!= len(pairs)", "> len(pairs)", WEIGHTS, "duplicate_keys"),
    "JSON may be nested too deeply": Guard(
        f"{ENGINE}.checkpoint", "except (ValueError, RecursionError)", "except ValueError", WEIGHTS, "deep_nesting"
    ),
    "the index names files of the folder only": Guard(
        f"{ENGINE}.checkpoint", "if Path(name).name != name or", "if", WEIGHTS, "path_traversal"
    ),
    "a name has no null byte": Guard(f"{ENGINE}.checkpoint", ' or "\\0" in name:', ":", WEIGHTS, "path_traversal"),
    "shapes are those of the model": Guard(
        f"{ENGINE}.skeleton", "if target not in wanted or tuple(wanted[target].shape) != shape:", "if False:", SETTINGS,
        "config_values or config_bits",
    ),
    "no weight is missing": Guard(f"{ENGINE}.skeleton", "    if missing:", "    if False:", WEIGHTS, "missing_tensor"),
    "files are checked after each read": Guard(
        f"{ENGINE}.reader", "if FileState.of(os.stat(path)) != self._states[path]:", "if False:", MEANWHILE, "rewritten"
    ),
    "the time of the last change is checked, too": Guard(
        f"{ENGINE}.checkpoint", "stat.st_ctime_ns, stat.st_ino", "0, stat.st_ino", MEANWHILE, "rewritten_in_secret"
    ),
    "a short read is no read": Guard(
        f"{ENGINE}.reader", 'raise changed(path, "was truncated")', "continue", MEANWHILE, "truncated"
    ),
    "sizes are those of a language model": Guard(
        "airllm_nb.compat.wellformed", "if name in raw and not (", "if False and not (", SETTINGS, "config_needs_much_memory"
    ),
    "no encoder where there is none": Guard(
        f"{ENGINE}.meta", 'if getattr(model.config, "is_encoder_decoder", False):', "if False:", SETTINGS, "config_additions"
    ),
    "no code of the checkpoint's configuration": Guard(
        "airllm_nb.compat.config", "AutoConfig.from_pretrained(folder, trust_remote_code=False)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)", SETTINGS, "code",
    ),
    "no code of the checkpoint's tokenizer": Guard(
        "airllm_nb.compat.tokenizer", "trust_remote_code=trust_remote_code, **words", "trust_remote_code=True, **words", SETTINGS,
        "code",
    ),
    "a chat template is one": Guard(
        "airllm_nb.compat.tokenizer", "if not (template is None or", "if False and not (template is None or", SETTINGS,
        "tokenizer_config",
    ),
    "a chat template may fail in any way": Guard(
        "airllm_nb.engine.prompts", "except Exception as error:", "except KeyError as error:", SETTINGS, "chat_templates"
    ),
    "an aborted pass leaves no layer attached": Guard(
        f"{ENGINE}.runtime", "if self.stream is not None and self.stream.in_use:", "if False:", INTERRUPTED, "compute and none"
    ),
    "an error shows no control characters": Guard(
        "airllm_nb.errors", "cause = _readable(cause)", "pass", SETTINGS, "chat_templates"
    ),
}  # fmt: skip


def disable_as_asked() -> None:
    """Take away the guard that the environment names, in this process: its module is loaded with the other line."""
    if not (name := os.environ.get(VARIABLE)):
        return
    guard = GUARDS[name]
    spec = importlib.util.find_spec(guard.module)
    source = Path(spec.origin).read_text()
    assert source.count(guard.line) == 1, f"{guard.module} does not have once: {guard.line}"
    loaded = sys.modules[guard.module] = importlib.util.module_from_spec(spec)
    parent, _, leaf = guard.module.rpartition(".")
    setattr(sys.modules[parent], leaf, loaded)
    exec(compile(source.replace(guard.line, guard.without), spec.origin, "exec"), loaded.__dict__)
