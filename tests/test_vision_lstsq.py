"""Both steps of single vision blocks against ``numpy.linalg.lstsq`` on a dense Jacobian.

Independent of ``backmatch.reference``: the Jacobians come from ``torch.autograd.functional``, the
answers from the augmented system [J; sqrt(m lambda) I], or at damping 0 from the minimum norm
solution with the specified cut, one system per sample, output channel or block.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from vision_modules import Residual, stirred

import backmatch as bm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

Conv = nn.Conv2d
EPS = np.finfo(np.float64).eps


@dataclass(frozen=True)
class Case:
    """A block on a batch.

    Attributes:
        layers: the block.
        shape: of its input.
        channels: output channels whose weights are systems of their own, else ``None``.
        coupled: whether the inputs of all samples are one system.
    """

    layers: tuple[nn.Module, ...]
    shape: tuple[int, ...] = (3, 2, 3, 4)
    channels: int | None = None
    coupled: bool = False


def conv(*arguments: Any, **options: Any) -> Conv:
    """A seeded convolution."""
    torch.manual_seed(1)
    return Conv(*arguments, **options)


def bn(channels: int, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.1, **options)


CASES = {
    "conv": Case((conv(2, 3, 2),), channels=3),
    "conv-strided": Case((conv(2, 3, (2, 3), (2, 1), (1, 0)),), channels=3),
    "conv-same-even": Case((conv(2, 2, (2, 4), padding="same", bias=False),), channels=2),
    "conv-grouped-dilated": Case((conv(4, 6, 2, groups=2, dilation=2),), (2, 4, 3, 4), channels=6),
    "conv-depthwise": Case((conv(2, 4, 2, padding=1, groups=2), nn.Tanh()), channels=4),
    "conv-relu": Case((conv(2, 3, 3, padding=1), nn.ReLU()), channels=3),
    "conv-gelu-flatten": Case((conv(2, 3, 2), nn.GELU(), nn.Flatten()), channels=3),
    "conv-bn-relu": Case((conv(2, 3, 2), bn(3), nn.ReLU()), coupled=True),
    "conv-bn-eval": Case((conv(2, 3, 2), bn(3).eval(), nn.LeakyReLU(0.1))),
    "conv-relu-max": Case((conv(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2, stride=1))),
    "conv-avg": Case((conv(2, 3, 2, bias=False), nn.AvgPool2d((1, 2)))),
    "conv-relu-avg": Case(
        (conv(4, 6, 2, groups=2, padding=1), nn.ReLU(), nn.AvgPool2d(2)), (2, 4, 3, 4)
    ),
    "conv-bn-avg": Case(
        (conv(2, 3, 2), bn(3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), coupled=True
    ),
    "conv-bn-eval-avg": Case((conv(2, 3, 2), bn(3).eval(), nn.GELU(), nn.AvgPool2d(2, 1, 1))),
    "conv-max-avg": Case((conv(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.AvgPool2d(1, 2))),
    "conv-conv": Case((conv(2, 2, 2), nn.Tanh(), conv(2, 2, 2))),
    "conv-head": Case((conv(2, 2, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))),
    "bn": Case((bn(2),), coupled=True),
    "bn-momentum": Case((bn(2, momentum=0.5), nn.Tanh()), coupled=True),
    "bn-eval": Case((nn.BatchNorm2d(2).eval(),)),
    "bn1d": Case((nn.BatchNorm1d(4, eps=0.1),), (6, 4), coupled=True),
    "layer-norm": Case((nn.LayerNorm((2, 3, 4), 0.1),)),
    "layer-norm-last": Case((nn.LayerNorm(4, 0.1), nn.Tanh())),
    "group-norm": Case((nn.GroupNorm(2, 4, 0.1),), (3, 4, 2, 3)),
    "group-norm-relu": Case((nn.GroupNorm(1, 2, 0.1), nn.ReLU())),
    "max": Case((nn.MaxPool2d(2),)),
    "max-overlapping": Case((nn.MaxPool2d(3, stride=1, padding=1),)),
    "avg-overlapping": Case((nn.AvgPool2d(2, stride=1, padding=1),)),
    "avg-uncounted": Case((nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),)),
    "adaptive": Case((nn.AdaptiveAvgPool2d((2, 3)),)),
    "adaptive-one": Case((nn.AdaptiveAvgPool2d(1), nn.Flatten())),
    "residual": Case((Residual(nn.Sequential(conv(2, 2, 3, padding=1), nn.Tanh())),)),
    "residual-down": Case((Residual(conv(2, 3, 3, 2, 1), conv(2, 3, 1, 2), nn.ReLU()),)),
    # More unknowns than rows: the minimum norm decides.
    "wide": Case((conv(2, 2, 3), nn.Tanh()), (1, 2, 3, 4), channels=2),
    "kernel-is-map": Case((conv(2, 3, (3, 4)),), channels=3),
    "wide-bare": Case((conv(4, 4, 3, groups=2),), (2, 4, 3, 4), channels=4),
    "wide-bn": Case((conv(4, 2, 3), bn(2), nn.Tanh()), (3, 4, 3, 4), coupled=True),
    "wide-bn-bare": Case((conv(4, 4, 3, groups=2, bias=False), bn(4)), (3, 4, 3, 4), coupled=True),
    "wide-bn-eval": Case((conv(4, 2, 3), bn(2).eval(), nn.Tanh()), (3, 4, 3, 4)),
    # What stands before and behind the convolution.
    "tanh-conv": Case((nn.Tanh(), conv(2, 3, 2), nn.ReLU()), channels=3),
    "avg-conv": Case((nn.AvgPool2d(2, 1), conv(2, 3, 2))),
    "bn-conv": Case((bn(2, affine=False), conv(2, 3, 2), nn.Tanh()), coupled=True),
    "conv-bn-max": Case((conv(2, 3, 2), bn(3), nn.Tanh(), nn.MaxPool2d(2, 1)), coupled=True),
    "conv-bn-eval-max": Case((conv(2, 3, 2), bn(3).eval(), nn.MaxPool2d(2, 1), nn.Tanh())),
    "conv-max-max": Case((conv(2, 2, 1), nn.MaxPool2d(2, 1), nn.Tanh(), nn.MaxPool2d(2, 1))),
    "conv-rows-max": Case((conv(2, 2, 2), nn.Tanh(), nn.Flatten(2), nn.MaxPool1d(2))),
    "conv-merged-max": Case((conv(2, 2, 2), nn.Tanh(), nn.Flatten(1, 2), nn.MaxPool1d(2, 1))),
    "conv-flat-max": Case((conv(2, 3, 2), nn.Flatten(), nn.MaxPool1d(3, 2))),
    "conv-merged-bn": Case((conv(2, 2, 2), nn.Flatten(2), nn.BatchNorm1d(2, 0.1)), coupled=True),
    "linear-max": Case((nn.Linear(4, 6), nn.MaxPool1d(2)), (5, 4)),
    "linear-bn": Case((nn.Linear(4, 3), nn.BatchNorm1d(3, 0.1), nn.Tanh()), (6, 4), coupled=True),
    "linear-bn-spread": Case((nn.Linear(4, 3), nn.BatchNorm1d(2, 0.1)), (4, 2, 4), coupled=True),
    "group-norm-flat": Case((nn.GroupNorm(2, 6, 0.1),), (5, 6)),
    "1x1-map": Case((conv(3, 2, 3, padding=1),), (4, 3, 1, 1), channels=2),
}


def dead_relus() -> Case:
    """Half of the channels never fire, the others on some pixels."""
    layer = conv(2, 4, 2)
    layer.bias.data.copy_(torch.tensor([-50.0, 0.0, -0.3, -50.0]))
    return Case((layer, nn.ReLU()), channels=4)


CASES["dead-relus"] = dead_relus()
DAMPINGS = [0.0, 1e-3, 0.3, bm.Relative(0.1)]


def jacobians(block: nn.Module, z: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """J_W (trainable parameters side by side), J_z and the output, all flattened."""
    block = copy.deepcopy(block)
    names = [n for n, p in block.named_parameters() if p.requires_grad]
    start = [dict(block.named_parameters())[n].detach() for n in names]
    buffers = {n: b.clone() for n, b in block.named_buffers()}

    def call(z: Tensor, *values: Tensor) -> Tensor:
        fresh = {n: b.clone() for n, b in buffers.items()}
        state = {**fresh, **dict(zip(names, values, strict=True))}
        return functional_call(block, state, (z.clone(),)).flatten()

    J_z, *J_w = torch.autograd.functional.jacobian(call, (z, *start))
    rows = J_z.shape[0]
    empty = torch.zeros(rows, 0, dtype=z.dtype)
    flat = torch.cat([empty, *(J.reshape(rows, -1) for J in J_w)], 1)
    return flat.numpy(), J_z.reshape(rows, -1).numpy(), call(z, *start).detach().numpy()


def answer(J: np.ndarray, r: np.ndarray, damping: float, systems: list[Any]) -> tuple[Any, int]:
    """Least squares system by system, and the summed rank."""
    d, rank = np.zeros(J.shape[1]), 0
    for rows, columns in systems:
        part = J[np.ix_(rows, columns)]
        n = part.shape[1]
        if damping == 0.0:
            cut = np.sqrt(max(part.shape) * EPS)
            d[columns], _, found, values = np.linalg.lstsq(part, r[rows], rcond=cut)
            rank += int(found)
            near = (values > cut * values[0] / 100) & (values < 100 * cut * values[0])
            assert not near.any(), "the case's rank is ambiguous"
        else:
            augmented = np.vstack([part, np.sqrt(damping) * np.eye(n)])
            d[columns] = np.linalg.lstsq(augmented, np.append(r[rows], np.zeros(n)), rcond=None)[0]
    return d, rank


def weight_systems(case: Case, rows: int, names: dict[str, Tensor]) -> list[Any]:
    """One per output channel, else one."""
    columns = sum(p.numel() for p in names.values())
    if case.channels is None:
        return [(np.arange(rows), np.arange(columns))]
    pixel = rows // (case.shape[0] * case.channels)
    owner = np.concatenate([np.repeat(np.arange(len(p)), p[0].numel()) for p in names.values()])
    of_row = np.arange(rows) // pixel % case.channels
    return [(np.flatnonzero(of_row == c), np.flatnonzero(owner == c)) for c in range(case.channels)]


def assert_close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    size = max(np.abs(want).max(initial=0.0), 1e-3)
    error = np.abs(got - want).max(initial=0.0) / size
    assert error < 1e-9, f"{what} off by {error:.1e}"


def sweep(case: Case, solver: Any, z: Tensor | None = None) -> tuple[Any, nn.Module, Tensor]:
    """The report of the block on top of an identity, so that it has both problems."""
    torch.manual_seed(2)
    block = copy.deepcopy(nn.Sequential(*case.layers)).double()
    stirred([block])
    z = torch.randn(case.shape, dtype=torch.float64) if z is None else z
    matcher = bm.BackMatching([nn.Identity(), block], weights=solver, inputs=solver)
    before = copy.deepcopy(block)
    rows = copy.deepcopy(block)(z.clone()).shape
    y = torch.randn(rows, dtype=torch.float64)
    step = matcher.backward(z, lambda out: 0.5 * (out - y).square().sum() / len(z), keep=True)
    assert torch.allclose(step.blocks[1].displacement, y - step.output, rtol=1e-13)
    return step.blocks[1], before, z


@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_both_steps(name, damping):
    case = CASES[name]
    report, block, z = sweep(case, bm.Cholesky(damping))
    J_w, J_z, _ = jacobians(block, z)
    r, m = report.displacement.flatten().numpy(), len(z)
    relative = isinstance(damping, bm.Relative)
    if J_w.shape[1]:
        trainable = dict(block.named_parameters())
        systems = weight_systems(case, len(r), trainable)
        shift = 0.1 * (J_w**2).sum() / m / J_w.shape[1] if relative else damping
        want, rank = answer(J_w, r, m * shift, systems)
        got = np.concatenate([report.weight_step[n].flatten().numpy() for n in trainable])
        assert_close(got, want, "d_W")
        assert report.weight.rank in (None, rank)
        assert report.weight.residual < 1e-8
    else:
        assert report.weight is None
    count = 1 if case.coupled else m
    rows, columns = (np.array_split(np.arange(k), count) for k in J_z.shape)
    want, ranks = np.zeros(z.numel()), 0
    for i, (at, of) in enumerate(zip(rows, columns, strict=True)):
        others = np.delete(J_z[:, of], at, axis=0)
        assert not others.any(), "the case couples its samples"
        mu = 0.1 * (J_z[np.ix_(at, of)] ** 2).sum() / len(of) if relative else damping
        part, rank = answer(J_z, r, mu, [(at, of)])
        want, ranks = want + part, ranks + rank
        if relative:
            reported = np.ravel(report.input.damping)
            assert reported[i % len(reported)] == pytest.approx(mu, rel=1e-12)
    assert_close(report.input_step.flatten().numpy(), want, "d_z")
    assert report.input.rank in (None, ranks)
    if damping == 0.0:
        assert report.input.rank == ranks


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh, nn.ReLU])
def test_duplicate_input_channels_share_their_step(activation, bias):
    """Rank-deficient weights: the minimum norm splits the step evenly over equal channels."""
    case = Case((conv(4, 3, 2, bias=bias), activation()), (5, 4, 3, 4), channels=3)
    pair = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    z = pair.repeat(1, 2, 1, 1)
    report, block, _ = sweep(case, bm.Cholesky(0.0), z)
    J_w, _, _ = jacobians(block, z)
    trainable = dict(block.named_parameters())
    systems = weight_systems(case, len(J_w), trainable)
    want, rank = answer(J_w, report.displacement.flatten().numpy(), 0.0, systems)
    got = np.concatenate([report.weight_step[n].flatten().numpy() for n in trainable])
    assert_close(got, want, "d_W")
    assert rank < J_w.shape[1]
    assert report.weight.rank == rank
    step = report.weight_step["0.weight"]
    assert torch.allclose(step[:, :2], step[:, 2:], rtol=1e-9, atol=1e-12)


def test_rcond_cuts_singular_values_of_each_channel_by_its_own_largest():
    """Channels of very different scale: a cut relative to all of them would drop the small one."""
    layer = conv(1, 2, (1, 2), bias=False)
    layer.weight.data.copy_(torch.tensor([[[[1.0, 0.5]]], [[[-20.0, -20.0]]]]))
    z = 0.5 + 0.2 * torch.rand(4, 1, 2, 4, dtype=torch.float64)
    case = Case((layer, nn.Sigmoid()), (4, 1, 2, 4), channels=2)
    solver = bm.Cholesky(0.0, rcond=1e-6)
    report, block, _ = sweep(case, solver, z)
    J_w, _, _ = jacobians(block, z)
    assert np.linalg.norm(J_w[:, 2:]) < 1e-6 * np.linalg.norm(J_w[:, :2])
    systems = weight_systems(case, len(J_w), dict(block.named_parameters()))
    r = report.displacement.flatten().numpy()
    for at, of in systems:
        want = np.linalg.lstsq(J_w[np.ix_(at, of)], r[at], rcond=1e-6)[0]
        got = report.weight_step["0.weight"].flatten().numpy()[of]
        assert np.abs(got - want).max() < 1e-8 * np.abs(want).max()


@pytest.mark.parametrize("name", ["conv", "conv-relu", "conv-bn-relu", "conv-depthwise", "wide"])
def test_frozen_parameters_are_no_unknowns(name):
    """The same systems without the frozen columns; Relative damping counts the others only."""
    case = CASES[name]
    layers = copy.deepcopy(case.layers)
    layers[0].bias.requires_grad_(False)
    frozen = Case(layers, case.shape, case.channels, case.coupled)
    report, block, z = sweep(frozen, bm.Cholesky(bm.Relative(0.1)))
    J_w, _, _ = jacobians(block, z)
    trainable = {n: p for n, p in block.named_parameters() if p.requires_grad}
    assert report.weight_step.keys() == trainable.keys()
    shift = 0.1 * (J_w**2).sum() / J_w.shape[1]
    systems = weight_systems(frozen, len(J_w), trainable)
    want, _ = answer(J_w, report.displacement.flatten().numpy(), shift, systems)
    got = np.concatenate([report.weight_step[n].flatten().numpy() for n in trainable])
    assert_close(got, want, "d_W")
