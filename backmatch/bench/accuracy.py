"""How wrong an answer is, in units of the rounding that no solver can avoid.

For every system |A x - b| / (|A| |x| n eps) in the infinity norm, evaluated in float64 and with the
eps of the answer's dtype. A backward stable solver stays below a few units for any condition
number. The worst over the batch is what counts, and NaN counts as infinite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Above this an answer is wrong and is not timed. The residual's own bound grows with n, hence the
#: n in the unit; a stable factorisation stays one or two orders below.
WORST = 10.0


class WrongAnswerError(Exception):
    """An answer that must not be timed; the text says how wrong it is."""


def spd_residual(A: Tensor, B: Tensor, X: Tensor, damping: float) -> float:
    """Worst scaled residual of ``(A + damping I) X = B``.

    Args:
        A: shape (batch, n, n), read in full.
        B: shape (batch, n, k).
        X: shape (batch, n, k), the answer.
        damping: one for all.
    """
    n, eps = A.shape[-1], torch.finfo(X.dtype).eps
    worst = 0.0
    for part in _parts(A.shape[0], 24 * n * n):
        matrix, x = A[part].double(), X[part].double()
        residual = matrix @ x + damping * x - B[part].double()
        size = matrix.abs().sum(-1).amax(-1) + damping
        worst = max(worst, _worst(residual.abs().amax(1), size.unsqueeze(-1) * x.abs().amax(1)))
    return worst / (n * eps)


def scaled_gram_residual(K: Tensor, D: Tensor, R: Tensor, X: Tensor, damping: float) -> float:
    """Worst scaled residual of x = D y, (D K D + damping I) y = R.

    Multiplied by D from the left the system becomes (D^2 K + damping I) x = D R, which holds x
    alone.

    Args:
        K: shape (n, n).
        D, R: shape (batch, n).
        X: shape (batch, n), the answer.
        damping: one for all, > 0.
    """
    n, eps = K.shape[-1], torch.finfo(X.dtype).eps
    K, D, R, x = K.double(), D.double(), R.double(), X.double()
    residual = D.square() * (x @ K) + damping * x - D * R
    size = (D.square() * K.abs().sum(-1)).amax(-1) + damping
    return _worst(residual.abs().amax(-1), size * x.abs().amax(-1)) / (n * eps)


def gram_error(Z: Tensor, w: Tensor, G: Tensor) -> float:
    """Worst |G - Z^T diag(w) Z| / (|Z|^T diag|w| |Z| m eps), the largest entry against the largest.

    Args:
        Z: shape (m, n).
        w: shape (batch, m).
        G: shape (batch, n, n), the answer.
    """
    (m, n), eps = Z.shape, torch.finfo(G.dtype).eps
    worst, Z = 0.0, Z.double()
    for part in _parts(w.shape[0], 8 * n * (m + 3 * n)):
        weights = w[part].double().unsqueeze(-2)
        error = (G[part].double() - (Z.mT * weights) @ Z).abs().amax((1, 2))
        # The largest entry of a positive semi-definite bound lies on the diagonal.
        size = (weights.abs() @ Z.square()).amax((1, 2))
        worst = max(worst, _worst(error, size))
    return worst / (m * eps)


def relative_difference(answer: Tensor, expected: Tensor) -> float:
    """|answer - expected| / |expected| in the Euclidean norm of all entries, in float64."""
    difference = torch.linalg.vector_norm(answer.double() - expected.double())
    return _worst(difference, torch.linalg.vector_norm(expected.double()))


def require(name: str, error: float, bound: float) -> float:
    """``error`` if it is within ``bound``.

    Raises:
        WrongAnswerError: it is not, or is NaN.
    """
    if not error <= bound:
        raise WrongAnswerError(f"{name}: error {error:.2e}, at most {bound:.2e} is right")
    return error


def _worst(error: Tensor, size: Tensor) -> float:
    """Largest quotient; 0/0 is 0, NaN is infinite."""
    quotient = torch.where(error == 0, 0.0, error / size)
    value = float(quotient.amax()) if quotient.numel() else 0.0
    return math.inf if math.isnan(value) else value


def _parts(batch: int, bytes_each: int) -> list[slice]:
    """Slices of the batch whose float64 copies stay small."""
    step = max(1, 2**27 // max(1, bytes_each))
    return [slice(start, start + step) for start in range(0, batch, step)]


def relative_residuals(A: Tensor, B: Tensor, X: Tensor, damping: float) -> float:
    """Worst |(A + damping I) x - b| / |b| over batch and columns, Euclidean, in float64."""
    worst = 0.0
    for part in _parts(A.shape[0], 24 * A.shape[-1] ** 2):
        x, b = X[part].double(), B[part].double()
        residual = A[part].double() @ x + damping * x - b
        size = torch.linalg.vector_norm(b, dim=1)
        worst = max(worst, _worst(torch.linalg.vector_norm(residual, dim=1), size))
    return worst
