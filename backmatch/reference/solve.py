"""One side of one block: min_d scale/2 |J d - r|^2 + lambda/2 |d|^2, split into its systems.

``scale`` is 1/m for weights and 1 for inputs. Solvers are the dataclasses of ``backmatch`` (or
look-alikes): only class name and attributes are read, so nothing of the fast path is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .linalg import Array, damped_lstsq

#: Rows and columns of the Jacobian that belong to one independent system.
System = tuple[NDArray[np.intp], NDArray[np.intp]]

#: Solvers whose answer, carried to convergence, is the exact one.
EXACT = ("Auto", "CG", "Cholesky")

MAX_HALVINGS = 10


@dataclass(frozen=True)
class Side:
    """What :func:`minimise` needs to know of one side of a block.

    Attributes:
        residual: d -> zhat - T(d), shape (rows,).
        jacobian: d -> J of T at d, dense, shape (rows, columns).
        systems: a partition of rows and columns into independent systems.
        scale: 1/m for weights, 1 for inputs.
        shared_damping: a ``Relative`` damping makes one lambda for all systems (weights).
    """

    residual: Callable[[Array], Array]
    jacobian: Callable[[Array], Array]
    systems: Sequence[System]
    scale: float
    shared_damping: bool


def minimise(side: Side, start: Array, solver: Any, newton_steps: int = 1) -> tuple[Array, Array]:
    """The displacement that ``solver`` answers, counted from ``start``, and each system's lambda.

    One step is the full linearised one. More are Gauss-Newton on the fixed objective
    phi(d) = scale/2 \\|zhat - T(d)\\|^2 + lambda/2 \\|d\\|^2, lambda from the first linearisation,
    each step halved per system until that system's phi falls (after ten halvings the system stays
    where it is).

    >>> from types import SimpleNamespace
    >>> from backmatch.reference.solve import Side, minimise
    >>> CG = type("CG", (SimpleNamespace,), {})
    >>> J, everything = np.eye(2), [(np.arange(2), np.arange(2))]
    >>> side = Side(lambda d: np.ones(2) - d, lambda d: J, everything, 1.0, False)
    >>> minimise(side, np.zeros(2), CG(damping=1.0))[0].round(12)
    array([0.5, 0.5])
    """
    J = side.jacobian(start)
    lambdas = dampings(side, J, solver)
    d = np.zeros_like(start)
    if newton_steps == 1:
        return step(side, J, side.residual(start), solver, lambdas, d), lambdas
    for _ in range(newton_steps):
        p = step(side, side.jacobian(start + d), side.residual(start + d), solver, lambdas, d)
        d = d + _halved(side, start, d, p, lambdas)
    return d, lambdas


def step(side: Side, J: Array, rho: Array, solver: Any, lambdas: Array, d: Array) -> Array:
    """The solver's answer p to (H + lambda I) p = scale J^T rho - lambda d at one linearisation."""
    name = type(solver).__name__
    if name == "Gradient":
        return _gradient(side, J, rho)
    if name == "Scalar":
        return _scalar_step(side, J, rho, solver.kind, lambdas, d)
    if name not in EXACT:
        raise TypeError(f"the reference has no solver {name}")
    p = np.zeros_like(d)
    for (rows, columns), shift in zip(side.systems, lambdas, strict=True):
        p[columns] = damped_lstsq(
            J[np.ix_(rows, columns)],
            rho[rows],
            float(shift) / side.scale,
            rcond=getattr(solver, "rcond", None),
            offset=d[columns],
        )
    return p


def dampings(side: Side, J: Array, solver: Any) -> Array:
    """lambda of every system: an absolute number, or c tr(H)/n for ``Relative(c)``.

    Weights share one lambda, from H_W over all trainable parameters of the block; each input
    system has its own.
    """
    damping: Any = getattr(solver, "damping", 0.0)
    if type(damping).__name__ != "Relative":
        return np.full(len(side.systems), float(damping))
    squares = side.scale * J**2
    if side.shared_damping:
        mean = squares.sum() / max(J.shape[1], 1)
        return np.full(len(side.systems), damping.factor * mean)
    means = [squares[np.ix_(r, c)].sum() / max(len(c), 1) for r, c in side.systems]
    return np.array([damping.factor * mean for mean in means], dtype=np.float64)


def _gradient(side: Side, J: Array, rho: Array) -> Array:
    g: Array = side.scale * (J.T @ rho)
    return g


def _scalar_step(side: Side, J: Array, rho: Array, kind: str, lambdas: Array, d: Array) -> Array:
    """g / (c + lambda) with one c of the whole-batch H; c = 0 gives 0."""
    shift = np.zeros_like(d)
    for (_, columns), value in zip(side.systems, lambdas, strict=True):
        shift[columns] = value
    g = _gradient(side, J, rho) - shift * d
    c = _scalar_curvature(side.scale, J, _gradient(side, J, rho), kind)
    if c == 0.0:
        return np.zeros_like(d)
    scaled: Array = g / (c + shift)
    return scaled


def _scalar_curvature(scale: float, J: Array, g: Array, kind: str) -> float:
    if J.size == 0:
        return 0.0
    if kind == "trace":
        return float(scale * (J**2).sum() / J.shape[1])
    if kind == "spectral":
        return float(scale * np.linalg.norm(J, 2) ** 2)
    if kind == "rayleigh":
        return float(scale * ((J @ g) ** 2).sum() / (g @ g)) if g.any() else 0.0
    raise ValueError(f"kind must be trace, spectral or rayleigh, got {kind!r}")


def _halved(side: Side, start: Array, d: Array, p: Array, lambdas: Array) -> Array:
    """p with every system's part halved until that system's phi falls."""

    def phi(at: Array) -> Array:
        rho = side.residual(start + at)
        pairs = zip(side.systems, lambdas, strict=True)
        terms = [side.scale * (rho[r] ** 2).sum() + s * (at[c] ** 2).sum() for (r, c), s in pairs]
        return 0.5 * np.array(terms, dtype=np.float64)

    before, p = phi(d), p.copy()
    for halvings in range(MAX_HALVINGS + 1):
        rising = phi(d + p) >= before
        for (_, columns), bad in zip(side.systems, rising, strict=True):
            if bad:
                p[columns] *= 0.5 if halvings < MAX_HALVINGS else 0.0
        if not rising.any():
            break
    return p
