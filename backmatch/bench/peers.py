"""The exact step against layer-wise methods of the literature, re-implemented here from the papers.

All of them solve or approximate one least-squares problem per Linear layer for its weights, with
targets from back-propagation; none has an input problem. With Z = [z 1] (m, n + 1) the layer's
input, a = Z W' its pre-activation, G = dJ/da (m, units), J a mean over the batch:

- FOOF (Benzing, 2022): dW = -(Z'Z/m + lambda I)^-1 Z'G;
- ProxProp, exact (Frerix, Möllenhoff, Moeller and Cremers, 2018): targets a - G, then the proximal
  step argmin 1/2 |Z d - (-G)|^2 + 1/(2 tau) |d|^2;
- LocoProp-S (Amid, Anil and Warmuth, 2022): T gradient steps from 0 on the local squared loss
  1/(2m) |Z d + m G|^2 + lambda/2 |d|^2.

Identities, checked before anything is timed: FOOF is this package's ``by="layer"`` partition with
exact weights at the absolute damping lambda and ``Gradient`` on the inputs; ProxProp is the same at
lambda = 1/(tau m) and ``target_step`` 1/m; LocoProp-S leaves (I - eta H)^T of that step undone.
Momentum, inner optimizers and schedules of the papers are left out: what is timed is one step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..matching import BackMatching
from ..partitioning import partition
from ..solvers import Cholesky, Gradient, Relative
from . import step
from .case import OURS, Case, Settings, dtype_name
from .plain_step import Loss

DAMPING = 0.1
#: Of ProxProp: 1 / (tau m) = DAMPING makes both problems the same but for a factor m.
LOCAL_STEPS = 10


def cases(settings: Settings) -> Iterator[Case]:
    """Per net: our step for the peers' own problem, then the whole exact step."""
    for name in step.NETS:
        for whole in (False, True):
            yield case(settings, name, settings.dtypes[0], whole)


def case(settings: Settings, name: str, dtype: torch.dtype, whole: bool) -> Case:
    """One net; ``whole`` for the exact step with input problems instead of the weights alone."""
    net, inputs = step.setting(settings, name, dtype)
    sizes, batch = step.NETS[name]
    double = copy.deepcopy(net).double()
    tau = 1 / (DAMPING * batch)

    def run(of: nn.Sequential, method: Callable[..., list[Tensor]], number: float) -> Run:
        return lambda x, y: method(of, x, lambda out: nnf.cross_entropy(out, y), number)

    if whole:
        ours = step.exact(net, _whole(net))
        ours_in_double = step.by_torch_linalg(double)
    else:
        ours = step.exact(net, weights_only(net, DAMPING))
        ours_in_double = run(double, foof, DAMPING)
    references = {
        OURS: ours_in_double,
        "foof": step.exact(double, weights_only(double, DAMPING)),
        "proxprop": step.exact(double, weights_only(double, DAMPING, target_step=1 / batch)),
        "locoprop-s": run(double, locoprop_closed_form, DAMPING),
        step.BACK_PROPAGATION: step.back_propagation(double),
    }
    errors = {key: step.compared_with(reference) for key, reference in references.items()}
    return Case(
        question="peers",
        about={
            "net": "-".join(map(str, sizes)),
            "batch": batch,
            "ours": "weights and inputs" if whole else "weights only",
            "dtype": dtype_name(dtype),
        },
        inputs=inputs,
        candidates={
            OURS: ours,
            "foof": run(net, foof, DAMPING),
            "proxprop": run(net, proxprop, tau),
            "locoprop-s": run(net, locoprop_s, DAMPING),
            step.BACK_PROPAGATION: step.back_propagation(net),
        },
        error=errors.pop(OURS),
        own_errors=errors,
        bound=step.BOUND[dtype_name(dtype)],
        residual="relative difference from the identity in float64",
    )


Run = Callable[..., list[Tensor]]


def _whole(net: nn.Sequential) -> BackMatching:
    return BackMatching(
        partition(net),
        weights=Cholesky(Relative(step.WEIGHT_DAMPING)),
        inputs=Cholesky(Relative(step.INPUT_DAMPING)),
    )


def weights_only(net: nn.Sequential, damping: float, target_step: float = 1.0) -> BackMatching:
    """Every leaf a block, exact weights at an absolute damping, gradients on the inputs."""
    return BackMatching(
        partition(net, by="layer"),
        weights=Cholesky(damping),
        inputs=Gradient(),
        target_step=target_step,
    )


def foof(net: nn.Sequential, x: Tensor, loss: Loss, damping: float) -> list[Tensor]:
    """Minus the steps of FOOF, without its averaging over time."""
    steps = []
    for Z, G in _layers(net, x, loss):
        H = Z.T @ Z / len(Z)
        H.diagonal().add_(damping)
        steps += _split(torch.cholesky_solve(Z.T @ G, torch.linalg.cholesky(H)))
    return steps


def proxprop(net: nn.Sequential, x: Tensor, loss: Loss, tau: float) -> list[Tensor]:
    """Minus the steps of ProxProp with the proximal problem solved exactly."""
    steps = []
    for Z, G in _layers(net, x, loss):
        H = Z.T @ Z
        H.diagonal().add_(1 / tau)
        steps += _split(torch.cholesky_solve(Z.T @ G, torch.linalg.cholesky(H)))
    return steps


def locoprop_s(net: nn.Sequential, x: Tensor, loss: Loss, damping: float) -> list[Tensor]:
    """Minus the steps of LocoProp-S: :data:`LOCAL_STEPS` gradient steps on every local problem.

    The step length is one over the trace of the local Hessian, which is stable for every layer.
    """
    steps = []
    for Z, G in _layers(net, x, loss):
        m = len(Z)
        length = 1 / (Z.square().sum() / m + damping)
        d = torch.zeros_like(Z.T @ G)
        for _ in range(LOCAL_STEPS):
            d = d - length * (Z.T @ (Z @ d - m * G) / m + damping * d)
        steps += _split(d)
    return steps


def locoprop_closed_form(net: nn.Sequential, x: Tensor, loss: Loss, damping: float) -> list[Tensor]:
    """What :func:`locoprop_s` must give: d = (I - (I - eta H)^T) d*, by eigenvectors of H."""
    steps = []
    for Z, G in _layers(net, x, loss):
        values, vectors = torch.linalg.eigh(Z.T @ Z / len(Z))
        length = 1 / (values.sum() + damping)
        values = values + damping
        done = (1 - (1 - length * values) ** LOCAL_STEPS) / values
        steps += _split(vectors @ (done.unsqueeze(1) * (vectors.T @ (Z.T @ G))))
    return steps


@torch.enable_grad()
def _layers(net: nn.Sequential, x: Tensor, loss: Loss) -> list[tuple[Tensor, Tensor]]:
    """(Z, G) of every Linear layer: its input with a column of ones, dJ/da of its output."""
    inputs, outputs, z = [], [], x
    for layer in net:
        if isinstance(layer, nn.Linear):
            inputs.append(torch.cat([z.detach(), z.new_ones(len(z), 1)], 1))
            z = layer(z)
            outputs.append(z)
        else:
            z = layer(z)
    grads = torch.autograd.grad(loss(z), outputs)
    return list(zip(inputs, grads, strict=True))


def _split(d: Tensor) -> list[Tensor]:
    """Columns (n + 1, units) as weight (units, n) and bias (units,)."""
    return [d[:-1].T, d[-1]]
