"""Study ``init``: how the initialisation conditions one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .draws import Draws, nothing
from .result import Row, Study, gathered, row
from .schemes import SCHEMES
from .spectra import Spectra

CLAIM = (
    "An orthonormal matrix has the local Hessian of a multiple of the identity on the input side; "
    "Gaussian, Xavier and He differ in its scale alone; none acts on the weight side."
)

Slope = Callable[[Tensor], Tensor]

#: activation -> its slope at a pre-activation.
SLOPES: dict[str, Slope] = {
    "none": torch.ones_like,
    "tanh": lambda a: 1 - torch.tanh(a).square(),
    "relu": lambda a: (a > 0).to(a),
}


def init(
    *,
    size: int = 64,
    draws: int = 1000,
    seed: int = 0,
    check_stop: Callable[[], None] = nothing,
) -> Study:
    """Initialisations of a square Linear block, without and with an activation.

    Claim: orthonormal initialisation helps because it makes the local Hessian of the *input* side
    perfectly conditioned. Derived here: the block act(W z) has J_z = D W with D the diagonal of
    slopes, so without an activation H_z = W^T W, which is c^2 I for W = c Q. A factor in front
    of W multiplies H_z by its square and leaves the condition number as it is: Gaussian, Xavier
    and He initialisation of a square matrix differ in ``trace_mean`` alone. For one unit of the
    weight side J_w = D X, H_w = X^T D^2 X / m: without an activation no W in it.

    Not claimed: anything about whole nets. With ReLU about half the rows of W drop out: the rank
    is about n/2, and *on the range* the Gaussian matrix is conditioned hardly worse than the
    orthonormal one. With tanh the slopes spoil the orthonormal block, too.

    Args:
        size: n; W is n x n, X has 4n samples of n features, uniform on [0.5, 1.5].
        draws: pairs (W, X); the input side without activation takes four times as many W.
        seed: of the draws.
        check_stop: called now and then; raises to end the study.

    Returns:
        Rows with ``scheme``, ``activation`` and ``side`` as their case. Input side: one sample
        of each draw; weight side: one output unit of each draw, without bias.

    Raises:
        TypeError, ValueError: an argument that is no int or too small.

    >>> study = init(size=8, draws=20)
    >>> found = study.find(scheme="orthonormal", activation="none", side="input")
    >>> round(found["kappa"]["median"], 9)
    1.0
    """
    made = Draws(size, draws, seed, check_stop)
    return gathered("init", CLAIM, made.options, rows(made))


def rows(draws: Draws) -> Iterator[Row]:
    """One row after the other."""
    for activation in SLOPES:
        for scheme in SCHEMES:
            case = {"scheme": scheme, "activation": activation, "side": "input"}
            # Only without slopes is kappa's median a figure of its own, and worth the draws.
            some = draws.fourfold if activation == "none" else draws
            yield row("init", case, input_side(some, scheme, SLOPES[activation]))
        # A factor in front of W is no scheme of its own for the slopes of a ReLU.
        for scheme in ("gaussian", "he-normal", "orthonormal"):
            case = {"scheme": scheme, "activation": activation, "side": "weight"}
            yield row("init", case, weight_side(draws, scheme, SLOPES[activation]))


def input_side(draws: Draws, scheme: str, slope: Slope) -> Spectra:
    pairs = zip(draws.weights(scheme), draws.samples(), strict=True)
    return Spectra.joined([Spectra.of_jacobians(slope(W @ z) * W) for W, z in pairs])


def weight_side(draws: Draws, scheme: str, slope: Slope) -> Spectra:
    """Of the first output unit."""
    return Spectra.joined(
        [
            Spectra.of_jacobians(slope(X @ W[:, 0, :, None]) * X, 1 / draws.m)
            for W, X in draws.pairs(scheme)
        ]
    )
