"""Systems D_j K D_j + damping I that share one K, half of D zero (ReLU) or none (Tanh).

Peers form the matrices: a scaled copy of K per system, then torch's batched Cholesky
or ``torch.linalg.solve``. The work that is counted is that of the active rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import linalg
from . import memory
from .accuracy import WORST, scaled_gram_residual
from .case import OURS, Case, Settings, dtype_name, rotated
from .spd_solve import by_cholesky, judge_info

SIZES, QUICK_SIZES = (32, 64, 128, 256, 512), (32, 128)
DAMPING = 0.1
#: Above this K is scaled in chunks, as a careful caller would.
_COPY_BYTES = 256 * 2**20


def cases(settings: Settings) -> Iterator[Case]:
    """Half active in every dtype; all active, with slopes of Tanh, in the first one."""
    for slopes in ("relu", "tanh"):
        for dtype in settings.dtypes if slopes == "relu" else settings.dtypes[:1]:
            for n in settings.sizes(SIZES, QUICK_SIZES):
                batch = settings.batch(n * n * dtype.itemsize)
                yield case(settings, "scaled_gram", n, batch, dtype, slopes)


def case(
    settings: Settings, question: str, n: int, batch: int, dtype: torch.dtype, slopes: str
) -> Case:
    """``batch`` scalings of one K of order ``n``."""
    K, D, R = family(settings, n, batch, dtype, slopes)
    active = (D != 0).sum(1).double()
    candidates: dict[str, Callable[..., Tensor]] = {
        OURS: lambda K, D, R: linalg.scaled_gram_solve(K, D, R, damping=DAMPING),
        "linalg.solve": lambda K, D, R: by_copies(torch.linalg.solve, K, D, R),
        "cholesky": lambda K, D, R: by_copies(by_cholesky, K, D, R),
    }

    def extra(right: Sequence[str]) -> dict[str, object]:
        if settings.quick or n != 256:
            return {}
        return peaks({name: candidates[name] for name in right}, (K, D, R), settings.device) | {
            "copies_of_K_bytes": batch * K.nbytes
        }

    return Case(
        question=question,
        about={"n": n, "batch": batch, "slopes": slopes, "dtype": dtype_name(dtype)},
        inputs=rotated((K,), (D, R), settings.quick),
        candidates=candidates,
        error=lambda inputs, X: scaled_gram_residual(inputs[0], inputs[1], inputs[2], X, DAMPING),
        bound=WORST,
        residual="|Ax-b| / (|A||x| n eps), A = D^2 K + damping I",
        flops=float((active**3 / 3 + 2 * active**2).sum()),
        bytes=dtype.itemsize * (n * (n + 1) / 2 + 3 * batch * n),
        shared=1,
        batch=batch,
        more_checks=[lambda: check_info(K, D, R)],
        extra=extra,
    )


def family(
    settings: Settings, n: int, batch: int, dtype: torch.dtype, slopes: str
) -> tuple[Tensor, Tensor, Tensor]:
    """K (n, n) with mean eigenvalue 1, slopes D (batch, n) and R (batch, n), seeded."""
    generator = settings.generator(n)
    Z = torch.randn(n, n, generator=generator, dtype=dtype)
    a, R = torch.randn(2, batch, n, generator=generator, dtype=dtype)
    D = (a > 0).to(dtype) if slopes == "relu" else 1 - torch.tanh(a).square()
    return tuple(value.to(settings.device) for value in (Z @ Z.T / n, D, R))  # type: ignore


def by_copies(solve: Callable[..., Tensor], K: Tensor, D: Tensor, R: Tensor) -> Tensor:
    """The same systems by a library: scale a copy of K per system, damp, solve."""
    batch, n = D.shape
    step = max(1, _COPY_BYTES // (n * n * K.element_size()))
    X = torch.empty_like(R)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        A = D[part].unsqueeze(-1) * K * D[part].unsqueeze(-2)
        A.diagonal(dim1=1, dim2=2).add_(DAMPING)
        X[part] = D[part] * solve(A, R[part].unsqueeze(-1)).squeeze(-1)
    return X


def check_info(K: Tensor, D: Tensor, R: Tensor) -> None:
    """A damping below minus the largest eigenvalue makes one system of the batch indefinite.

    Raises:
        WrongAnswerError: status, neighbours or the failed answer are not as they must be.
    """
    count = min(len(D), 64)
    bad = count // 2
    D, R = D[:count].clone(), R[:count]
    D[bad, 0] = 1.0  # an active first row, whose pivot is the one that fails
    damping = torch.full((count,), DAMPING, dtype=K.dtype, device=K.device)
    clean, _ = linalg.scaled_gram_solve_ex(K, D, R, damping=damping)
    damping[bad] = -2 * float(K.diagonal().sum())
    X, info = linalg.scaled_gram_solve_ex(K, D, R, damping=damping)
    judge_info("scaled_gram_solve", clean, X, info, bad, 1)


def peaks(
    candidates: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...], device: torch.device
) -> dict[str, object]:
    """Peak bytes of every candidate beyond its inputs: tensors, and the process on the CPU."""
    found: dict[str, object] = {
        "tensor_peak_bytes": {
            name: memory.tensor_peak(lambda: run(*inputs), device)  # noqa: B023 - called at once
            for name, run in candidates.items()
        }
    }
    if device.type == "cpu":
        found["process_peak_bytes"] = {
            name: memory.process_peak(lambda: run(*inputs))  # noqa: B023
            for name, run in candidates.items()
        }
    return found
