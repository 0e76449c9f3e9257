"""The choice of a learning rate: a small grid that grows while its best rate lies on the edge.

Nothing here imports torch: what a rate is worth is asked of a callable.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: Rates that a grid grows by at most.
MOST_ADDED = 3
#: Digit -> its neighbour and the change of the exponent.
_UP = {"1": ("2", 0), "2": ("5", 0), "5": ("1", 1)}
_DOWN = {"5": ("2", 0), "2": ("1", 0), "1": ("5", -1)}


@dataclass(frozen=True)
class Score:
    """What one rate reached on the held-out samples.

    Attributes:
        lr: the rate.
        accuracy: after the last epoch, per tuning seed; 0 where the run diverged.
        loss: of the seeds that did not diverge.
    """

    lr: float
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracy)

    def as_dict(self) -> dict[str, Any]:
        """For ``compare.json``."""
        diverged = len(self.accuracy) - len(self.loss)
        return {
            "lr": self.lr,
            "accuracy": list(self.accuracy),
            "mean": self.mean,
            "diverged": diverged,
        }


@dataclass(frozen=True)
class Choice:
    """The chosen rate, all scores by ascending rate, and whether it is the first or the last."""

    lr: float
    scores: tuple[Score, ...]

    @property
    def edge(self) -> bool:
        return len(self.scores) > 1 and self.lr in (self.scores[0].lr, self.scores[-1].lr)


def choose(rates: Sequence[float], score: Callable[[float], Score], extend: bool) -> Choice:
    """The rate with the best mean accuracy; of equal ones that with the fewest diverged seeds, then
    that with the least loss, then the least.

    Args:
        rates: the first grid, ascending; of a single rate no score is asked.
        score: trains with a rate; called once for each.
        extend: add rates beyond the edge that the best one lies on, :data:`MOST_ADDED` at most.

    >>> chosen = choose([0.1, 0.2, 0.5], lambda lr: Score(lr, (1 / lr,), (1.0,)), extend=True)
    >>> chosen.lr, chosen.edge
    (0.01, True)
    """
    if len(rates) == 1:
        return Choice(rates[0], ())
    scores = [score(rate) for rate in rates]
    for _ in range(MOST_ADDED if extend else 0):
        best = _best(scores).lr
        if best == scores[0].lr:
            scores.insert(0, score(beyond(best, up=False)))
        elif best == scores[-1].lr:
            scores.append(score(beyond(best, up=True)))
        else:
            break
    return Choice(_best(scores).lr, tuple(scores))


def beyond(rate: float, *, up: bool) -> float:
    """The neighbour in 0.1, 0.2, 0.5, 1, 2, ..

    >>> beyond(0.5, up=True), beyond(0.5, up=False), beyond(1.0, up=False)
    (1.0, 0.2, 0.5)
    """
    digit, exponent = f"{rate:.0e}".split("e")
    other, carry = (_UP if up else _DOWN)[digit]
    return float(f"{other}e{int(exponent) + carry}")


def _best(scores: Sequence[Score]) -> Score:
    # More losses, fewer diverged seeds: a missing loss must not pass for a small one.
    return max(scores, key=lambda s: (s.mean, len(s.loss), -sum(s.loss), -s.lr))
