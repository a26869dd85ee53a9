"""Experts that are read when they are hit: the same answers, only those bytes, and whatever goes wrong leaves a usable model."""

import gc
import os
import signal
import threading
import time
import weakref

import pytest
import torch
import transformers
from tiny import SHAPE, budgets, make_checkpoint
from waiting import wait_for

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.engine.expert_stacks import ExpertStack, slots
from airllm_nb.engine.experts import AHEAD, ExpertStore
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.residency import decide, decide_with_experts
from airllm_nb.errors import AirLLMError, CheckpointError, MemoryBudgetError, UnsupportedError

pytestmark = pytest.mark.skipif(versions.installed() < (5,), reason="transformers 4 has a module for each expert")

LONG = {"max_position_embeddings": 128}
KINDS = {
    "mixtral": SHAPE | LONG | {"model_type": "mixtral", "num_local_experts": 8},
    "qwen3_moe": SHAPE | LONG | {
        "model_type": "qwen3_moe", "head_dim": 24, "norm_topk_prob": True, "num_experts": 16, "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
    },
    "gpt_oss": SHAPE | LONG | {"model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": SHAPE | LONG | {
        "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
    },
}  # fmt: skip
ONE = torch.tensor([[42]])
PROMPT = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(5))
BATCH = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(6))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Return a function that gives the folder of a tiny mixture of experts."""
    made = {}

    def get(kind="mixtral"):
        if kind not in made:
            made[kind] = make_checkpoint(tmp_path_factory.mktemp(kind), raw=KINDS[kind])
        return made[kind]

    return get


def load(folder, keep="none", dtype="float32"):
    memory = budgets(plan(folder, device="cpu", dtype=dtype))[keep]
    return LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory)


def reference(folder, dtype="float32", **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **options).eval()


def store_of(model):
    return next(stream for stream in model._streams if isinstance(stream, ExpertStore))


def greedy(model, ids):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=257)


def hits(model, ids):
    """Return which experts each module of transformers' own model is asked for."""
    found, hooks = {}, []
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: found.update({path: set((*args, *kwargs.values())[1].flatten().tolist())}),
                    with_kwargs=True,
                )
            )
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


class Watched:
    """Counts what is read."""

    def __init__(self, monkeypatch):
        self.reads = []
        read = Reader.read

        def counted(reader, path, offset, into, *, keep_cached):
            self.reads.append((path, offset, len(into)))
            return read(reader, path, offset, into, keep_cached=keep_cached)

        monkeypatch.setattr(Reader, "read", counted)


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_what_transformers_gives(mixture, kind, dtype, keep):
    folder = mixture(kind)
    expected = reference(folder, dtype)
    with load(folder, keep, dtype) as model:
        assert (model.plan.experts is None) == (keep == "all")
        for implementation in (None, "eager", "batched_mm"):
            if implementation is not None:
                expected.set_experts_implementation(implementation)
                model.set_experts_implementation(implementation)
            for ids in (ONE, PROMPT, BATCH, PROMPT):
                with torch.no_grad():
                    assert torch.equal(model(ids).logits, expected(ids).logits), implementation
        expected.set_experts_implementation("grouped_mm")
        model.set_experts_implementation("grouped_mm")
        assert torch.equal(greedy(model, BATCH), greedy(expected, BATCH))


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_reads_only_the_experts_it_hits(mixture, kind, monkeypatch):
    folder = mixture(kind)
    asked = hits(reference(folder), ONE)
    with load(folder, "half") as model:
        store = store_of(model)
        watched = Watched(monkeypatch)
        model(ONE)
        wanted = {
            (entry.file, entry.offset, entry.nbytes)
            for stack in store.stacks
            for expert in asked[stack.name.rpartition(".")[0]]
            for entry in stack.sources[expert]
        }
        rows = watched.reads[:1]  # of the embedding
        assert sorted(watched.reads) == sorted([*rows, *wanted])
        assert 0 < len(wanted) < sum(len(part) for stack in store.stacks for part in stack.sources) / 2
        read = len(watched.reads)
        model(ONE)
        assert len(watched.reads) < 2 * read  # some of them stayed
        assert store.hits > 0


