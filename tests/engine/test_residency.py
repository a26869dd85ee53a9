import pytest

from airllm_nb.engine.residency import decide
from airllm_nb.errors import MemoryBudgetError

SIZES = [10] * 30


@pytest.mark.parametrize("budget", range(120, 420, 7))
def test_as_many_as_fit_stay_and_the_budget_holds(budget):
    decision = decide(100, SIZES, budget)
    used = 100 + 10 * sum(decision.resident) + sum(decision.window)
    assert used <= budget
    if all(decision.resident):
        assert decision.window == ()
        assert budget >= 400
    else:
        assert decision.window == (10, 10)
        assert used + 10 > budget  # not one more


def test_the_least_is_what_stays_and_the_two_largest_layers():
    sizes = [10, 50, 10, 30, 10]
    assert decide(100, sizes, 180).least == 180
    assert decide(100, sizes, 180).window == (30, 50)
    assert not any(decide(100, sizes, 180).resident)
    with pytest.raises(MemoryBudgetError, match="at least 180 B"):
        decide(100, sizes, 179)


@pytest.mark.parametrize("budget", range(120, 450, 7))
def test_an_embedding_that_can_be_read_by_rows_stays_only_if_everything_does(budget):
    decision, without = decide(100, SIZES, budget, embedding=40), decide(100, SIZES, budget)
    assert decision.by_rows == (budget < 440)
    assert (decision.resident, decision.window, decision.least) == (without.resident, without.window, without.least)
    assert not without.by_rows


@pytest.mark.parametrize("stay", range(1, 28))
def test_those_that_stay_are_spread_evenly(stay):
    """From one layer that streams to the next, also over the end of a token: two distances at most, that differ by one."""
    resident = decide(100, SIZES, 120 + 10 * stay).resident
    assert sum(resident) == stay
    streamed = [index for index, stays in enumerate(resident) if not stays]
    distances = {(after - before) % 30 or 30 for before, after in zip(streamed, streamed[1:] + streamed[:1], strict=True)}
    assert max(distances) - min(distances) <= 1


def test_what_is_left_is_used_where_layers_differ():
    assert decide(0, [50, 50, 50, 10, 50], 110).resident == (False, False, False, True, False)


def test_one_layer():
    assert decide(5, [10], 15).resident == (True,)


def test_uneven_layers_always_fit_their_window():
    sizes = [100, *[10] * 20]
    for budget in range(decide(0, sizes, 10**9).least, 310, 5):
        decision = decide(0, sizes, budget)
        streamed = sorted(size for size, stays in zip(sizes, decision.resident, strict=True) if not stays)
        assert tuple(streamed[-2:]) == decision.window
