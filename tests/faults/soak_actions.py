"""What else a person may do in a session: see inside, answer many prompts, hurt files, use the panel, and so on.

Each takes the `Person`; after each the answers are transformers' own.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import meanwhile
import torch
from soak_person import LENGTHS, PROMPTS, Asked, Late, Person
from waiting import wait_for

from airllm_nb.engine import memory, pressure
from airllm_nb.errors import AirLLMError
from airllm_nb.notebook.panel import Panel
from airllm_nb.notebook.summary import Interrupted

MANY = 10**15
PATIENCE = 120
ACTIONS: list[Callable[[Person], None]] = [Person.ask] * 4 + [Person.chat] * 4 + [Person.proceed] * 4 + [Person.load] * 2


def action(function: Callable[[Person], None]) -> Callable[[Person], None]:
    ACTIONS.append(function)
    return function


@action
def unload(person):
    person.cell("%airllm unload")
    person.look()
    person.asked = None
    assert person.model is None
    person.did["unloads"] += 1


@action
def begin_anew(person):
    person.forget()


@action
def reload_extension(person):
    person.cell("%reload_ext airllm_nb")
    person.look()
    person.asked = None
    assert person.model is None
    person.did["extensions loaded anew"] += 1


@action
def trace(person):
    person.ask(stop=False)
    ids = (*person.model.tokenizer("exactly this")["input_ids"],)
    with contextlib.suppress(Interrupted, Late):
        if person.rng.random() < 0.5:
            found = person.pressing_stop("trace", lambda: person.session.trace(last=5))
        else:
            found = person.pressing_stop("trace", lambda: person.session.model.trace(ids, heads=[(1, 0)], top_k=2))
        if person.dtype == "float32":
            likeliest = person.model.logits(found.ids, person.dtype)[0].argmax(-1)
            assert torch.equal(found.top_ids[-1, :, 0], likeliest[found.first :]), "the lens saw something else"
        person.did["traces"] += 1


@action
def answer_many(person):
    """Until all are there, however often it is stopped."""
    if person.dtype != "float32":
        return
    path = person.folder / "answers.jsonl"
    prompts = [person.rng.choice(PROMPTS) for _ in range(6)]
    most, batch = person.rng.choice(LENGTHS), person.rng.choice([1, 2, 4])
    answers = None
    while answers is None:
        with contextlib.suppress(Interrupted, Late):
            answers = person.pressing_stop(
                "map", lambda: person.session.map(prompts, results=path, max_new_tokens=most, batch=batch)
            )
    expected = [person.model.text(person.model.ids((prompt,), "float32", None)[:most]) for prompt in prompts]
    assert list(answers) == expected, f"{list(answers)} instead of {expected}"
    path.unlink()
    person.did["maps"] += 1


@action
def tap(person):
    """A function between the layers that looks, hands on a copy, or fails."""
    kind, left = person.rng.choice(["looks", "copies", "fails"]), person.rng.randrange(1, 9)

    def function(_layer, hidden):
        nonlocal left
        left -= 1
        if kind == "fails" and left == 0:
            raise ZeroDivisionError
        return hidden.clone() if kind == "copies" else None

    with person.session.model.on_layer(function):
        try:
            person.ask(cell=False)  # of a cell's error, IPython would keep the traceback and all that is in it
        except ZeroDivisionError:
            person.asked = None
            assert kind == "fails"
    person.did["taps"] += 1
    person.ask()


@action
def too_little_memory(person):
    reference = person.rng.choice(person.references)
    least = person.budget(reference, "float32", "none")
    with person.refusal("MemoryBudgetError"):
        person.session.load(str(reference.folder), device="cpu", dtype="float32", memory=least - 1)
    person.ask()  # the one before stays


@action
def memory_becomes_short(person):
    missing = [person.session.model.layers[0].nbytes * person.rng.randint(1, 3)]

    def limits(**_):
        return {"memory": MANY - (missing.pop() if missing else 0)}

    with contextlib.ExitStack() as short:
        short.enter_context(mock.patch.object(memory, "limits", limits))
        for name, value in (("ENOUGH", MANY), ("SHORT", MANY), ("INTERVAL", 0.0)):
            short.enter_context(mock.patch.object(pressure, name, value))
        person.ask()
    person.did["times that memory became short"] += 1


@action
def hurt_files(person):
    """While a copy of a checkpoint is loaded, or streams."""
    reference, kind = person.rng.choice(person.references), person.rng.choice(sorted(meanwhile.KINDS))
    place = person.folder / "hurt"
    folder = Path(shutil.copytree(reference.folder, place / "checkpoint"))
    memory = person.budget(reference, "float32", person.rng.choice(["half", "none"]))
    shards = sorted(folder.glob("*.safetensors"))
    chosen, seed = person.rng.sample(shards, person.rng.choice([1, len(shards)])), person.rng.random()
    moment = person.rng.random() * 0.3

    def hurt():
        rng = random.Random(seed)
        for path in chosen:
            with contextlib.suppress(FileNotFoundError):  # with its folder
                meanwhile.KINDS[kind](path, rng)

    timer = threading.Timer(moment, hurt)
    timer.start()
    try:
        person.session.load(str(folder), device="cpu", dtype="float32", memory=memory)
        person.model, person.dtype = reference, "float32"
        until = time.monotonic() + moment
        while time.monotonic() < until or timer.is_alive():
            person.ask(stop=False)
        for _ in range(2):
            person.ask(stop=False)
    except AirLLMError as error:
        person.clear(error)
        person.did["files hurt, and refused"] += 1
    else:
        person.did["files hurt, and right"] += 1
    finally:
        timer.join()
        person.session.unload()
        person.model = person.asked = None
        shutil.rmtree(place)


@action
def while_busy(person):
    """Two threads that ask at once: one is refused, or comes later."""
    asked = [Asked((prompt,), None, 8, False) for prompt in person.rng.sample(PROMPTS, 2)]
    made = []

    def ask(one):
        try:
            person.compare(person.session.ask(one.messages[0], max_new_tokens=one.most), one)
            made.append("answered")
        except AirLLMError as error:
            made.append(type(error).__name__)
        except BaseException as error:  # noqa: BLE001  # is told below, on the main thread
            made.append(repr(error))

    threads = [threading.Thread(target=ask, args=[one]) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    person.asked = None
    assert "answered" in made
    assert set(made) <= {"answered", "SessionError"}, made
    person.did["times that two asked at once"] += 1


@action
def bad_input(person):
    missing = person.folder / "no" / "model"
    with person.refusal("CheckpointError", "HubError"):
        person.session.load(str(missing))
    with person.refusal("PromptError"):
        person.session.ask(" ")
    with person.refusal("PromptError"):
        person.session.chat("x", temperature=-1.0)
    with person.refusal("PromptError"):
        person.session.ask("x" * 5000)
    path = person.folder / "others.jsonl"
    path.write_text('{"no": "result"}\n')
    with person.refusal("ResultsError"):
        person.session.map(PROMPTS, results=path)
    path.unlink()


@action
def look_around(person):
    for line in ("status", "devices", f'plan "{person.model.folder}"', f'doctor "{person.model.folder}"', ""):
        assert person.cell(f"%airllm {line}")


@action
def use_panel(person):
    """Load by it, ask, stop, go on; then close it, or leave it open for whatever comes."""
    published = []
    panel = Panel(person.session, {"device": "cpu", "dtype": "float32", "memory": "auto"}, published.append)

    def click(name):
        getattr(panel, f"{name}_button").click()
        if person.rng.random() < 0.3:
            time.sleep(person.rng.random() * 0.2)
            panel.stop_button.click()
        wait_for(lambda: not panel._working and panel.stop_button.disabled, PATIENCE)

    reference = person.rng.choice(person.references)
    panel.chooser.model.value = str(reference.folder)
    click("load")
    person.look()
    person.asked = None
    for prompt in person.rng.sample(PROMPTS, 2) if person.model is reference and person.dtype == "float32" else ():
        asked = Asked((*person.said(), prompt), None, 8, True)
        panel.chat.prompt.value, panel.chat.most.value = prompt, 8
        click("ask")
        while person.session.can_proceed_in_conversation and len(person.session.answer.token_ids) < 16:
            click("proceed")
        if len(person.said()) == len(asked.messages) + 1:
            person.compare(person.session.answer, asked)
            assert person.said() == (*asked.messages, person.session.answer.text)
            person.did["texts in the panel"] += 1
    if person.session.loaded and person.rng.random() < 0.5:
        click("forget")
    if person.session.loaded and person.rng.random() < 0.3:
        panel.unload_button.click()
        person.look()
    if person.rng.random() < 0.7:
        panel.close()
    assert all(answer.text is not None for answer in published)
    person.did["panels"] += 1
