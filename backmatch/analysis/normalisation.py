"""Study ``norm``: how centring and batch norm condition one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .draws import Draws, generator, nothing
from .result import Row, Study, gathered, row
from .spectra import Spectra

CLAIM = (
    "Centring and batch norm condition the weight side, where the inputs' common mean and their "
    "unequal scales stand in the way; the input side stays as it is."
)

#: eps of ``nn.BatchNorm1d``.
EPS = 1e-5


def norm(
    *,
    size: int = 64,
    draws: int = 1000,
    seed: int = 0,
    check_stop: Callable[[], None] = nothing,
) -> Study:
    """A Linear block on raw, centred and batch-normalised inputs, and with a batch norm behind it.

    Claim: batch norm helps because it conditions the local Hessian of the *weight* side. Derived
    here: H_W of one output unit is X^T X / m. A mean mu common to all samples adds mu mu^T, whose
    eigenvalue |mu|^2 is of order n and grows with the width, while the others stay: kappa grows
    like n. Centring takes it away; dividing by the standard deviations, as batch norm does, takes
    unequal scales away as well (``inputs="scaled"``: every feature multiplied by its own factor,
    log-uniform on [0.1, 10]). With a bias H_W is that of [X 1]; only on centred inputs does the
    bias decouple, with the eigenvalue 1.

    A batch norm *behind* the Linear, in the same block, centres too: its Jacobian for one unit is
    gamma/s (I - 11^T/m - h h^T/m), h the normalised outputs, so H_w = (gamma/s)^2 X^T P^2 X / m.
    1 is projected out - the inputs need not be centred - and h, which is the direction of w
    itself: the rows leave that one direction out (eigenvalue (eps/(var + eps))^2 of the others';
    with a trainable gamma, which acts along h as well, it is exactly 0).

    On the input side the plain block has H_z = W^T W whatever the inputs. With batch norm behind,
    all samples are one problem, J = blockdiag(P_j) (S W (x) I), S = diag(gamma_j / s_j). As eps
    goes to 0 the P_j are projectors of rank m - 2, and by Cauchy's interlacing theorem the nonzero
    eigenvalues of J J^T lie between the extreme ones of S W W^T S, which occur m times each and
    must survive when m > 2 n_out: for W of full row rank the condition number is exactly
    kappa(S W W^T S). So batch norm changes the input side only through S, the rows' own scales.

    Not claimed: that normalising repairs correlated features, or anything about the input side.

    Args:
        size, draws, seed, check_stop: as in :func:`backmatch.analysis.init`.

    Returns:
        Rows with ``inputs`` ("uniform" or "scaled"), ``form``, ``bias``, ``side`` and ``scheme``
        (of W) as their case. Weight side: one output unit of each draw; input side: one sample,
        and the batch's own statistics in S.

    Raises:
        TypeError, ValueError: an argument that is no int or too small.

    >>> study = norm(size=8, draws=20)
    >>> raw = study.find(inputs="uniform", form="raw", bias=False, side="weight")
    >>> centred = study.find(inputs="uniform", form="centred", bias=False, side="weight")
    >>> raw["kappa"]["median"] > 10 * centred["kappa"]["median"]
    True
    """
    made = Draws(size, draws, seed, check_stop)
    return gathered("norm", CLAIM, made.options, rows(made))


def rows(draws: Draws) -> Iterator[Row]:
    """One row after the other."""
    for inputs in ("uniform", "scaled"):
        for form in (*FORMS, BEHIND):
            for bias in (False, True) if form in FORMS else (False,):
                pairs = _pairs(draws, inputs)
                parts = [weight_side(W, X, form, bias) for W, X in pairs]
                case = {"inputs": inputs, "form": form, "bias": bias, "side": "weight"}
                yield row("norm", {**case, "scheme": "gaussian"}, Spectra.joined(parts))
    for scheme in ("gaussian", "orthonormal"):
        for form in ("raw", BEHIND):
            case = {"inputs": "uniform", "form": form, "bias": False, "side": "input"}
            parts = [input_side(W, X, form) for W, X in draws.fourfold.pairs(scheme)]
            yield row("norm", {**case, "scheme": scheme}, Spectra.joined(parts))


def _pairs(draws: Draws, inputs: str) -> Iterator[tuple[Tensor, Tensor]]:
    own = generator(draws.seed, 3)
    for W, X in draws.pairs():
        if inputs == "scaled":
            exponents = torch.rand(len(X), 1, draws.size, dtype=X.dtype, generator=own)
            yield W, X * 10 ** (2 * exponents - 1)
        else:
            yield W, X


def _centred(X: Tensor) -> Tensor:
    return X - X.mean(1, keepdim=True)


def _normalised(X: Tensor) -> Tensor:
    centred = _centred(X)
    return centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()


#: form -> what it makes of the inputs X (draws, m, n) in front of the Linear.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda X: X,
    "centred": _centred,
    "batch norm before": _normalised,
}
BEHIND = "batch norm behind"


def weight_side(W: Tensor, X: Tensor, form: str, bias: bool) -> Spectra:
    if form == BEHIND:
        return _behind(W[:, :1, :], X)
    Z = FORMS[form](X)
    if bias:
        Z = torch.cat([Z, torch.ones_like(Z[..., :1])], -1)
    return Spectra.of_jacobians(Z, 1 / X.shape[1])


def input_side(W: Tensor, X: Tensor, form: str) -> Spectra:
    """The distinct eigenvalues: with batch norm behind each stands there m times."""
    return Spectra.of_jacobians(W if form == "raw" else _scales(W, X) * W)


def _behind(w: Tensor, X: Tensor) -> Spectra:
    """Without w's own direction; w of shape (draws, 1, n)."""
    m = X.shape[1]
    h = _normalised(X @ w.mT)
    projected = _centred(X) - h @ (h.mT @ X) / m
    return Spectra.of_jacobians(_scales(w, X) * projected, 1 / m).without_smallest()


def _scales(W: Tensor, X: Tensor) -> Tensor:
    """1/s_j as a column, shape (draws, n_out, 1)."""
    outputs = _centred(X @ W.mT)
    variances = outputs.square().mean(1).unsqueeze(-1)
    return (variances + EPS).rsqrt()