@pytest.mark.parametrize("keep", ["half", "none"])
def test_a_prompt_reads_each_expert_once(mixture, monkeypatch, keep):
    folder = mixture("qwen3_moe")
    asked = hits(reference(folder), PROMPT)
    assert all(len(experts) > 8 for experts in asked.values())  # of 16
    with load(folder, keep) as model:
        stacks = store_of(model).stacks
        of_experts = {(entry.file, entry.offset) for stack in stacks for part in stack.sources for entry in part}
        watched = Watched(monkeypatch)
        model(PROMPT)
        reads = [(path, offset) for path, offset, _ in watched.reads if (path, offset) in of_experts]
        assert len(reads) == len(set(reads)) == sum(3 * len(experts) for experts in asked.values())


@pytest.mark.parametrize("keep", ["half", "none"])
def test_the_budget_is_kept_and_closing_frees_everything(mixture, keep):
    folder = mixture("qwen3_moe")
    model = load(folder, keep)
    store = store_of(model)
    for ids in (BATCH, ONE, PROMPT):
        model(ids)
        held = [*(buffer for buffer, _ in store._held.values()), *(buffer for free in store._free.values() for buffer in free)]
        assert 0 < sum(buffer.nbytes for buffer in held) <= model.plan.experts.used_nbytes
        assert model.plan.used_nbytes <= model.plan.budget
        assert all(parameter.is_meta for name, parameter in model.named_parameters() if ".experts." in name)
    buffers = [weakref.ref(buffer) for buffer, _ in store._held.values()]
    threads = list(store._threads)
    del held
    model.close()
    assert not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert all(buffer() is None for buffer in buffers)
    with pytest.raises(AirLLMError, match="unloaded"):
        model(ONE)


def test_a_forgotten_model_goes(mixture):
    threads = threading.active_count()
    model = load(mixture())
    model(ONE)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    wait_for(lambda: threading.active_count() == threads)


def test_a_disk_that_fails_in_the_middle_of_an_expert(mixture, monkeypatch):
    folder = mixture()
    expected = reference(folder)
    with load(folder) as model:
        experts = {entry.offset for stack in store_of(model).stacks for part in stack.sources for entry in part}
        read, left = os.preadv, [0]

        def failing(descriptor, buffers, offset, *flags):
            if offset in experts:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(5, "Input/output error")
            return read(descriptor, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", failing)
        for count in (1, 2, 5, 9):
            left[0] = count
            with pytest.raises(CheckpointError, match="Input/output error"):
                for _ in range(9):
                    model(BATCH)
            left[0] = 0
            assert torch.equal(model(BATCH).logits, expected(BATCH).logits)


def test_files_hurt_after_loading(tmp_path):
    folder = make_checkpoint(tmp_path / "hurt", raw=KINDS["mixtral"])
    with load(folder, "half") as model:
        stack = store_of(model).stacks[-1]
        file = stack.sources[0][0].file
        model(ONE)
        with file.open("r+b") as opened:
            opened.truncate(stack.sources[0][0].offset + 10)
        with pytest.raises(CheckpointError, match="truncated|rewritten"):
            model(BATCH)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("keep", ["half", "none"])
def test_interrupts_at_random_moments(mixture, keep):
    with load(mixture(), keep) as model:
        expected = greedy(model, BATCH)
        begin = time.perf_counter()
        greedy(model, BATCH)
        whole = time.perf_counter() - begin
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        interrupted = 0
        try:
            for step in range(60):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-4 + whole * step / 60)
                    greedy(model, BATCH)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    time.sleep(0)
                except KeyboardInterrupt:
                    interrupted += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if step % 5 == 0:
                    assert torch.equal(greedy(model, BATCH), expected)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert interrupted > 20
        assert torch.equal(greedy(model, BATCH), expected)


