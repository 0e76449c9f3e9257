"""``BackMatching`` against the dense-Jacobian reference: every net, solver, order and damping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import ACTIVATIONS, NETS, Net, half_square, random_net
from oracle import TOLERANCE, Oracle, canonical, deviation
from torch import nn

import backmatch as bm
from backmatch import reference

DAMPINGS = (0.0, 1e-3, 0.3, bm.Relative(0.1))
ORDERS = ("simultaneous", "sequential")

#: Solver pairs as functions of one damping. The reference answers all exact ones alike.
EXACT_PAIRS = {
    "cholesky": lambda d: (bm.Cholesky(d), bm.Cholesky(d)),
    "auto": lambda d: (bm.Auto(d), bm.Auto(d)),
    "cg": lambda d: (bm.CG(d, rtol=1e-13), bm.CG(d, rtol=1e-13)),
    "mixed": lambda d: (bm.Cholesky(d), bm.CG(d, rtol=1e-13)),
}

OTHER_PAIRS = {
    "gradient": (bm.Gradient(), bm.Gradient()),
    "gradient-exact": (bm.Gradient(), bm.Cholesky(bm.Relative(1e-2))),
    "exact-gradient": (bm.Auto(bm.Relative(0.1)), bm.Gradient()),
    "trace": (bm.Scalar("trace"), bm.Scalar("trace", damping=0.2)),
    "spectral": (bm.Scalar("spectral"), bm.Scalar("spectral", damping=0.2)),
    "rayleigh": (bm.Scalar("rayleigh"), bm.Scalar("rayleigh", damping=0.2)),
    "scalar-exact": (bm.Scalar("trace", damping=1e-2), bm.Cholesky(0.1)),
}


def net(name: str) -> Net:
    """A net of the catalogue, or a random one: "random-SEED"."""
    return random_net(int(name.removeprefix("random-"))) if name not in NETS else NETS[name]


ORACLE = Oracle(net)
check, expected = ORACLE.check, ORACLE.expected


@pytest.mark.parametrize("pair", EXACT_PAIRS)
@pytest.mark.parametrize("name", NETS)
def test_exact_solvers(name, pair):
    for order in ORDERS:
        for damping in DAMPINGS:
            if damping == 0.0 and pair in ("cg", "mixed"):
                continue  # the condition number is unbounded: see test_undamped_cg
            check(name, *EXACT_PAIRS[pair](damping), order=order)


@pytest.mark.parametrize("seed", range(60))
def test_random_nets(seed):
    rng = np.random.default_rng(seed)
    order, damping = ORDERS[seed % 2], DAMPINGS[int(rng.integers(len(DAMPINGS)))]
    pair = str(rng.choice(["cholesky", "auto"] if damping == 0.0 else list(EXACT_PAIRS)))
    check(f"random-{seed}", *EXACT_PAIRS[pair](damping), order=order)


@pytest.mark.parametrize("pair", OTHER_PAIRS)
@pytest.mark.parametrize("name", NETS)
def test_other_solvers(name, pair):
    for order in ORDERS:
        check(name, *OTHER_PAIRS[pair], order=order)


@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "tall-batch", "no-bias"])
def test_undamped_cg_finds_the_minimum_norm_solution(name):
    check(name, bm.CG(0.0, rtol=1e-12), bm.CG(0.0, rtol=1e-12), tolerance=1e-6)


@pytest.mark.parametrize(
    "name", ["tanh", "relu", "dropout", "features-3d", "residual", "batch-norm"]
)
@pytest.mark.parametrize("passes", [2, 3])
def test_passes(name, passes):
    for damping in (0.3, bm.Relative(0.1)):
        check(name, bm.Auto(damping), bm.Auto(damping), order="sequential", passes=passes)
        check(name, bm.Auto(damping), bm.Gradient(), order="sequential", passes=passes)


@pytest.mark.parametrize(
    "name", ["linear", "tanh", "softplus", "relu", "features-3d", "residual", "batch-norm", "tied"]
)
@pytest.mark.parametrize("order", ORDERS)
def test_newton_steps(name, order):
    for damping in (0.3, bm.Relative(0.1)):
        solver = bm.Cholesky(damping)
        check(name, solver, solver, order=order, newton_steps=3, tolerance=1e-7)


@pytest.mark.parametrize("name", ["relu", "cross-entropy"])
def test_target_step_and_reduction(name):
    for reduction in ("mean", "sum"):
        check(name, bm.Auto(0.1), bm.Auto(bm.Relative(0.1)), target_step=0.35, reduction=reduction)


@pytest.mark.parametrize("name", NETS)
def test_float32(name):
    if "dropout" in name:
        pytest.skip("the masks drawn in float32 and float64 differ")
    solver = bm.Auto(bm.Relative(0.1))
    result, _ = expected(name, canonical(solver), canonical(solver))
    blocks, x, loss = NETS[name].make()
    single = [block.float() for block in blocks]
    x = x.float() if x.is_floating_point() else x
    step = bm.BackMatching(single, weights=solver, inputs=solver).backward(
        x, lambda z: loss(z.double()), keep=True
    )
    for got, want in zip(step.blocks, result.blocks, strict=True):
        for parameter, value in want.weight_step.items():
            assert got.weight_step[parameter].dtype == torch.float32
            size = max(np.abs(v).max() for v in want.weight_step.values()) or 1.0
            assert deviation(got.weight_step[parameter], value, size) < 2e-4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("damping", [0.0, 0.1, bm.Relative(0.1)])
@pytest.mark.parametrize("name", ["leaky-relu", "tanh", "sigmoid", "softplus", "elu"])
def test_layer_inverse(name, damping, order):
    torch.manual_seed(7)
    blocks = [
        nn.Linear(5, 6).double(),
        nn.Sequential(nn.Linear(6, 4), ACTIVATIONS[name]()).double(),
        nn.Sequential(nn.Linear(4, 4), ACTIVATIONS[name]()).double(),
    ]
    x, y = torch.randn(7, 5).double(), 3 * torch.randn(7, 4).double()  # partly out of range
    options = {
        "weights": bm.Auto(bm.Relative(0.1)),
        "inputs": bm.LayerInverse(damping),
        "order": order,
    }
    want = reference.sweep(blocks, x, lambda z: half_square(z, y), **options)
    got = bm.BackMatching(blocks, **options).backward(x, lambda z: half_square(z, y), keep=True)
    for block, other in zip(got.blocks[1:], want.blocks[1:], strict=True):
        size = np.abs(other.input_step).max()
        assert deviation(block.input_step, other.input_step, size) < TOLERANCE


def test_solvers_can_be_chosen_per_block():
    def weights(name: str, block: nn.Module) -> Any:
        return bm.Gradient() if isinstance(block, nn.Linear) else bm.Cholesky(0.1)

    blocks, x, loss = NETS["relu"].make()
    options = {"weights": weights, "inputs": bm.Auto(bm.Relative(1e-2))}
    want = reference.sweep(blocks, x, loss, **options)
    got = bm.BackMatching(blocks, **options).backward(x, loss, keep=True)
    for block, other in zip(got.blocks, want.blocks, strict=True):
        assert block.name == other.name
        for parameter, value in other.weight_step.items():
            assert deviation(block.weight_step[parameter], value, 1.0) < 1e-10


def test_reports_carry_the_dampings_in_force():
    blocks, x, loss = NETS["relu"].make()
    solver = bm.Cholesky(bm.Relative(0.1))
    want = reference.sweep(blocks, x, loss, weights=solver, inputs=solver)
    got = bm.BackMatching(blocks, weights=solver, inputs=solver).backward(x, loss)
    for block, other in zip(got.blocks, want.blocks, strict=True):
        reported = np.asarray(block.weight.damping, dtype=float).ravel()
        assert np.allclose(reported, other.weight_damping[: len(reported)], rtol=1e-12)
        assert block.displacement_norm == pytest.approx(np.linalg.norm(other.displacement))
        before = 0.5 * (other.displacement**2).sum() / x.shape[0]
        assert block.loss_before == pytest.approx(before)
        if other.input_step is not None:
            reported = np.asarray(block.input.damping, dtype=float).ravel()
            mus = other.input_damping[: len(reported)]  # one number where the matrix is shared
            assert np.allclose(reported, mus, rtol=1e-12)
