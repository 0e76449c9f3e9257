"""Small calls of every CUDA kernel that reach all its barriers, for the tests of the emulator.

Several systems a block, two passes of columns, solved and failed systems, four thread orders.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cuda_cases import TINY, family, spd_matrices
from cuda_host_library import CudaHost, Device
from cuda_krylov_calls import Loop, cg, scaled_gram_cg

SEEDS = range(4)


def spd_solve(cuda: CudaHost) -> None:
    """A thread, a group of lanes, a block on chip and in the workspace."""
    rng = np.random.default_rng(0)
    for n in (6, 30):
        A = spd_matrices(rng, 9, n, np.float32)
        A[0, 2, 2] = -100
        for k in (1, 17):
            B = rng.standard_normal((9, n, k)).astype(np.float32)
            for seed in SEEDS:
                _, info = cuda.spd_solve(A, np.zeros(9, np.float32), B, Device(seed))
                assert info.tolist() == [3] + [0] * 8
    A, B = spd_matrices(rng, 5, 70, np.float64), rng.standard_normal((5, 70, 40))
    A[0, 20, 20] = A[1, 5, 5] = -100
    for seed in SEEDS:
        for device in (Device(seed, TINY.shared_bytes, 1), Device(seed, multiprocessors=1)):
            _, info = cuda.spd_solve(A, np.zeros(5), B, device)
            assert info.tolist() == [21, 6, 0, 0, 0]


def scaled_gram_solve(cuda: CudaHost) -> None:
    """The same; systems of few and of many active rows, so that each launch passes some over."""
    rng = np.random.default_rng(1)
    for n in (6, 30):
        K, D, R, damping = family(rng, 9, n, np.float32)
        D[0, 0], damping[0] = 1, np.nan
        for seed in SEEDS:
            _, info = cuda.scaled_gram_solve(K, D, R, damping, Device(seed))
            assert info.tolist() == [1] + [0] * 8
    K, D, R, damping = family(rng, 17, 90, np.float64, density=0.9)
    D[2::3, 20:] = 0
    damping[:2] = np.nan
    for seed in SEEDS:
        for device in (Device(seed, TINY.shared_bytes, 1), Device(seed, multiprocessors=1)):
            _, info = cuda.scaled_gram_solve(K, D, R, damping, device)
            assert np.flatnonzero(info).tolist() == [0, 1]


def weighted_gram(cuda: CudaHost) -> None:
    """Groups of a warp and of a block, two windows of rows."""
    rng = np.random.default_rng(2)
    Z, w = rng.standard_normal((300, 33)), rng.standard_normal((2, 300))
    for seed in SEEDS:
        cuda.weighted_gram(Z, w[:1], np.zeros(1), Device(seed, multiprocessors=1))
        cuda.weighted_gram(Z[:, :9], w, np.zeros(2), Device(seed, multiprocessors=1))


def ridge_primal(cuda: CudaHost) -> None:
    """Two windows of rows; two systems a block, one that fails."""
    rng = np.random.default_rng(3)
    Z, w = rng.standard_normal((300, 33)), rng.standard_normal((66, 300))
    Z32, w32, damping = Z.astype(np.float32), w.astype(np.float32), np.ones(66, np.float32)
    damping[:2] = -1e3
    for seed in SEEDS:
        device = Device(seed, multiprocessors=1)
        cuda.ridge_primal(Z, w[:1], w[:1], np.ones(1), device)
        # No rows, and so no barrier between the passes.
        cuda.ridge_primal(Z[:0], w[:1, :0], w[:1, :0], np.ones(1), device)
        _, info = cuda.ridge_primal(Z32[:2], w32[:, :2], w32[:, :2], damping, device)
        assert info.tolist() == [1, 1] + [0] * 64


def conjugate_gradient(cuda: CudaHost) -> None:
    """Two warps, more systems than slots, several matrices a block."""
    rng = np.random.default_rng(4)
    Z = rng.standard_normal((40, 44)).astype(np.float32) / 7
    A, B = np.stack([Z @ Z.T] * 66), rng.standard_normal((66, 40, 6)).astype(np.float32)
    damping = np.ones(66, np.float32)
    for seed in SEEDS:
        cg(cuda, A[:2], damping[:2], B[:2], 1e-3, 5, None, Device(seed, 20_000, 1))
        cg(cuda, A, damping, B[..., :2], 1e-3, 1, None, Device(seed, multiprocessors=1))


def conjugate_gradient_of_a_family(cuda: CudaHost) -> None:
    """With and without a preconditioner."""
    rng = np.random.default_rng(5)
    Z = rng.standard_normal((40, 44)).astype(np.float32) / 7
    K, R = Z @ Z.T, rng.standard_normal((6, 40)).astype(np.float32)
    ones = np.ones(6, np.float32)
    for inverse in (None, np.eye(40, dtype=np.float32)):
        for seed in SEEDS:
            device = Device(seed, 20_000, 1)
            x = scaled_gram_cg(cuda, K, np.ones_like(R), R, ones, 1e-3, 5, inverse, device).x
            assert np.isfinite(x).all()


def cg_step(cuda: CudaHost) -> None:
    """Rows that several warps sum."""
    rng = np.random.default_rng(6)
    for seed in SEEDS:
        rows = {name: rng.uniform(1, 2, (3, 600)).astype(np.float32) for name in "PQXRZ"}
        flags = {"running": np.ones(3, np.uint8), "alive": np.ones(3, np.uint8)}
        target, steps = np.zeros(3, np.float32), np.zeros(3, np.int64)
        loop = Loop(**rows, rho=np.ones(3, np.float32), target=target, steps=steps, **flags)
        loop.run(cuda, "cg_step", device=Device(seed, 20_000, 1))


#: By the name of the source that holds the kernels.
EXERCISES: dict[str, Callable[[CudaHost], None]] = {
    "spd_solve": spd_solve,
    "scaled_gram_solve": scaled_gram_solve,
    "weighted_gram": weighted_gram,
    "ridge_primal": ridge_primal,
    "cg": conjugate_gradient,
    "scaled_gram_cg": conjugate_gradient_of_a_family,
    "cg_step": cg_step,
}