def test_whatever_else_is_asked_of_a_stack_is_refused(mixture):
    with load(mixture()) as model:
        stack = model.model.layers[1].mlp.experts.down_proj
        rows = torch.randn(3, stack.shape[2])
        original = reference(mixture()).model.layers[1].mlp.experts.down_proj.detach()
        assert (stack.shape, stack.device.type, stack.dtype) == (original.shape, "cpu", torch.float32)
        assert torch.equal(stack[3], original[3])
        assert torch.equal(stack[-1], original[-1])
        assert torch.equal(stack[torch.tensor(5)], original[5])
        assert torch.equal(stack[torch.tensor([5, 0, 5])], original[[5, 0, 5]])
        for use in (
            stack.sum, lambda: stack[0:2], lambda: stack[:, 0], lambda: stack + 1, lambda: rows @ stack,
            lambda: torch.stack([rows, stack]), lambda: stack.mul_(2), lambda: stack.transpose(0, 1), lambda: stack[stack > 0],
        ):  # fmt: skip
            with pytest.raises(UnsupportedError, match="outside of the layer"):
                use()
        with pytest.raises(IndexError, match="8 experts"):
            stack[8]


def test_the_plan_says_what_is_read(mixture):
    folder = mixture("qwen3_moe")
    sizes = budgets(plan(folder, device="cpu", dtype="float32"))
    text = {keep: str(plan(folder, device="cpu", dtype="float32", memory=memory)) for keep, memory in sizes.items()}
    assert "experts" not in text["all"]
    assert "experts   30.7 kB each, read when hit: 3 of 16 in a layer per token;" in text["none"]
    assert "per token only experts read from disk, those that are not in memory" in text["half"]
    assert " kB read from disk, and experts" in text["none"]
    with pytest.raises(MemoryBudgetError, match="at least"):
        plan(folder, device="cpu", dtype="float32", memory=sizes["none"] - 1)


def test_layers_come_before_experts():
    layers, lean = [100] * 10, [20] * 10
    for budget in range(100, 1050, 10):
        decision = decide_with_experts(50, layers, lean, 10, budget)
        used = 50 + 20 * sum(decision.resident) + sum(decision.window) + decision.experts
        assert used == budget
        assert decision.least == 100
        assert decision.experts >= 10
        assert all(decision.resident) or decision.experts < 10 + 20
    assert decide_with_experts(50, layers, lean, 10, 1050).experts == 0
    with pytest.raises(MemoryBudgetError):
        decide_with_experts(50, layers, lean, 10, 99)
    for budget in (70, 80, 250):  # whole layers need no more than a few experts: as without experts
        assert decide_with_experts(50, [10] * 20, [9] * 20, 50, budget) == decide(50, [10] * 20, budget)


# The store on its own


def make_store(read, layers=4, experts=8, room=16):
    stacks = [ExpertStack(str(n), torch.uint8, (64,), 0, (), ((),) * experts, None) for n in range(layers)]
    store = ExpertStore(stacks, {64: room}, read, lambda: 0.0)
    store.start()
    return store


def fill(stack, expert, into):
    into.fill_(10 * int(stack.name) + expert)


def visit(store, number, experts):
    return {expert: int(matrix[0]) for expert, matrix in store.visit(number, experts)}


@pytest.mark.parametrize("room", [2, 3, 4, 6])
def test_what_the_next_stack_wants_gives_way(room):
    """Two stacks of one size: those of the second that stayed must not fill the room that the first one needs."""
    stacks = [ExpertStack(str(n), torch.uint8, (64,), 0, (), ((),) * 8, 1 if n == 0 else None) for n in range(2)]
    store = ExpertStore(stacks, {64: room}, fill, lambda: 0.0)
    store.start()
    try:
        generator = torch.Generator().manual_seed(room)
        for _ in range(50):
            experts = torch.randperm(8, generator=generator)[:3].tolist()
            for number in (1, 0, 1) if torch.rand((), generator=generator) < 0.5 else (0, 1):
                assert visit(store, number, experts) == {expert: 10 * number + expert for expert in experts}
    finally:
        store.close()


