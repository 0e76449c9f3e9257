"""What the tests of the emulated CUDA kernels share: devices, systems and oracles."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from cuda_host_library import Device

DTYPES = [np.float32, np.float64]
DEFAULT = Device()
# Two tiles fit on this device in double, four in float: larger systems go through the workspace.
TINY = Device(shared_bytes=12800, multiprocessors=1)


def spd_matrices(rng, batch: int, n: int, dtype) -> np.ndarray:
    """Well-conditioned SPD matrices with NaN above the diagonal, which nothing may read."""
    factor = rng.standard_normal((batch, n, n + 4))
    A = (factor @ factor.transpose(0, 2, 1) / n + 0.2 * np.eye(n)).astype(dtype)
    return np.where(np.tri(n, dtype=bool), A, np.array(np.nan, dtype))


def full(A: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """The float64 matrices A + damping I that the lower triangles stand for."""
    lower = np.tril(A.astype(np.float64))
    diagonal = np.einsum("bi,ij->bij", np.diagonal(lower, axis1=1, axis2=2), np.eye(A.shape[1]))
    eye = np.eye(A.shape[1])
    return lower + lower.transpose(0, 2, 1) - diagonal + damping[:, None, None] * eye


def assert_solves(A64: np.ndarray, X: np.ndarray, B: np.ndarray) -> None:
    """max |A x - b| / (|A| |x| n eps) < 30, and X agrees with LAPACK in float64.

    The condition numbers of the systems drawn here stay below a few hundred.
    """
    if X.size == 0:
        return
    eps, n = np.finfo(X.dtype).eps, A64.shape[1]
    scale = np.abs(A64).sum(2).max(1) * np.abs(X).max((1, 2)) * n * eps
    residual = np.abs(A64 @ X.astype(np.float64) - B).max((1, 2))
    assert (residual < 30 * np.maximum(scale, np.finfo(X.dtype).tiny)).all()
    for a, x, b in zip(A64, X, B, strict=True):
        expected = scipy.linalg.cho_solve(scipy.linalg.cho_factor(a, lower=True), b.astype(float))
        assert np.abs(x - expected).max() <= 1000 * eps * max(np.abs(expected).max(), 1e-30)


def check_spd(cuda, rng, dtype, batch, n, k, device=DEFAULT) -> tuple[np.ndarray, np.ndarray]:
    A, damping = spd_matrices(rng, batch, n, dtype), rng.uniform(0, 1, batch).astype(dtype)
    B = rng.standard_normal((batch, n, k)).astype(dtype)
    X, info = cuda.spd_solve(A, damping, B, device)
    assert not info.any()
    assert_solves(full(A, damping), X, B)
    return X, info


def potrf_info(a: np.ndarray) -> int:
    potrf = {"float32": scipy.linalg.lapack.spotrf, "float64": scipy.linalg.lapack.dpotrf}
    return potrf[a.dtype.name](a, lower=1)[1]


def family(rng, batch, n, dtype, density=0.5) -> tuple[np.ndarray, ...]:
    """K (NaN above the diagonal), D with zeros and slopes of both signs, R, damping."""
    K = spd_matrices(rng, 1, n, dtype)[0]
    D = rng.uniform(0.5, 1.5, (batch, n)) * rng.choice([-1, 1], (batch, n))
    D[rng.uniform(size=(batch, n)) > density] = 0
    R = rng.standard_normal((batch, n)).astype(dtype)
    return K, D.astype(dtype), R, rng.uniform(0.05, 1, batch).astype(dtype)


def assert_solves_family(K, D, R, damping, X) -> None:
    """X = D y, and the active part of y solves its own small system."""
    K64 = full(K[None], np.zeros(1))[0]
    assert not X[D == 0].any()
    for d, r, lam, x in zip(D, R, damping, X, strict=True):
        on = np.flatnonzero(d)
        small = d[on, None].astype(float) * K64[np.ix_(on, on)] * d[on] + lam * np.eye(len(on))
        assert_solves(small[None], (x[on] / d[on])[None, :, None], r[on][None, :, None])


def check_family(cuda, rng, dtype, batch, n, density=0.5, device=DEFAULT):
    K, D, R, damping = family(rng, batch, n, dtype, density)
    X, info = cuda.scaled_gram_solve(K, D, R, damping, device)
    assert not info.any()
    assert_solves_family(K, D, R, damping, X)
    return X
