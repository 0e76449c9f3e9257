"""Conjugate gradient with one stop per system: dense matrices, and the scaled-Gram family.

The peer is the same loop composed of torch's operations: all systems step together, those that
have converged are frozen by a mask, and the loop ends when all have. Its stop is tested on the
recursive residual, which is cheaper than ours, which is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import linalg
from .accuracy import relative_residuals
from .case import OURS, Case, Settings, dtype_name, rotated
from .scaled_gram import DAMPING, family
from .spd_solve import systems

SIZES, QUICK_SIZES = (64, 128, 256), (64,)
RTOL = 1e-3
_MOST_STEPS = 10_000


def cases(settings: Settings) -> Iterator[Case]:
    """Both forms, per dtype and n."""
    for dtype in settings.dtypes:
        for n in settings.sizes(SIZES, QUICK_SIZES):
            batch = settings.batch(n * n * dtype.itemsize)
            yield dense(settings, n, batch, dtype)
            yield scaled(settings, n, batch, dtype)


def dense(settings: Settings, n: int, batch: int, dtype: torch.dtype) -> Case:
    """``batch`` matrices of their own."""
    A, B = systems(settings, n, batch, dtype)
    about = {"form": "dense", "n": n, "batch": batch, "rtol": RTOL, "dtype": dtype_name(dtype)}

    def iterations(right: Sequence[str]) -> dict[str, object]:
        found = linalg.cg(A, B, rtol=RTOL).iterations
        return {"iterations": {OURS: float(found.double().mean()), "torch loop": _counted(A, B)}}

    return Case(
        question="cg",
        about=about,
        inputs=rotated((), (A, B), settings.quick),
        candidates={
            OURS: lambda A, B: linalg.cg(A, B, rtol=RTOL).x,
            "torch loop": lambda A, B: torch_loop(lambda P: A @ P, B)[0],
        },
        error=lambda inputs, X: relative_residuals(inputs[0], inputs[1], X, 0.0) / RTOL,
        bound=_bound(dtype),
        residual="|Ax-b| / |b| in units of rtol",
        batch=batch,
        extra=iterations,
    )


def scaled(settings: Settings, n: int, batch: int, dtype: torch.dtype) -> Case:
    """One K for all systems, half of D zero: every step is one matrix product."""
    K, D, R = family(settings, n, batch, dtype, "relu")
    about = {"form": "scaled", "n": n, "batch": batch, "rtol": RTOL, "dtype": dtype_name(dtype)}

    def loop(K: Tensor, D: Tensor, R: Tensor) -> Tensor:
        def apply(P: Tensor) -> Tensor:
            p = P.squeeze(-1)
            return (((p * D) @ K) * D + DAMPING * p).unsqueeze(-1)

        return D * torch_loop(apply, R.unsqueeze(-1))[0].squeeze(-1)

    def ours(K: Tensor, D: Tensor, R: Tensor) -> Tensor:
        return linalg.scaled_gram_cg(K, D, R, damping=DAMPING, rtol=RTOL).x

    def error(inputs: tuple[Tensor, ...], X: Tensor) -> float:
        K, D, R = inputs
        exact = linalg.scaled_gram_solve(K.double(), D.double(), R.double(), damping=DAMPING)
        # CG's residual bounds the error of y through the condition number, here at most |K| / mu.
        difference = torch.linalg.vector_norm(X.double() - exact, dim=-1)
        size = torch.linalg.vector_norm(R.double(), dim=-1)
        return float((DAMPING * difference / size).amax()) / RTOL

    return Case(
        question="cg",
        about=about,
        inputs=rotated((K,), (D, R), settings.quick),
        candidates={OURS: ours, "torch loop": loop},
        error=error,
        bound=_bound(dtype),
        residual="damping |x - exact| / |b| in units of rtol",
        shared=1,
        batch=batch,
    )


def torch_loop(apply: Callable[[Tensor], Tensor], B: Tensor) -> tuple[Tensor, int]:
    """Plain batched CG from 0 in torch: x, and the steps until the last system stopped."""
    x, r = torch.zeros_like(B), B.clone()
    p, rho = r, (B * B).sum(1, keepdim=True)
    goal = RTOL**2 * rho
    for step in range(_MOST_STEPS):
        going = rho > goal
        if not bool(going.any()):
            return x, step
        q = apply(p)
        alpha = torch.where(going, rho / (p * q).sum(1, keepdim=True), 0.0)
        x = x + alpha * p
        r = r - alpha * q
        new = (r * r).sum(1, keepdim=True)
        p = r + torch.where(going, new / rho, 0.0) * p
        rho = torch.where(going, new, rho)
    return x, _MOST_STEPS


def _counted(A: Tensor, B: Tensor) -> int:
    return torch_loop(lambda P: A @ P, B)[1]


def _bound(dtype: torch.dtype) -> float:
    """The recursive residual of the peer may be off by rounding; ours stops on the true one."""
    return 1.05 if dtype == torch.float32 else 1.01
