"""One exact step of VGG-13 with batch norm by conjugate gradient, beside back-propagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import nn

import backmatch as bm
from backmatch.bench.accuracy import relative_difference
from backmatch.bench.case import OURS, Case, Settings

RTOL = 1e-2
SHAPE, QUICK_SHAPE = (128, 3, 32, 32), (4, 3, 32, 32)


def cases(settings: Settings) -> Iterator[Case]:
    """VGG-13; a small batch in a quick run."""
    shape = QUICK_SHAPE if settings.quick else SHAPE
    yield case(settings, "vgg13_bn", bm.models.vgg13_bn, shape)


def case(
    settings: Settings, name: str, build: Callable[[], nn.Sequential], shape: tuple[int, ...]
) -> Case:
    """A net on random images; both sides by CG at :data:`RTOL`, default dampings."""
    generator = settings.generator(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build().to(settings.device)
    x = torch.randn(shape, generator=generator).to(settings.device)
    y = torch.randint(10, shape[:1], generator=generator).to(settings.device)
    matcher = bm.BackMatching(
        bm.partition(net),
        weights=bm.CG(bm.Relative(0.1), rtol=RTOL),
        inputs=bm.CG(bm.Relative(1e-2), rtol=RTOL),
    )

    def exact(x: torch.Tensor, y: torch.Tensor) -> bm.Step:
        net.zero_grad()
        return matcher.backward(x, lambda out: nnf.cross_entropy(out, y))

    def back_propagation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        net.zero_grad()
        loss = nnf.cross_entropy(net(x), y)
        loss.backward()
        return loss.detach()

    def iterations(right: Any) -> dict[str, Any]:
        records = records_of(exact(x, y))
        return {"iterations": {OURS: max(record.iterations for record in records)}}

    return Case(
        question="step",
        about={"net": name, "batch": shape[0], "rtol": RTOL, "dtype": "float32"},
        inputs=[(x, y), (x.flip(0), y.flip(0))],
        candidates={OURS: exact, "back-propagation": back_propagation},
        # Converged on the recomputed residual of every system.
        error=lambda inputs, step: worst_residual(step) / RTOL,
        own_errors={
            "back-propagation": lambda inputs, loss: relative_difference(loss, exact(*inputs).loss)
        },
        bound=1.01,
        residual="normal-equation residual in units of rtol (back-propagation: loss)",
        extra=iterations,
    )


def records_of(step: bm.Step) -> list[bm.SolveRecord]:
    """All solve records of a step."""
    return [record for b in step.blocks for record in (b.weight, b.input) if record is not None]


def worst_residual(step: bm.Step) -> float:
    """Infinite where a solve stopped at its cap."""
    records = records_of(step)
    if not all(record.converged for record in records):
        return float("inf")
    return max(record.residual for record in records if record.residual is not None)
