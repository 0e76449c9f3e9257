"""The choice of a learning rate: best mean, growth at the edge, what a diverged run is worth."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmatch.comparing.methods import rate
from backmatch.comparing.tuning import MOST_ADDED, Score, beyond, choose


def peak_at(best: float, asked: list[float] | None = None):  # type: ignore[no-untyped-def]
    def score(lr: float) -> Score:
        if asked is not None:
            asked.append(lr)
        return Score(lr, (1 / (1 + abs(math.log(lr / best))),), (1.0,))

    return score


def test_a_best_rate_inside_ends_the_search() -> None:
    asked: list[float] = []
    choice = choose([0.1, 0.2, 0.5], peak_at(0.2, asked), extend=True)
    assert (choice.lr, choice.edge) == (0.2, False)
    assert asked == [0.1, 0.2, 0.5]


@pytest.mark.parametrize(
    ("best", "tried"), [(1.0, [0.1, 0.2, 0.5, 1.0, 2.0]), (5.0, None), (0.01, None)]
)
def test_the_grid_grows_towards_the_best(best: float, tried: list[float] | None) -> None:
    choice = choose([0.1, 0.2, 0.5], peak_at(best), extend=True)
    assert choice.lr == best
    assert [score.lr for score in choice.scores] == sorted(score.lr for score in choice.scores)
    assert tried is None or [score.lr for score in choice.scores] == tried


def test_growth_has_an_end_and_the_edge_is_told() -> None:
    choice = choose([0.1, 0.2, 0.5], peak_at(1e6), extend=True)
    assert len(choice.scores) == 3 + MOST_ADDED
    assert (choice.lr, choice.edge) == (5.0, True)
    choice = choose([0.1, 0.2, 0.5], peak_at(1e6), extend=False)
    assert (choice.lr, choice.edge, len(choice.scores)) == (0.5, True, 3)


def test_a_single_rate_is_not_tried() -> None:
    choice = choose([0.7], peak_at(1.0, asked := []), extend=True)
    assert (choice.lr, choice.edge, choice.scores, asked) == (0.7, False, (), [])


def test_equal_accuracies_are_told_apart_by_loss_then_by_the_smaller_rate() -> None:
    losses = {0.1: 0.5, 0.3: 0.2, 1.0: 0.2}
    choice = choose(list(losses), lambda lr: Score(lr, (0.9, 0.9), (losses[lr],) * 2), False)
    assert choice.lr == 0.3


def test_a_diverged_seed_counts_as_zero() -> None:
    scores = {0.1: Score(0.1, (0.5, 0.5), (1.0, 1.0)), 0.3: Score(0.3, (0.9, 0.0), (0.1,))}
    choice = choose(list(scores), scores.__getitem__, False)
    assert choice.lr == 0.1
    assert [score.as_dict()["diverged"] for score in choice.scores] == [0, 1]


def test_where_all_diverge_smaller_rates_are_tried() -> None:
    choice = choose([0.1, 0.2], lambda lr: Score(lr, (0.0,), ()), extend=True)
    assert choice.lr == 0.01
    assert choice.edge


@given(st.integers(-12, 12))
def test_rates_follow_each_other(k: int) -> None:
    assert beyond(rate(k), up=True) == rate(k + 1)
    assert beyond(rate(k), up=False) == rate(k - 1)


def test_of_equal_accuracies_a_rate_that_diverged_is_not_chosen() -> None:
    worth = {0.1: Score(0.1, (0.0, 0.0), (3.0, 3.0)), 0.2: Score(0.2, (0.0, 0.0), ())}
    choice = choose([0.1, 0.2], worth.__getitem__, extend=False)
    assert choice.lr == 0.1
