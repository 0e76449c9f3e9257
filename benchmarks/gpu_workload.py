"""What the sanitizers watch: every operator of ours once per size and dtype, at awkward sizes.

On the CPU the same calls run, so that the tests execute this file without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backmatch import linalg
from backmatch.bench import machine
from backmatch.linalg import _library

#: Both sides of every order where a kernel may begin or end, and orders that no tile divides.
SIZES = (1, 7, 8, 16, 17, 32, 33, 64, 65, 129, 257)
SYSTEMS, BAD = 5, 3


def run(device: str) -> None:
    """All of it; the last line names what was not reached.

    Raises:
        AssertionError: a status or an answer is wrong.
    """
    with called() as names:
        for n in SIZES:
            for dtype in (torch.float32, torch.float64):
                operators(device, dtype, n)
            print(f"n = {n} done", flush=True)  # how far a tool came that runs out of time
        for dtype in (torch.float32, torch.float64):
            for rate in machine.rates(torch.device(device), dtype).values():
                rate.run()
        if device == "cuda":
            torch.cuda.synchronize()
    missed = ", ".join(sorted(name for name, count in names.items() if not count))
    print(f"launchers not reached: {missed or 'none'}")


def operators(device: str, dtype: torch.dtype, n: int) -> None:
    """Every public function on systems of order ``n``, one of which is not positive definite."""
    generator = torch.Generator().manual_seed(n)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=dtype)  # noqa: E731
    factors = draw(SYSTEMS, n, n + 4)
    clean = (factors @ factors.mT / n + torch.eye(n, dtype=dtype)).to(device)
    A = clean.clone()
    A[BAD, n // 2, n // 2] = -1
    B = draw(SYSTEMS, n, 3).to(device)
    D = (torch.rand(SYSTEMS, n, generator=generator) > 0.5).to(device, dtype)
    R, Z = B[..., 0], draw(n + 3, n).to(device)
    slopes = (torch.rand(SYSTEMS, n + 3, generator=generator) > 0.5).to(device, dtype)
    targets = draw(SYSTEMS, n + 3).to(device)

    status = [0] * BAD + [n // 2 + 1] + [0] * (SYSTEMS - BAD - 1)
    for k in (1, 3):
        assert linalg.spd_solve_ex(A, B[..., :k])[1].tolist() == status
    # Strides: transposed, every second system, one matrix for all.
    assert linalg.spd_solve_ex(A.mT.contiguous().mT, B)[1].tolist() == status
    finite(linalg.spd_solve(clean[::2], B[::2], damping=0.5))
    finite(linalg.spd_solve(clean[:1].expand(SYSTEMS, n, n), B, damping=0.5))

    x, info = linalg.scaled_gram_solve_ex(clean[0], D, R, damping=0.5)
    assert not info.any()
    finite(x)
    finite(linalg.scaled_gram_solve(clean[0], torch.ones_like(D), R, damping=0.5))
    finite(linalg.weighted_gram(Z, slopes, damping=0.5))
    finite(linalg.ridge(Z, targets, slopes=slopes, damping=0.5))
    finite(linalg.ridge(Z, targets, damping=0.5))
    finite(linalg.ridge(Z.mT.contiguous(), targets[:, :n], slopes=D, damping=0.5))
    finite(linalg.min_norm_solve(clean, B))
    finite(linalg.cg(clean, B, rtol=1e-3).x)
    finite(linalg.cg(lambda P: clean @ P, B, rtol=1e-3).x)
    finite(linalg.cg(lambda P: clean @ P, B[..., :1], rtol=1e-3).x)
    finite(linalg.cg(lambda P: clean @ P, B[..., :1], rtol=1e-3, preconditioner=lambda V: V / 2).x)
    for preconditioner in (None, "shared"):
        finite(
            linalg.scaled_gram_cg(
                clean[0], D, R, damping=0.5, rtol=1e-3, preconditioner=preconditioner
            ).x
        )


def finite(answer: Tensor) -> None:
    assert bool(answer.isfinite().all())


@contextmanager
def called() -> Iterator[dict[str, int]]:
    """Counts the calls of every launcher of ``_C.cuda``; empty in a build without CUDA."""
    module: ModuleType | None = getattr(_library.native(), "cuda", None)
    counts: dict[str, int] = {}
    launchers = (
        {
            name: function
            for name, function in vars(module).items()
            if "stream" in (function.__doc__ or "") and not name.startswith("_")
        }
        if module is not None
        else {}
    )

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **named)

        return call

    for name, function in launchers.items():
        counts[name] = 0
        setattr(module, name, counting(name, function))
    try:
        yield counts
    finally:
        for name, function in launchers.items():
            setattr(module, name, function)
