"""What can stand on a line with %airllm or %%airllm: the parsers, and the help that is made from them."""

from __future__ import annotations

import argparse
import functools
import keyword
import re
import shlex
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core.error import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLES = """\
Examples
--------
    %airllm load demo
    %airllm load HuggingFaceTB/SmolLM2-135M-Instruct --device cpu --memory 400MB

    %airllm map questions --results answers.jsonl -o answers

    %%airllm --max-new-tokens 64 -o answer
    What is the capital of France?

    %%airllm --temperature 0.7 --seed 1 --system "You are {who}." --stop "\\n\\n"
    Write a verse about layers.

The prompt is taken as it is: { } and $ mean nothing in it. In the line, {name} is replaced by that variable.
The last answer is always in `_airllm`: its text, ids, time, and what each layer did.
`%config AirLLMMagics` shows the defaults of device, dtype, memory and display, and sets them."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line in a notebook, and never leave the session."""

    def __init__(self, prog: str, description: str, usage: str | None = None) -> None:
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=30)
        super().__init__(
            prog, usage=usage, description=description, add_help=False, allow_abbrev=False, formatter_class=formatter
        )
        self.color = False  # Python 3.14 colours help, which docstrings and notebooks cannot show
        self.words: list[str] = []  # option strings, for completion

    def option(self, *names: str, **settings: Any) -> None:
        """Add an option."""
        self.words.append(names[-1])
        self.add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what IPython shows as one line."""
        if "expected one argument" in message:
            message += ", as in --memory=4GB or --stop=--"
        raise UsageError(f"{self.prog}: {message} (%airllm? shows how it is used)")


def _model_parser(verb: str, description: str, **model: Any) -> Parser:
    parser = Parser(f"%airllm {verb}", description)
    parser.add_argument("model", metavar="MODEL", **model, help='hub id such as "org/name", local folder, or "demo"')
    parser.option("--device", help="auto, cpu, cuda, cuda:0, mps, xpu (%%airllm devices shows which can be used)")
    parser.option("--dtype", help="auto, float32, bfloat16, float16")
    parser.option("--memory", metavar="SIZE", help='budget for weights, such as 4GB or 800MB; "auto" takes what is free')
    parser.option("--shared", action="store_const", const=True, default=False,
                  help="map the weights from files that you cannot change: one copy for all kernels that do (CPU)")  # fmt: skip
    parser.option("--shared-insist", dest="shared", action="store_const", const="insist",
                  help="the same where you could change them: rewriting one changes the model, or kills the kernel")  # fmt: skip
    parser.option("--revision", help="branch, tag or commit on the hub")
    parser.option("--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint")
    return parser


def _cell_parser() -> Parser:
    usage = "%%%%airllm [options]\n       prompt, as many lines as it needs"
    parser = Parser("%%airllm", "Run the loaded model on the cell; the text is written as it comes.", usage)
    _sampling_options(parser)
    parser.option("--lens", action="store_true",
                  help="then show what each layer would have said: one more pass; it leaves `_airllm_trace`")  # fmt: skip
    return parser


def _map_parser() -> Parser:
    parser = Parser("%airllm map", "Answer many prompts: each pass over the layers serves a whole batch of them.")
    parser.add_argument("prompts", metavar="PROMPTS", help="a variable (a list, or a column such as df.question), or a file: a "
                        "prompt on each line, in a .jsonl file as JSON")  # fmt: skip
    parser.option(
        "--results", metavar="FILE", help="append each batch's answers to this file; the same line again goes on from it"
    )
    parser.option(
        "--batch", metavar="N", type=_batch, default="auto", help='most prompts at once; "auto" by the memory that is left'
    )
    _sampling_options(parser)
    return parser


def _sampling_options(parser: Parser) -> None:
    """Add what says how to answer, and where to put it."""
    parser.option("--max-new-tokens", type=int, default=256, metavar="N", help="longest text, in tokens (256)")
    parser.option("--temperature", type=float, default=0.0, metavar="T",
                  help="0: the most likely token every time (the default); above 0: sample")  # fmt: skip
    parser.option("--top-p", type=float, metavar="P", help="sample from the likeliest tokens with this share together")
    parser.option("--seed", type=int, metavar="N", help="make sampling repeatable")
    parser.option("--system", metavar="TEXT", help="system prompt, for the chat template")
    parser.option("--raw", action="store_true", help="no chat template: the model continues the text")
    parser.option("--stop", action="append", default=[], metavar="TEXT", type=_unescape,
                  help=r"end before this text; may be given again; \n and \t mean line break and tab; --stop=TEXT takes "
                  "any text, such as one that begins with -")  # fmt: skip
    parser.option("-o", "--output", metavar="NAME", type=_identifier, help="put the answer into this variable")


def _cache_parser() -> Parser:
    parser = Parser("%airllm cache", "Show what was written to this machine's disk: quantized layers, GGUF configs, the demo.")
    parser.option("--clear", metavar="NAME", nargs="?", const="", default=None,
                  help="remove what has NAME in its name from the disk; without NAME, all of it")  # fmt: skip
    return parser


def _bench_parser() -> Parser:
    parser = Parser("%airllm bench", "Measure this machine, beside transformers and other peers: minutes to an hour.")
    parser.add_argument("rows", metavar="ROW", nargs="*", help="a letter of the table, such as a or c; all if none is named")
    parser.option("--shape", help="tiny, 1b or 3b for all rows, instead of each row's own")
    parser.option("--root", metavar="FOLDER", help="where the checkpoints are made, up to 22 GB, and found again")
    parser.option("--tokens", metavar="N", help="tokens that count, of each run (5)")
    parser.option("--peers", metavar="PYTHON", help="the Python that has llama-cpp-python, accelerate and airllm")
    parser.option("--json", metavar="FILE", help="also write what was found into this file")
    return parser


def _unescape(text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _batch(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 1 up")
    return text if text == "auto" else int(text)


def _identifier(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a variable")
    return text


VERBS: dict[str, Parser] = {
    "load": _model_parser("load", "Load a model; the one that is loaded is freed first."),
    "continue": Parser("%airllm continue", "Go on with the last text, if it was stopped or cut by --max-new-tokens."),
    "map": _map_parser(),
    "unload": Parser("%airllm unload", "Free the model and its memory."),
    "status": Parser("%airllm status", "Show the loaded model, where it computes and why, and which layers stay in memory."),
    "devices": Parser("%airllm devices", "Show the devices of this machine; where one cannot be used, why."),
    "plan": _model_parser(
        "plan",
        "Show what loading a model would mean, from headers alone: no weight is downloaded. Seconds per token come from a short "
        "probe that reads some of what is here. Takes the same options.",
    ),
    "doctor": _model_parser("doctor", "Tell whether models, or this one, can run here; most of the same options.", nargs="?"),
    "cache": _cache_parser(),
    "bench": _bench_parser(),
}
for _verb in ("load", "plan"):
    VERBS[_verb].option("--quantize", metavar="BITS", help="int8 or int4: the layers' weights in so many bits; less memory, and "
                        "faster on a CPU, but other numbers (int4-32: in groups of 32; int4-gptq: better rounded, which takes "
                        "long, once; int4+head: the head in 8)")  # fmt: skip
    VERBS[_verb].option("--kernels", choices=("exact", "measured"), default="exact",
                        help="measured: one row by this CPU's fastest kernel; last bits are not transformers' own")  # fmt: skip
WORDS = {"load": " MODEL", "map": " PROMPTS", "plan": " MODEL", "doctor": " [MODEL]", "bench": " [ROW ...]"}
CELL = _cell_parser()

SUMMARY = "Run a language model layer by layer; it need not fit in memory.\n\n" + "\n".join(
    f"    {parser.prog + WORDS.get(name, ''):25}{parser.description}" for name, parser in [*VERBS.items(), ("", CELL)]
)
HELP = "\n\n".join(
    [
        SUMMARY,
        *(parser.format_help().strip() for parser in (VERBS["load"], VERBS["map"], CELL)),
        EXAMPLES,
    ]
)


def split(line: str, names: Mapping[str, Any]) -> list[str]:
    """Split a line at spaces, but not within quotes, and put in the variables that it names.

    Backslashes stay (as in Windows paths), a variable's value is one word, and braces around anything else stay.
    """
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split = True
    lexer.escape = lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:
        raise UsageError(f"%airllm: a quotation mark is not closed in: {line.strip()}") from None
    return [re.sub(r"\{(\w+)\}", lambda found: str(names.get(found[1], found[0])), word) for word in words]
