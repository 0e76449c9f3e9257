"""Cases that only benchmarks/gpu.py asks: CG under graphs, a convolution, overhead, cliffs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_graphs
import torch
import torch.nn.functional as nnf
from torch import Tensor

from backmatch import linalg
from backmatch.bench import conjugate_gradient, scaled_gram, spd_solve, timing
from backmatch.bench.accuracy import WORST, require, spd_residual
from backmatch.bench.case import OURS, Case, Settings, dtype_name, rotated

GRAPH = "torch loop, CUDA graph"
DAMPING = scaled_gram.DAMPING
RTOL = conjugate_gradient.RTOL
#: Input sets of the loops: each has a graph with its own memory.
_GRAPH_SETS = 3

OVERHEAD_SIZES = (8, 32, 64, 128)
#: samples, channels, height and width, filters; 3 x 3 kernels.
CONVOLUTION, QUICK_CONVOLUTION = (128, 64, 16, 16, 64), (3, 2, 5, 5, 4)
#: Every order up to where kernels change often, then both sides of each multiple of 32.
CLIFF_ORDERS = (
    *range(4, 132),
    *(n + step for n in range(160, 512, 32) for step in (-1, 0, 1)),
    *(511, 512),
)
QUICK_CLIFF_ORDERS = (4, 5)
_CLIFF_SYSTEMS, _CLIFF_BYTES = 8192, 256 * 2**20


def cg(settings: Settings) -> Iterator[Case]:
    """Dense and scaled-Gram CG, with the loop under a graph as a further peer."""
    for case in conjugate_gradient.cases(settings):
        case = dataclasses.replace(case, inputs=case.inputs[:_GRAPH_SETS])
        problem = _dense if case.about["form"] == "dense" else _scaled
        loop = gpu_graphs.loop_of(problem, case.inputs, RTOL)
        if case.about["form"] == "scaled":
            answer = lambda K, D, R, loop=loop: D * loop(K, D, R).squeeze(-1)  # noqa: E731
        else:
            answer = loop
        # A graph belongs to its inputs: it cannot be asked for a slice of the batch.
        yield dataclasses.replace(case, candidates={**case.candidates, GRAPH: answer}, batch=None)


def _dense(A: Tensor, B: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return lambda P: A @ P, B


def _scaled(K: Tensor, D: Tensor, R: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    def apply(P: Tensor) -> Tensor:
        p = P.squeeze(-1)
        return (((p * D) @ K) * D + DAMPING * p).unsqueeze(-1)

    return apply, R.unsqueeze(-1)


def conv_cg(settings: Settings) -> Iterator[Case]:
    """Input problems of a convolution with ReLU, matrix-free: one system per sample.

    The operator is W' D W + damping: a convolution, a mask, and the transposed convolution.
    """
    dtype = settings.dtypes[0]
    samples, channels, height, width, filters = QUICK_CONVOLUTION if settings.quick else CONVOLUTION
    generator = settings.generator(0)
    shape = (samples, channels, height, width)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=dtype).to(settings.device)  # noqa: E731
    weight = draw(filters, channels, 3, 3) / (9 * channels) ** 0.5
    mask = (draw(samples, filters, height, width) > 0).to(dtype)
    B = draw(samples, channels * height * width, 1)

    def problem(mask: Tensor, B: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        def apply(P: Tensor) -> Tensor:
            image = P.view(shape)
            out = nnf.conv2d(image, weight, padding=1) * mask
            back = nnf.conv_transpose2d(out, weight, padding=1)
            return torch.add(back, image, alpha=DAMPING).view(P.shape)

        return apply, B

    def ours(mask: Tensor, B: Tensor) -> Tensor:
        return linalg.cg(problem(mask, B)[0], B, rtol=RTOL, max_steps=1000).x

    def error(inputs: tuple[Tensor, Tensor], X: Tensor) -> float:
        apply, right = problem(*inputs)
        size = torch.linalg.vector_norm(right, dim=1)
        residual = torch.linalg.vector_norm(right - apply(X), dim=1)
        return float((residual / size).amax()) / RTOL

    def iterations(right: Sequence[str]) -> dict[str, object]:
        found = linalg.cg(problem(mask, B)[0], B, rtol=RTOL, max_steps=1000).iterations
        return {"iterations": {OURS: float(found.double().mean())}}

    inputs = rotated((), (mask, B), settings.quick)[:_GRAPH_SETS]
    loop = gpu_graphs.loop_of(problem, inputs, RTOL)
    yield Case(
        question="conv_cg",
        about={
            "n": channels * height * width,
            "batch": samples,
            "filters": filters,
            "rtol": RTOL,
            "dtype": dtype_name(dtype),
        },
        inputs=inputs,
        candidates={
            OURS: ours,
            "torch loop": lambda mask, B: conjugate_gradient.torch_loop(*problem(mask, B))[0],
            GRAPH: loop,
        },
        error=error,
        # The convolutions of the check may sum in another order than those of the loop.
        bound=1.1,
        residual="|Ax-b| / |b| in units of rtol",
        extra=iterations,
    )


def overhead(settings: Settings) -> Iterator[Case]:
    """One system: what a call costs beyond its arithmetic, checked and unchecked."""
    by_cholesky_ex = lambda A, B: torch.cholesky_solve(B, torch.linalg.cholesky_ex(A)[0])  # noqa: E731
    forms: dict[str, dict[str, Callable[..., Tensor]]] = {
        "checked": {},
        "unchecked": {
            OURS: lambda A, B: linalg.spd_solve_ex(A, B)[0],
            "cholesky_ex": by_cholesky_ex,
            "solve_ex": lambda A, B: torch.linalg.solve_ex(A, B)[0],
        },
    }
    for n in OVERHEAD_SIZES[:1] if settings.quick else OVERHEAD_SIZES:
        for form, candidates in forms.items():
            case = spd_solve.case(settings, "overhead", n, 1, settings.dtypes[0])
            A, B = case.inputs[0]
            yield dataclasses.replace(
                case,
                about={**case.about, "form": form},
                inputs=[(A.clone(), B.clone()) for _ in range(16)],
                candidates=candidates or case.candidates,
            )


def cliffs(settings: Settings) -> Iterator[dict[str, Any]]:
    """Rows of ours alone over neighbouring orders, for t(n + 1) / t(n).

    No rates and no peers, and all orders cut from one batch: a hundred orders must be cheap.
    """
    orders = QUICK_CLIFF_ORDERS if settings.quick else CLIFF_ORDERS
    effort = dataclasses.replace(settings.effort, seconds=settings.effort.seconds / 2)
    for dtype in settings.dtypes:
        whole, right = spd_solve.systems(settings, max(orders), 64, dtype)
        for n in orders:
            settings.check_stop()
            batch = min(_CLIFF_SYSTEMS, _CLIFF_BYTES // (dtype.itemsize * n * n))
            index = torch.arange(batch, device=settings.device) % len(whole)
            A, B = whole[:, :n, :n][index].contiguous(), right[:, :n][index].contiguous()
            yield _cliff_row(settings, effort, A, B)


def _cliff_row(settings: Settings, effort: timing.Effort, A: Tensor, B: Tensor) -> dict[str, Any]:
    sets = itertools.cycle(rotated((), (A, B), settings.quick))
    call = lambda: linalg.spd_solve(*next(sets))  # noqa: E731
    error = require(OURS, spd_residual(A, B, linalg.spd_solve(A, B), 0.0), WORST)
    calls, once = {OURS: call}, {OURS: timing.seconds_of(call)}
    found = timing.interleave(
        calls, once, {OURS: effort.fewest}, effort, settings.check_stop, settings.device.type
    )[OURS]
    return {
        "question": "cliffs",
        "case": {"n": A.shape[-1], "batch": len(A), "dtype": dtype_name(A.dtype)},
        "ours": OURS,
        "failed": {},
        "worst_scaled_residual": {OURS: error},
        "times": {
            OURS: {
                "median_seconds": found.median,
                "iqr_seconds": found.iqr,
                "repeats": len(found.raw_times),
                "calls_per_repeat": found.number_per_run,
            }
        },
    }


def ratios(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Per dtype, "n to n + 1" -> ratio of the times per system, of the rows of :func:`cliffs`."""
    found: dict[str, dict[str, float]] = {}
    per_system = {
        (row["case"]["dtype"], row["case"]["n"]): row["times"][OURS]["median_seconds"]
        / row["case"]["batch"]
        for row in rows
        if "times" in row
    }
    for (dtype, n), seconds in per_system.items():
        if (before := per_system.get((dtype, n - 1))) is not None:
            found.setdefault(dtype, {})[f"{n - 1} to {n}"] = seconds / before
    return found
