"""The solvers, one system at a time, by the textbook route of SciPy or NumPy.

Names, argument order and meaning are those of ``backmatch.linalg``; arrays in, float64 arrays
out. Leading dimensions are batch dimensions and broadcast.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve, lapack

from ..errors import NonFiniteError, NotPositiveDefiniteError

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)


class CGResult(NamedTuple):
    """What :func:`cg` returns.

    Attributes:
        x: shape (..., n, k), the last iterate of every system.
        iterations: shape (..., k), steps taken.
        residual: shape (..., k), \\|b - (A + damping I) x\\| / \\|b\\|, recomputed from x.
        converged: shape (..., k), whether that residual is at most ``rtol``.
    """

    x: Array
    iterations: NDArray[np.int64]
    residual: Array
    converged: NDArray[np.bool_]


def spd_solve(A: ArrayLike, B: ArrayLike, *, damping: ArrayLike = 0.0) -> Array:
    """Solve (A + damping I) X = B by SciPy's Cholesky, matrix by matrix.

    Args:
        A: shape (..., n, n); only the lower triangle is read.
        B: shape (..., n, k).
        damping: shape (...), one value per system.

    Returns:
        X of shape (..., n, k).

    Raises:
        NonFiniteError: NaN or Inf in an argument.
        NotPositiveDefiniteError: names all failing systems and their pivots.

    >>> spd_solve([[4.0, np.nan], [2.0, 3.0]], [[8.0], [8.0]]).ravel()  # upper part not read
    array([1., 2.])
    """
    A, B, damping = _floats(A), _floats(B), _floats(damping)
    A = np.tril(A)
    _finite(A=A, B=B, damping=damping)
    n, k = B.shape[-2:]
    batch = np.broadcast_shapes(A.shape[:-2], B.shape[:-2], damping.shape)
    systems = zip(
        np.broadcast_to(A, (*batch, n, n)).reshape(_count(batch), n, n),
        np.broadcast_to(B, (*batch, n, k)).reshape(_count(batch), n, k),
        np.broadcast_to(damping, batch).ravel(),
        strict=True,
    )
    X = np.zeros((_count(batch), n, k))
    failed: list[tuple[int, int]] = []
    for i, (a, b, shift) in enumerate(systems):
        if n == 0 or k == 0:
            continue
        L, info = lapack.dpotrf(a + shift * np.eye(n), lower=1)  # what cho_factor calls
        if info:
            failed.append((i, int(info)))
        else:
            X[i] = cho_solve((L, True), b)
    if failed:
        indices, pivots = zip(*failed, strict=True)
        raise NotPositiveDefiniteError("A + damping I", indices, pivots, _count(batch))
    return X.reshape(*batch, n, k)


def min_norm_solve(A: ArrayLike, B: ArrayLike, *, rcond: float | None = None) -> Array:
    """pinv(A) B for positive semidefinite A, through its eigenvalues.

    Eigenvalues <= rcond * lambda_max count as zero; ``rcond=None`` means max(n, 32) eps.

    Args:
        A: shape (..., n, n); only the lower triangle is read.
        B: shape (..., n, k).

    >>> min_norm_solve([[1.0, 1.0], [1.0, 1.0]], [[2.0], [2.0]]).ravel().round(12)
    array([1., 1.])
    """
    A, B = _floats(A), _floats(B)
    _finite(A=np.tril(A), B=B)
    n = A.shape[-1]
    if n == 0:
        return np.zeros((*np.broadcast_shapes(A.shape[:-2], B.shape[:-2]), 0, B.shape[-1]))
    values, Q = np.linalg.eigh(A, UPLO="L")
    cut = (max(n, 32) * EPS if rcond is None else rcond) * np.maximum(values[..., -1:], 0.0)
    inverse = np.where(values > cut, 1.0 / np.where(values > cut, values, 1.0), 0.0)
    solution: Array = Q @ (inverse[..., None] * (np.swapaxes(Q, -1, -2) @ B))
    return solution


def scaled_gram_solve(K: ArrayLike, D: ArrayLike, R: ArrayLike, *, damping: ArrayLike) -> Array:
    """D y with (D K D + damping I) y = R, one K for all rows of D; damping 0: D pinv(D K D) R.

    Args:
        K: shape (n, n), positive semidefinite; only the lower triangle is read.
        D: shape (batch, n), the diagonals.
        R: shape (batch, n).
        damping: scalar or shape (batch,).

    Returns:
        Shape (batch, n); exactly 0 where D is 0.

    >>> scaled_gram_solve(np.eye(2), [[1.0, 0.0]], [[6.0, 6.0]], damping=2.0)
    array([[2., 0.]])
    """
    K, D, R = np.tril(_floats(K)), _floats(D), _floats(R)
    K = K + np.tril(K, -1).T
    X = np.zeros_like(R)
    for i, shift in enumerate(np.broadcast_to(_floats(damping), R.shape[:1])):
        A = D[i][:, None] * K * D[i]
        solve = (
            spd_solve(A, R[i][:, None], damping=shift)
            if shift
            else min_norm_solve(A, R[i][:, None])
        )
        X[i] = D[i] * solve[:, 0]
    return X


def weighted_gram(Z: ArrayLike, w: ArrayLike, *, damping: ArrayLike = 0.0) -> Array:
    """Z^T diag(w_j) Z + damping I for every row w_j.

    Args:
        Z: shape (m, n).
        w: shape (batch, m).
        damping: scalar or shape (batch,).

    Returns:
        Shape (batch, n, n).

    >>> weighted_gram([[1.0, 2.0]], [[3.0]], damping=1.0)
    array([[[ 4.,  6.],
            [ 6., 13.]]])
    """
    Z, w = _floats(Z), _floats(w)
    shifts = np.broadcast_to(_floats(damping), w.shape[:1])
    grams = [
        Z.T @ np.diag(row) @ Z + s * np.eye(Z.shape[1]) for row, s in zip(w, shifts, strict=True)
    ]
    return np.array(grams, dtype=np.float64).reshape(len(w), Z.shape[1], Z.shape[1])


def damped_lstsq(
    J: Array, r: Array, damping: float, *, rcond: float | None = None, offset: Array | None = None
) -> Array:
    """argmin_d 1/2 \\|J d - r\\|^2 + damping/2 \\|offset + d\\|^2 for ONE system, by its SVD.

    Least squares of the augmented system [J; sqrt(damping) I], so no Gram matrix is formed and no
    condition number squared. At damping 0 the answer is pinv(J) r: singular values
    <= rcond * sigma_max count as zero, ``rcond=None`` means sqrt(max(J.shape) eps).

    >>> damped_lstsq(np.array([[1.0, 1.0]]), np.array([3.0]), 1.0).round(12)
    array([1., 1.])
    """
    # Rows of zeros (inactive units) say nothing; kept, they turn exact zeros into rounding noise.
    told = J.any(axis=1)
    size, J, r = max(J.shape), J[told], r[told]
    if J.size == 0 and offset is None:
        return np.zeros(J.shape[1])
    if damping == 0.0:
        cut = np.sqrt(size * EPS) if rcond is None else rcond
        return _lstsq(J, r, cut)
    root = np.sqrt(damping)
    pull = np.zeros(J.shape[1]) if offset is None else -root * offset
    augmented = np.vstack([J, root * np.eye(J.shape[1])])
    return _lstsq(augmented, np.concatenate([r, pull]), 0.0)


def ridge(
    Z: ArrayLike,
    R: ArrayLike,
    *,
    slopes: ArrayLike | None = None,
    damping: ArrayLike,
    rcond: float | None = None,
) -> Array:
    """min_d 1/2 \\|diag(s_j) Z d_j - r_j\\|^2 + damping_j/2 \\|d_j\\|^2 for every row r_j of R.

    Args:
        Z: shape (..., m, n).
        R: shape (..., batch, m), or (m,) for one system.
        slopes: the s_j, shape of R; ``None`` means ones.
        damping: scalar or one value per system, shape (..., batch); 0 means minimum norm.
        rcond: the cut at damping 0, see :func:`damped_lstsq`.

    Returns:
        d of shape (..., batch, n), or (n,).

    >>> ridge([[1.0, 0.0], [0.0, 2.0]], [4.0, 4.0], damping=1.0).round(12)
    array([2. , 1.6])
    """
    Z, R = _floats(Z), _floats(R)
    if R.ndim == 1:
        lifted = None if slopes is None else _floats(slopes)[None]
        one: Array = ridge(Z, R[None], slopes=lifted, damping=damping, rcond=rcond)[0]
        return one
    S = np.ones_like(R) if slopes is None else _floats(slopes)
    leading = np.broadcast_shapes(Z.shape[:-2], R.shape[:-2], S.shape[:-2])
    systems = (*leading, R.shape[-2])
    R, S = (np.broadcast_to(v, (*systems, R.shape[-1])) for v in (R, S))
    shifts = np.broadcast_to(_floats(damping), systems)
    Z = np.broadcast_to(Z, (*leading, *Z.shape[-2:]))
    d = np.zeros((*systems, Z.shape[-1]))
    for at in np.ndindex(*systems):
        J = S[at][:, None] * Z[at[:-1]]
        d[at] = damped_lstsq(J, R[at], float(shifts[at]), rcond=rcond)
    return d


def cg(
    A: ArrayLike,
    B: ArrayLike,
    *,
    damping: ArrayLike = 0.0,
    rtol: float | None = None,
    max_steps: int | None = None,
    x0: ArrayLike | None = None,
) -> CGResult:
    """Conjugate gradient on (A + damping I) x = b, one textbook loop per system and column.

    A system stops when its residual, recomputed from x, is <= rtol \\|b\\|, at p^T A p <= 0, or
    after ``max_steps``; never on anything that another system does. b = 0 gives x = 0.

    Args:
        A: shape (..., n, n), symmetric positive semidefinite.
        B: shape (..., n, k), one system per column.
        damping: shape (...).
        rtol: default 1e-10; 0 runs exactly ``max_steps``.
        max_steps: default 10 n.
        x0: start, shape of B; default 0.

    >>> cg(np.diag([1.0, 2.0]), [[1.0], [2.0]]).iterations
    array([2])
    """
    A, B, damping = _floats(A), _floats(B), _floats(damping)
    n, k = B.shape[-2:]
    batch = np.broadcast_shapes(A.shape[:-2], B.shape[:-2], damping.shape)
    shifted = A + damping[..., None, None] * np.eye(n)
    matrices = np.broadcast_to(shifted, (*batch, n, n))
    B = np.broadcast_to(B, (*batch, n, k))
    X = np.zeros((*batch, n, k)) if x0 is None else np.broadcast_to(_floats(x0), B.shape).copy()
    steps = 10 * n if max_steps is None else max_steps
    iterations = np.zeros((*batch, k), dtype=np.int64)
    residual, converged = np.zeros((*batch, k)), np.zeros((*batch, k), dtype=np.bool_)
    for at in np.ndindex(*batch, k):
        column = (*at[:-1], slice(None), at[-1])
        X[column], iterations[at], residual[at], converged[at] = _cg_one(
            matrices[at[:-1]], B[column], X[column], 1e-10 if rtol is None else rtol, steps
        )
    return CGResult(X, iterations, residual, converged)


def _cg_one(
    A: Array, b: Array, x: Array, rtol: float, max_steps: int
) -> tuple[Array, int, float, bool]:
    """One system: x, steps taken, recomputed relative residual, converged."""
    size = float(np.linalg.norm(b))
    if size == 0.0:
        return np.zeros_like(b), 0, 0.0, True
    r = b - A @ x
    p, step = r, 0
    while step < max_steps and not (rtol > 0 and np.linalg.norm(r) <= rtol * size):
        q = A @ p
        curvature = p @ q
        if curvature <= 0.0:  # not positive definite along p, or r = 0
            break
        alpha = (r @ r) / curvature
        x = x + alpha * p
        new = r - alpha * q
        beta = (new @ new) / (r @ r)
        p, r = new + beta * p, new
        step += 1
        if rtol > 0 and np.linalg.norm(r) <= rtol * size:
            # The recursion drifts from b - A x; only the recomputed one may stop the loop,
            # otherwise the method restarts from it.
            r = b - A @ x
            p = r
    relative = float(np.linalg.norm(b - A @ x)) / size
    return x, step, relative, relative <= rtol


def _lstsq(J: Array, r: Array, rcond: float) -> Array:
    return np.asarray(np.linalg.lstsq(J, r, rcond=rcond)[0], dtype=np.float64)


def _floats(value: ArrayLike) -> Array:
    return np.asarray(value, dtype=np.float64)


def _count(batch: tuple[int, ...]) -> int:
    return int(np.prod(batch, dtype=np.int64))


def _finite(**arrays: Array) -> None:
    for name, value in arrays.items():
        bad = int(np.count_nonzero(~np.isfinite(value)))
        if bad:
            raise NonFiniteError(name, bad, value.size)
