"""A whole exact step of a net against back-propagation and the same step in torch.linalg.

Blocks Linear + ReLU, direct solves on both sides, the default dampings. Forward pass, loss and
the writing of ``.grad`` count for all. Our answer and the one by torch.linalg are compared with the
latter in float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .. import models
from ..matching import BackMatching
from ..partitioning import partition
from ..solvers import Cholesky, Relative
from .accuracy import relative_difference
from .case import OURS, Case, Settings, dtype_name
from .plain_step import plain_step

#: name -> (sizes of the layers, batch)
NETS = {"digits": ((64, 128, 128, 10), 128), "mlp": ((784, 512, 512, 10), 256)}
WEIGHT_DAMPING, INPUT_DAMPING = 0.1, 1e-2
BACK_PROPAGATION = "back-propagation"
#: Relative differences that rounding explains: the damping bounds the condition number by some
#: thousands, and a step is a chain of solves.
BOUND = {"float32": 2e-3, "float64": 1e-9}
_INPUT_SETS = 4


def cases(settings: Settings) -> Iterator[Case]:
    """One case per net, in the first dtype."""
    for name in NETS:
        yield case(settings, name, settings.dtypes[0])


def case(settings: Settings, name: str, dtype: torch.dtype) -> Case:
    """One net."""
    net, inputs = setting(settings, name, dtype)
    sizes, batch = NETS[name]
    matcher = BackMatching(
        partition(net),
        weights=Cholesky(Relative(WEIGHT_DAMPING)),
        inputs=Cholesky(Relative(INPUT_DAMPING)),
    )
    double = copy.deepcopy(net).double()
    return Case(
        question="step",
        about={
            "net": "-".join(map(str, sizes)),
            "batch": batch,
            "dtype": dtype_name(dtype),
        },
        inputs=inputs,
        candidates={
            OURS: exact(net, matcher),
            BACK_PROPAGATION: back_propagation(net),
            "torch.linalg": by_torch_linalg(net),
        },
        error=compared_with(by_torch_linalg(double)),
        own_errors={BACK_PROPAGATION: compared_with(back_propagation(double))},
        bound=BOUND[dtype_name(dtype)],
        residual="relative difference from the same step in float64",
    )


def setting(
    settings: Settings, name: str, dtype: torch.dtype
) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A seeded net and batches of inputs (m, features) with labels (m,)."""
    sizes, batch = NETS[name]
    generator = settings.generator(len(name))
    # Initial weights drawn without touching the process's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.mlp(sizes[0], sizes[1:-1], sizes[-1])
    batches = [
        (
            torch.rand(batch, sizes[0], generator=generator, dtype=dtype).to(settings.device),
            torch.randint(sizes[-1], (batch,), generator=generator).to(settings.device),
        )
        for _ in range(_INPUT_SETS)
    ]
    return net.to(settings.device, dtype), batches


def exact(net: nn.Module, matcher: BackMatching) -> Callable[..., list[Tensor]]:
    """One ``matcher.backward`` from empty grads."""

    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        net.zero_grad()
        matcher.backward(x, lambda out: nnf.cross_entropy(out, y))
        return grads(net)

    return run


def back_propagation(net: nn.Module) -> Callable[..., list[Tensor]]:
    """One ``loss.backward`` from empty grads."""

    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        net.zero_grad()
        torch.autograd.backward(nnf.cross_entropy(net(x), y))
        return grads(net)

    return run


def by_torch_linalg(net: nn.Sequential) -> Callable[..., list[Tensor]]:
    """:func:`plain_step` with the dampings of this file."""

    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        return plain_step(
            net,
            x,
            lambda out: nnf.cross_entropy(out, y),
            weights=WEIGHT_DAMPING,
            inputs=INPUT_DAMPING,
        )

    return run


def compared_with(reference: Callable[..., list[Tensor]]) -> Callable[[Any, Any], float]:
    """Error of an answer: its relative difference from ``reference`` on float64 inputs.

    The reference is computed once for the inputs that all candidates are checked on.
    """

    @functools.lru_cache(maxsize=1)
    def expected(x: Tensor, y: Tensor) -> Tensor:
        return joined(reference(x.double(), y))

    def error(inputs: tuple[Tensor, Tensor], answer: list[Tensor]) -> float:
        return relative_difference(joined(answer), expected(*inputs))

    return error


def grads(net: nn.Module) -> list[Tensor]:
    """The ``.grad`` of all parameters, in order."""
    found = [parameter.grad for parameter in net.parameters()]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


def joined(parts: list[Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([part.flatten() for part in parts])
