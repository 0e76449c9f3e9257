"""The nets of the studies ``depth``, ``width``, ``training``, and the spectra of their blocks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import init

from ..blocks import Residual
from .spectra import Spectra
from .systems import systems

#: name -> what its blocks z -> act(..) of equal width are; W Gaussian unless it says otherwise.
FAMILIES = {
    "plain": "act(Wz + b), He initialisation for ReLU",
    "orthonormal": "act(cQz + b), Q orthonormal",
    "batch norm": "act(batch norm(Wz))",
    "skip": "z + aW act(z) + b, a = 0.25",
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
#: a of the skip blocks.
BRANCH = 0.25


def net(
    family: str, activation: str, sizes: Sequence[int], own: torch.Generator, classes: int = 0
) -> nn.Sequential:
    """A float64 chain whose items are the blocks.

    Args:
        family: of :data:`FAMILIES`. A block that changes the width is a plain one without a skip.
        activation: of :data:`ACTIVATIONS`.
        sizes: widths, the input's first.
        own: draws the weights; biases start at 0.
        classes: outputs of a Linear on top; 0 for none.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights when they are made
        blocks = [_block(family, activation, shape, own) for shape in itertools.pairwise(sizes)]
        if classes:
            head = nn.Linear(sizes[-1], classes).double()
            _fill(head, "plain", 1.0, own)
            blocks.append(head)
        return nn.Sequential(*blocks)


def _block(family: str, activation: str, shape: tuple[int, int], own: torch.Generator) -> nn.Module:
    act, gain = ACTIVATIONS[activation](), init.calculate_gain("relu")
    linear = nn.Linear(*shape, bias=family != "batch norm").double()
    if family == "skip" and shape[0] == shape[1]:
        _fill(linear, family, BRANCH, own)
        return Residual(nn.Sequential(act, linear))
    _fill(linear, family, gain if activation == "relu" else 1.0, own)
    if family == "batch norm":
        return nn.Sequential(linear, nn.BatchNorm1d(shape[1]).double(), act)
    return nn.Sequential(linear, act)


def _fill(linear: nn.Linear, family: str, gain: float, own: torch.Generator) -> None:
    if family == "orthonormal":
        init.orthogonal_(linear.weight, gain, generator=own)
    else:
        init.normal_(linear.weight, std=gain * linear.in_features**-0.5, generator=own)
    if linear.bias is not None:
        init.zeros_(linear.bias)


def spectra(model: nn.Sequential, x: Tensor, side: str, most: int | None = None) -> list[Spectra]:
    """The systems of every block at the inputs that ``x`` gives it, bottom first.

    Batch norms use the statistics of ``x``. On the weight side they are part of the block: a
    unit's own scale, along its weights, moves the outputs as its gamma does, so that their
    difference is an eigenvector of eigenvalue 0. On the input side the statistics are held fixed,
    so that the samples are independent (for the difference see
    :func:`backmatch.analysis.norm`). ``most`` systems of a block are decomposed, ``None`` for
    all. The model is not changed.
    """
    held = copy.deepcopy(model)
    norms = [part for part in held.modules() if isinstance(part, nn.BatchNorm1d)]
    for part in norms:
        part.momentum = 1.0
    with torch.no_grad():
        inputs = [x]
        for block in held.train():
            inputs.append(block(inputs[-1]))
    if side == "input":
        held.eval()
        inputs = [z[:most] for z in inputs]
    return [systems(block, z, side, most) for block, z in zip(held, inputs, strict=False)]
