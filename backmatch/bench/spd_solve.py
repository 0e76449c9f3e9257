"""Batched symmetric positive definite systems: factor and solve, one right-hand side.

Peers, each by its best public call: ``torch.linalg.solve`` (LU), ``torch.linalg.cholesky`` with
``torch.cholesky_solve``, and SciPy's ``cho_factor`` with ``cho_solve`` in a loop. A peer that fails
is listed as failed: ``torch.linalg.solve`` does, with some builds of MKL, on batches of n >= 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from .. import linalg
from .accuracy import WORST, WrongAnswerError, spd_residual
from .case import OURS, Case, Settings, dtype_name, rotated

SIZES, QUICK_SIZES = (8, 16, 32, 64, 128, 256, 512), (8, 32, 128)


def cases(settings: Settings) -> Iterator[Case]:
    """One case per dtype and n."""
    for dtype in settings.dtypes:
        for n in settings.sizes(SIZES, QUICK_SIZES):
            batch = settings.batch(n * n * dtype.itemsize)
            yield case(settings, "spd_solve", n, batch, dtype)


def case(settings: Settings, question: str, n: int, batch: int, dtype: torch.dtype) -> Case:
    """``batch`` systems of order ``n``."""
    A, B = systems(settings, n, batch, dtype)
    candidates: dict[str, Callable[..., Tensor]] = {
        OURS: lambda A, B: linalg.spd_solve(A, B),
        "linalg.solve": torch.linalg.solve,
        "cholesky": by_cholesky,
    }
    if settings.device.type == "cpu":
        candidates["scipy"] = by_scipy
    size = dtype.itemsize
    return Case(
        question=question,
        about={"n": n, "batch": batch, "k": 1, "dtype": dtype_name(dtype)},
        inputs=rotated((), (A, B), settings.quick),
        candidates=candidates,
        error=lambda inputs, X: spd_residual(inputs[0], inputs[1], X, damping=0.0),
        bound=WORST,
        residual="|Ax-b| / (|A||x| n eps)",
        flops=batch * (n**3 / 3 + 2 * n**2),
        bytes=batch * size * (n * (n + 1) / 2 + 2 * n),
        batch=batch,
        more_checks=[lambda: check_info(A, B)],
    )


def systems(settings: Settings, n: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Seeded Gram matrices (batch, n, n) with eigenvalues of about 0.1 to 5, and (batch, n, 1)."""
    generator = settings.generator(n)
    factors = torch.randn(min(batch, 256), n, n, generator=generator, dtype=dtype)
    A = factors @ factors.mT / n
    A.diagonal(dim1=1, dim2=2).add_(0.1)
    # Time does not depend on the values: further systems are rescaled copies of the first.
    scale = 1 + torch.rand(batch, 1, 1, generator=generator, dtype=dtype)
    B = torch.randn(batch, n, 1, generator=generator, dtype=dtype).to(settings.device)
    index = torch.arange(batch, device=settings.device) % len(A)
    return A.to(settings.device)[index] * scale.to(settings.device), B


def by_cholesky(A: Tensor, B: Tensor) -> Tensor:
    """torch's two calls."""
    return torch.cholesky_solve(B, torch.linalg.cholesky(A))


def by_scipy(A: Tensor, B: Tensor) -> Tensor:
    """SciPy, one system after the other, its own checks off as in a careful caller's loop."""
    X = torch.empty_like(B)
    a, b, x = A.numpy(), B.numpy(), X.numpy()
    for i in range(len(a)):
        factor = scipy.linalg.cho_factor(a[i], lower=True, check_finite=False)
        x[i] = scipy.linalg.cho_solve(factor, b[i], check_finite=False)
    return X


def check_info(A: Tensor, B: Tensor) -> None:
    """One matrix that is not positive definite: reported, and its neighbours keep their bits.

    Raises:
        WrongAnswerError: they do not, or the status is wrong.
    """
    count = min(len(A), 64)
    bad, pivot = count // 2, A.shape[-1] // 2
    A, B = A[:count].clone(), B[:count]
    clean, _ = linalg.spd_solve_ex(A, B)
    A[bad, pivot, pivot] = -1.0
    X, info = linalg.spd_solve_ex(A, B)
    judge_info("spd_solve", clean, X, info, bad, pivot + 1)


def judge_info(name: str, clean: Tensor, X: Tensor, info: Any, bad: int, expected: int) -> None:
    """Compare a batch that has one bad system with the clean one.

    Raises:
        WrongAnswerError: the status is wrong, or a neighbour has other bits.
    """
    wanted = torch.zeros_like(info)
    wanted[bad] = expected
    if not torch.equal(info, wanted):
        raise WrongAnswerError(
            f"{name}: info {info.tolist()} with system {bad} not positive definite"
        )
    good = info == 0
    if not torch.equal(X[good], clean[good]):
        raise WrongAnswerError(f"{name}: the neighbours of a failed system lost their bits")
    if not bool(X[bad].isnan().all()):
        raise WrongAnswerError(f"{name}: the answer of a failed system is not NaN")