@pytest.mark.parametrize("room", [2, 3, 16, 32])
def test_every_matrix_is_its_own(room):
    store = make_store(fill, room=room)
    generator = torch.Generator().manual_seed(room)
    for _ in range(100):
        for number in torch.randint(0, 4, (4,), generator=generator).tolist():
            experts = torch.randperm(8, generator=generator)[: 1 + number].tolist()
            assert visit(store, number, experts) == {expert: 10 * number + expert for expert in experts}
            assert len(store._held) + len(store._reading) <= room
    store.close()


def test_the_popular_stay():
    store = make_store(fill, room=6)
    for other in (*range(1, 8), *range(1, 8)):
        for number in range(4):
            visit(store, number, [0, other])
    store.hits = store.misses = 0
    for number in range(4):
        visit(store, number, [0])
    assert (store.hits, store.misses) == (4, 0)
    for _ in range(40):  # another conversation, of which others are popular
        for number in range(4):
            visit(store, number, [7])
    store.hits = store.misses = 0
    for number in range(4):
        visit(store, number, [7])
    assert (store.hits, store.misses) == (4, 0)
    store.close()


def test_what_does_not_fit_is_not_read_again_as_a_whole():
    store = make_store(fill, room=16)  # of 32
    for _ in range(3):
        for number in range(4):
            visit(store, number, range(8))
    store.hits = store.misses = 0
    for number in range(4):
        visit(store, number, range(8))
    assert store.hits >= 16 - 2 - AHEAD
    store.close()


def test_a_failure_is_raised_where_the_expert_is_needed_and_tried_again():
    broken = {3}

    def read(stack, expert, into):
        if expert in broken:
            raise OSError(f"expert {expert}")
        fill(stack, expert, into)

    store = make_store(read, room=4)
    for _ in range(5):
        with pytest.raises(OSError, match="expert 3"):
            visit(store, 0, range(8))
        assert visit(store, 0, [0, 1, 2]) == {0: 0, 1: 1, 2: 2}
    broken.clear()
    assert len(visit(store, 0, range(8))) == 8
    store.close()


def test_memory_that_is_missing_is_told_and_tried_again(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("can't allocate memory")

    store = make_store(fill, room=4)
    with monkeypatch.context() as short:
        short.setattr(torch, "empty", missing)
        for _ in range(5):
            with pytest.raises(RuntimeError, match="allocate"):
                visit(store, 0, range(8))
    assert len(visit(store, 0, range(8))) == 8
    wait_for(lambda: not store._reading)
    assert len(store._held) == 4
    store.close()


def test_close_wakes_whoever_waits():
    gate = threading.Event()
    store = make_store(lambda *_: gate.wait(20))
    raised = []

    def wait():
        try:
            visit(store, 0, [1])
        except AirLLMError as error:
            raised.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    closer = threading.Thread(target=store.close)
    closer.start()
    waiter.join(20)
    gate.set()
    closer.join(20)
    assert "unloaded" in raised[0]


def test_all_sizes_get_the_same_share(mixture):
    model = load(mixture("qwen3_moe"))
    stacks = store_of(model).stacks
    few, total = slots(stacks, 0), slots(stacks, 10**9)
    assert set(few.values()) == {2}
    assert set(total.values()) == {4 * 16}
    for budget in range(10**4, 10**6, 50_000):
        counts = slots(stacks, budget)
        assert len(set(counts.values())) == 1
        assert counts == few or sum((size + 64) * count for size, count in counts.items()) <= budget
    model.close()
