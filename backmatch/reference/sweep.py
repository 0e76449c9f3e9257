"""The whole backward sweep from dense Jacobians: a plain loop over the blocks, top first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .inverse import layer_inverse
from .jacobian import BlockMap, is_coupled
from .linalg import Array
from .solve import Side, System, minimise

#: Modules that act entry by entry (or only reshape): units of a Linear, channels of a Conv2d, stay
#: apart.
ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU,
    nn.Identity, nn.Flatten, nn.Dropout,
)  # fmt: skip


@dataclass(frozen=True)
class BlockResult:
    """What the sweep found for one block.

    Attributes:
        name: the block's name in its Sequential, else its index.
        displacement: r_b, shape of z_b.
        weight_step: d_W by parameter name.
        input_step: r_{b-1}, shape of z_{b-1}; ``None`` for the bottom block.
        weight_damping: lambda of every weight system (of the last pass).
        input_damping: mu of every input system (of the last pass).
        coupled: whether the inputs form one joint problem over the batch.
    """

    name: str
    displacement: Array
    weight_step: dict[str, Array]
    input_step: Array | None
    weight_damping: Array
    input_damping: Array
    coupled: bool


@dataclass(frozen=True)
class SweepResult:
    """Loss, output z_B and the blocks, bottom first."""

    loss: float
    output: Array
    blocks: list[BlockResult]


@dataclass(frozen=True)
class _Rules:
    """The options of one sweep, as given to :func:`sweep`."""

    weights: Any
    inputs: Any
    order: str
    passes: int
    newton_steps: int


def sweep(
    blocks: nn.Sequential | Iterable[nn.Module],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    weights: Any,
    inputs: Any,
    target_step: float = 1.0,
    reduction: str = "mean",
    order: str = "simultaneous",
    passes: int = 1,
    newton_steps: int = 1,
) -> SweepResult:
    """What ``BackMatching.backward`` must compute, the slow way, in float64.

    Works on float64 copies: model, grads and buffers stay as they are, the random state ends as
    after one forward pass. ``CG`` means its converged answer whatever its cap. Blocks must be
    small: every Jacobian is formed dense, one reverse pass per output entry.

    Args:
        blocks: the chain, bottom first.
        x: input batch of shape (m, ...); dimension 0 is the sample.
        loss: z_B -> scalar.
        weights: a solver of section "solvers", or a callable (name, block) -> solver.
        inputs: likewise.
        target_step: s in r_B = -s m dJ/dz_B.
        reduction: "mean" or "sum" ("sum" drops the factor m).
        order: "simultaneous" or "sequential".
        passes: weight and input steps per block, sequential order only.
        newton_steps: Gauss-Newton steps per problem.

    >>> CG = type("CG", (), {"damping": 0.0})
    >>> f, y = nn.Linear(2, 1, bias=False), torch.tensor([[3.0], [5.0]])
    >>> half_mse = lambda z: (z - y).square().sum() / 4
    >>> result = sweep([f], torch.eye(2), half_mse, weights=CG(), inputs=CG())
    >>> (f.weight.detach().numpy() + result.blocks[0].weight_step["weight"]).round(6)
    array([[3., 5.]])
    """
    if order not in ("simultaneous", "sequential") or reduction not in ("mean", "sum"):
        raise ValueError(f"unknown order {order!r} or reduction {reduction!r}")
    if passes != 1 and order != "sequential":
        raise ValueError("passes > 1 needs order='sequential'")
    if x.shape[:1] == (0,):
        raise ValueError("x must hold at least one sample")
    rules = _Rules(weights, inputs, order, passes, newton_steps)
    maps = _forward(blocks, x)
    output = maps[-1][1].out.clone().requires_grad_()
    with torch.enable_grad():
        value = loss(output)
    state = torch.get_rng_state()
    (grad,) = torch.autograd.grad(value, output)
    factor = target_step * (maps[-1][1].m if reduction == "mean" else 1)
    r: Array | None = -factor * grad.numpy()
    results: list[BlockResult] = []
    try:
        for index, (name, block) in reversed(list(enumerate(maps))):
            assert r is not None  # only the bottom block hands nothing down
            results.insert(0, _match(name, block, r, rules, bottom=index == 0))
            r = results[0].input_step
    finally:
        torch.set_rng_state(state)
    return SweepResult(value.item(), output.detach().numpy(), results)


def _forward(blocks: nn.Sequential | Iterable[nn.Module], x: Tensor) -> list[tuple[str, BlockMap]]:
    if isinstance(blocks, nn.Sequential):
        names, modules = list(blocks._modules), list(blocks)
    else:
        modules = list(blocks)
        names = [str(i) for i in range(len(modules))]
    if not modules:
        raise ValueError("blocks must hold at least one module")
    copies = [module.double() for module in copy.deepcopy(modules)]
    z = x.detach().double() if x.is_floating_point() else x
    maps: list[tuple[str, BlockMap]] = []
    for name, module in zip(names, copies, strict=True):
        maps.append((name, BlockMap(module, z)))
        z = maps[-1][1].out
    return maps


def _match(name: str, block: BlockMap, r: Array, rules: _Rules, *, bottom: bool) -> BlockResult:
    """Both problems of one block."""
    target = block.out.numpy().ravel() + r.ravel()
    weight_solver = _choose(rules.weights, name, block.module)
    input_solver = None if bottom else _choose(rules.inputs, name, block.module)
    coupled = not bottom and is_coupled(
        block.module, block.input_jacobian(block.zero_w, block.zero_z), block.m
    )
    d_w, d_z = block.zero_w, block.zero_z
    lambdas, mus = np.zeros(0), np.zeros(0)
    for _ in range(rules.passes):
        side = _weight_side(block, target, d_z)
        move, lambdas = minimise(side, d_w, weight_solver, rules.newton_steps)
        d_w = d_w + move
        if bottom:
            continue
        # Simultaneous: the input problem does not see the weights' move.
        at = d_w if rules.order == "sequential" else block.zero_w
        if type(input_solver).__name__ == "LayerInverse":
            move, mus = layer_inverse(block, target, at, d_z, input_solver)
        else:
            side = _input_side(block, target, at, coupled)
            move, mus = minimise(side, d_z, input_solver, rules.newton_steps)
        d_z = d_z + move
    return BlockResult(
        name,
        r.reshape(tuple(block.out.shape)),
        block.unflatten(d_w),
        None if bottom else d_z.reshape(tuple(block.z.shape)),
        lambdas,
        mus,
        coupled,
    )


def _choose(solver: Any, name: str, module: nn.Module) -> Any:
    return solver(name, module) if callable(solver) else solver


def _weight_side(block: BlockMap, target: Array, d_z: Array) -> Side:
    return Side(
        residual=lambda d: target - block.value(d, d_z),
        jacobian=lambda d: block.weight_jacobian(d, d_z),
        systems=weight_systems(block),
        scale=1.0 / block.m,
        shared_damping=True,
    )


def _input_side(block: BlockMap, target: Array, d_w: Array, coupled: bool) -> Side:
    count = 1 if coupled else block.m
    rows = np.array_split(np.arange(block.out.numel()), count)
    columns = np.array_split(np.arange(block.z.numel()), count)
    return Side(
        residual=lambda d: target - block.value(d_w, d),
        jacobian=lambda d: block.input_jacobian(d_w, d),
        systems=list(zip(rows, columns, strict=True)),
        scale=1.0,
        shared_damping=False,
    )


def weight_systems(block: BlockMap) -> list[System]:
    """One system per output unit of a Linear, or output channel of a Conv2d, else one in all.

    Only where that layer stands alone among elementwise and reshaping modules; a Conv2d must pad
    with zeros. Rows are those of the block's output, (m, ..., units) after a Linear and
    (m, channels, H, W) after a Conv2d, flattened or not.

    >>> f = BlockMap(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double(), torch.ones(1, 2).double())
    >>> [columns.tolist() for _, columns in weight_systems(f)]
    [[0, 1, 6], [2, 3, 7], [4, 5, 8]]
    >>> f = BlockMap(nn.Conv2d(1, 2, 1).double(), torch.ones(1, 1, 1, 3).double())
    >>> [(rows.tolist(), columns.tolist()) for rows, columns in weight_systems(f)]
    [([0, 1, 2], [0, 2]), ([3, 4, 5], [1, 3])]
    """
    rows, columns = np.arange(block.out.numel()), np.arange(block.zero_w.size)
    leaves = list(_leaves(block.module))
    layers = [leaf for leaf in leaves if type(leaf) not in ELEMENTWISE]
    if len(layers) != 1:
        return [(rows, columns)]
    layer = layers[0]
    if type(layer) is nn.Linear:
        units, spread = layer.out_features, 1
    elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        units = layer.out_channels
        spread = block.out.numel() // (block.m * units)  # H * W
    else:
        return [(rows, columns)]
    labels = block.unflatten(block.zero_w.copy())
    for value in labels.values():  # weight (units, ...) or bias (units,)
        value[...] = np.arange(units).reshape(-1, *[1] * (value.ndim - 1))
    unit = np.concatenate([np.zeros(0), *[value.ravel() for value in labels.values()]])
    return [(rows[rows // spread % units == j], columns[unit == j]) for j in range(units)]


def _leaves(module: nn.Module) -> Iterable[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _leaves(child)
    else:
        yield module
