"""Study ``skip``: how a skip connection conditions one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .draws import Draws, nothing
from .result import Row, Study, gathered, row
from .spectra import Spectra

CLAIM = (
    "A skip connection beside a branch of small weight brings the input side close to the "
    "identity; the weight side stays as it is."
)

#: Weights a of the branch in T = z + a f(z).
WEIGHTS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
#: Those of the weight side.
FEW = (0.1, 0.5, 1.0, 2.0)

#: name of the block -> scheme of its W, Jacobian of its input side from W and one sample z.
BLOCKS: dict[str, tuple[str, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "z + aWz": ("gaussian", lambda W, z, a: _identity(W) + a * W),
    "z + aQz": ("orthonormal", lambda Q, z, a: _identity(Q) + a * Q),
    # z - 1 has the sign of either half of the time, like the input of a ReLU behind a norm.
    "z + aW relu(z - 1)": ("gaussian", lambda W, z, a: _identity(W) + a * W * _active(z - 1).mT),
    "relu(z + aWz)": (
        "gaussian",
        lambda W, z, a: _active(z + a * W @ z) * (_identity(W) + a * W),
    ),
}
#: The same W without a skip, for comparison.
PLAIN = "Wz"


def skip(
    *,
    size: int = 64,
    draws: int = 1000,
    seed: int = 0,
    check_stop: Callable[[], None] = nothing,
) -> Study:
    """Blocks with a skip connection, the weight a of the other branch swept.

    Claim: a skip connection helps because it conditions the local Hessian of the *input* side.
    Derived here: T(z) = z + a W z has J_z = I + a W, whose singular values lie in
    [1 - a|W|, 1 + a|W|], so that kappa(H_z) <= ((1 + a|W|) / (1 - a|W|))^2 for a|W| < 1. For
    W_ij ~ N(0, 1/n) and n to infinity the interval is :func:`large_n_kappa`'s; at a = 1 it reaches
    0. The parameters stand in a W z alone, so J_W is that of the plain block times a: the
    condition number of the weight side does not change at all.

    Not claimed: that any skip connection helps. From a = 1 on the block is as badly conditioned
    as the plain one or worse, and an orthonormal branch is no remedy: z + aQz has the condition
    number ((1 + a) / (1 - a))^2 for large n, where Qz alone has 1.

    Args:
        size, draws, seed, check_stop: as in :func:`backmatch.analysis.init`.

    Returns:
        Rows with ``block``, ``weight`` (a; ``None`` for the plain block Wz) and ``side`` as their
        case; ``large_n`` is the limit of kappa, where it is known. Input side: one sample of each
        draw (uniform on [0.5, 1.5]); weight side: one output unit, without bias.

    Raises:
        TypeError, ValueError: an argument that is no int or too small.

    >>> study = skip(size=8, draws=20)
    >>> study.find(block="z + aWz", weight=0.1, side="input")["kappa"]["median"] < 2
    True
    """
    made = Draws(size, draws, seed, check_stop)
    return gathered("skip", CLAIM, made.options, rows(made))


def rows(draws: Draws) -> Iterator[Row]:
    """One row after the other."""
    plain = Spectra.joined([Spectra.of_jacobians(W) for W in draws.fourfold.weights()])
    yield row("skip", {"block": PLAIN, "weight": None, "side": "input"}, plain)
    for name in BLOCKS:
        for a in WEIGHTS:
            case = {"block": name, "weight": a, "side": "input"}
            yield {**row("skip", case, input_side(draws, name, a)), **_limit(name, a)}
    for weight in (None, *FEW):
        name = PLAIN if weight is None else "z + aWz"
        case = {"block": name, "weight": weight, "side": "weight"}
        yield row("skip", case, weight_side(draws, weight))


def input_side(draws: Draws, block: str, a: float) -> Spectra:
    scheme, jacobian = BLOCKS[block]
    pairs = zip(draws.weights(scheme), draws.samples(), strict=True)
    return Spectra.joined([Spectra.of_jacobians(jacobian(W, z, a)) for W, z in pairs])


def weight_side(draws: Draws, weight: float | None) -> Spectra:
    """J_w = a X, for any output unit; a = 1 for the plain block."""
    factor = 1.0 if weight is None else weight
    parts = [Spectra.of_jacobians(factor * X, 1 / draws.m) for X in draws.inputs()]
    return Spectra.joined(parts)


def large_n_kappa(a: float) -> float:
    """kappa((I + aW)^T (I + aW)) for W_ij ~ N(0, 1/n), n to infinity and a < 1.

    Derived here from the self-consistent equation of the Hermitised matrix W + I/a, known in free
    probability: -1/g = w + g - s / (w + g) with s = 1/a^2 and w the singular value. With u = w + g
    it reads w = u + u / (u^2 - s); the spectrum ends where dw/du = 0, (u^2 - s)^2 = u^2 + s, which
    with q = sqrt(1 + 8s) gives w^2 = (q +- 3)^3 / (8 (q +- 1)).

    >>> round(large_n_kappa(0.1), 3), round(large_n_kappa(0.25), 3), round(large_n_kappa(0.5), 2)
    (1.764, 4.249, 22.75)
    """
    q = math.sqrt(1 + 8 / a**2)
    return math.pow((q + 3) / (q - 3), 3) * (q - 1) / (q + 1)


def _limit(block: str, a: float) -> dict[str, float]:
    if a >= 1:
        return {}
    if block == "z + aWz":
        return {"large_n": large_n_kappa(a)}
    return {"large_n": ((1 + a) / (1 - a)) ** 2} if block == "z + aQz" else {}


def _identity(W: Tensor) -> Tensor:
    return torch.eye(W.shape[-1], dtype=W.dtype)


def _active(pre_activation: Tensor) -> Tensor:
    """Slopes of ReLU, as a column."""
    return (pre_activation > 0).to(pre_activation)
