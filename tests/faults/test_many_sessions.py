"""Sessions one after the other and several at once, models in turn, the extension loaded anew: nothing of them stays."""

import threading

import pytest
from counting import LINUX, Held, assert_same
from tiny import budgets

from airllm_nb import plan
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session

LOAD = {"device": "cpu", "dtype": "float32"}
PROMPT = "What is this?"

pytestmark = LINUX


def answer(session, folder, keep):
    session.load(str(folder), memory=budgets(plan(folder, **LOAD, memory="1TB"))[keep], **LOAD)
    return session.ask(PROMPT, max_new_tokens=4, temperature=0).text


def one(folder, keep):
    session = Session(SilentRenderer, lambda _: None)
    try:
        return answer(session, folder, keep)
    finally:
        session.unload()


@pytest.fixture
def large(checkpoint):
    """A checkpoint of 12 MB in float32, so that it is seen if it stays each time."""
    return checkpoint("llama", tokenizer=True, hidden_size=256, intermediate_size=704, shards="2MB")


def test_30_sessions_one_after_another(large):
    expected = [one(large, keep) for keep in ("all", "half", "none")]
    assert len({*expected}) == 1
    before = Held.now()
    for number in range(30):
        assert one(large, ("all", "half", "none")[number % 3]) == expected[0]
    assert_same(before)


def test_4_sessions_at_once(large):
    expected = one(large, "none")
    found = []

    def several():
        found.extend(one(large, keep) for keep in ("none", "half"))

    def at_once():
        threads = [threading.Thread(target=several) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    at_once()
    before = Held.now()
    at_once()
    assert found == [expected] * 16
    assert_same(before)


def test_two_models_in_turn(large, checkpoint):
    other = checkpoint("gpt2", tokenizer=True)
    session = Session(SilentRenderer, lambda _: None)
    first = [answer(session, folder, "half") for folder in (large, other)]
    before = Held.now()
    for _ in range(5):
        assert [answer(session, folder, "half") for folder in (large, other)] == first
    assert_same(before)
    session.unload()


def test_load_unload_load(large):
    session = Session(SilentRenderer, lambda _: None)
    expected = answer(session, large, "half")
    session.unload()
    before = Held.now()
    for _ in range(5):
        assert answer(session, large, "half") == expected
        session.unload()
        assert_same(before)


def test_reloading_the_extension(large):
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    ip = InteractiveShell(config=Config(HistoryManager={"enabled": False}))

    def run(cell):
        assert ip.run_cell(cell).success, cell

    def round_(begin):
        run(begin)
        run(f"%airllm load {large} --device cpu --dtype float32")
        run(f"%%airllm --max-new-tokens 4 -o answer\n{PROMPT}")
        return ip.user_ns["answer"].text

    expected = round_("%load_ext airllm_nb")
    round_("%reload_ext airllm_nb")
    before = Held.now()
    for _ in range(5):
        assert round_("%reload_ext airllm_nb") == expected
    assert_same(before)
    run("%unload_ext airllm_nb")
