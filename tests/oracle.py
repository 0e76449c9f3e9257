"""One sweep both ways: ``BackMatching`` against ``reference.sweep`` on named nets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Net

import backmatch as bm
from backmatch import reference

#: At damping 0 the pseudo-inverses of a whole chain multiply, and with them the rounding; the
#: reference cuts singular values of J, as does the direct route, so both agree to this.
TOLERANCE = 1e-8


def canonical(solver: Any) -> Any:
    """One name for all exact solvers, so that the reference runs once for them."""
    return bm.Cholesky(solver.damping) if isinstance(solver, (bm.Auto, bm.CG)) else solver


def deviation(got: Any, want: np.ndarray, scale: float) -> float:
    """Largest deviation over ``scale``."""
    assert tuple(got.shape) == want.shape
    return float(np.abs(got.detach().double().numpy() - want).max(initial=0.0)) / scale


def largest(arrays: Any) -> float:
    return max((float(np.abs(a).max(initial=0.0)) for a in arrays), default=0.0)


class Oracle:
    """The reference's answers on the nets that ``find`` names, each computed once."""

    def __init__(self, find: Callable[[str], Net]) -> None:
        self.find = find
        self.expected = functools.cache(self._expected)

    def _expected(
        self, name: str, weights: Any, inputs: Any, **options: Any
    ) -> tuple[Any, torch.Tensor]:
        """The reference's answer and the random state after it."""
        blocks, x, loss = self.find(name).make()
        result = reference.sweep(blocks, x, loss, weights=weights, inputs=inputs, **options)
        return result, torch.get_rng_state()

    def check(
        self, name: str, weights: Any, inputs: Any, tolerance: float = TOLERANCE, **options: Any
    ):
        """Run one net both ways and compare every tensor of every block."""
        result, state = self.expected(name, canonical(weights), canonical(inputs), **options)
        blocks, x, loss = self.find(name).make()
        step = bm.BackMatching(blocks, weights=weights, inputs=inputs, **options).backward(
            x, loss, keep=True
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert float(step.loss) == pytest.approx(result.loss, rel=1e-12)
        assert deviation(step.output, result.output, 1.0) < 1e-12
        # What an exact sequential step leaves is rounding, times pinv(J) of the blocks below: there
        # sizes count from the displacement at the top.
        least = 1e-1 if options.get("order") == "sequential" else 1e-6
        floor = least * largest(each.displacement for each in result.blocks) or 1.0
        for block, got, want in zip(blocks, step.blocks, result.blocks, strict=True):
            where = f"{name}: block {want.name} ({type(block).__name__})"
            size = max(largest([want.displacement]), floor)
            assert deviation(got.displacement, want.displacement, size) < tolerance, where
            assert got.weight_step.keys() == want.weight_step.keys(), where
            size = max(largest(want.weight_step.values()), floor)
            for parameter, value in want.weight_step.items():
                error = deviation(got.weight_step[parameter], value, size)
                assert error < tolerance, f"{where}: {parameter} off by {error:.1e}"
            for parameter, p in block.named_parameters():
                if p.requires_grad:
                    assert torch.equal(p.grad, -got.weight_step[parameter]), where
                else:
                    assert p.grad is None, where
            if want.input_step is None:
                assert got.input_step is None, where
            else:
                size = max(largest([want.input_step]), floor)
                error = deviation(got.input_step, want.input_step, size)
                assert error < tolerance, f"{where}: input step off by {error:.1e}"
