"""Solver options, and what the records say."""

import numpy as np
import pytest
import torch
from torch import nn

import backmatch as bm
from backmatch.problems.base import lanczos_largest


def square(out):
    return 0.5 * out.square().flatten(1).sum(1).mean()


def report(block, x, **solvers):
    """Of ``block`` on top of a Linear, so that it has an input problem."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), block).double()
    for p in model.parameters():
        p.data.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return bm.BackMatching(model, **solvers).backward(x, square, keep=True).blocks[1]


def batch(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: bm.Relative(-1.0), ValueError, "factor must be finite and >= 0, got -1.0"),
        (lambda: bm.Relative("0.1"), TypeError, "must be a number, got str"),
        (lambda: bm.CG(damping=None), TypeError, r"float or Relative\(factor\), got None"),
        (lambda: bm.CG(0.1, rtol=-1), ValueError, "CG rtol"),
        (lambda: bm.CG(0.1, max_steps=0), ValueError, "CG max_steps must be at least 1"),
        (lambda: bm.CG(0.1, preconditioner="ilu"), ValueError, '"shared" or a callable'),
        (lambda: bm.Cholesky(float("nan")), ValueError, "Cholesky damping must be finite"),
        (lambda: bm.Cholesky(0.0, rcond=-1), ValueError, "Cholesky rcond"),
        (lambda: bm.Auto(True), TypeError, "Auto damping"),
        (lambda: bm.Scalar("mean"), ValueError, "one of trace, spectral, rayleigh, got 'mean'"),
        (lambda: bm.LayerInverse(0.1, clamp=0.6), ValueError, r"clamp must be in \(0, 0.5\)"),
        (lambda: bm.CG(), TypeError, "damping"),
        (lambda: bm.Cholesky(), TypeError, "damping"),
    ],
)
def test_bad_options(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_structure_of_the_systems():
    x = batch(6, 5)
    linear = report(nn.Linear(5, 4), x)
    assert (linear.weight.structure, linear.weight.systems, linear.weight.unknowns) == (
        "unit",
        4,
        6,
    )
    assert (linear.input.structure, linear.input.systems, linear.input.unknowns) == (
        "sample",
        6,
        5,
    )
    sequence = report(nn.Linear(5, 4), batch(6, 3, 5))
    assert (sequence.input.systems, sequence.input.unknowns) == (6, 15)
    generic = report(nn.GRUCell(5, 4), x)
    assert (generic.weight.structure, generic.weight.systems) == ("joint", 1)


@pytest.mark.parametrize("side", ["weights", "inputs"])
def test_rank_counts_the_whole_jacobian(side):
    x = batch(6, 5)
    layer = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    found = report(layer, x, **{side: bm.Cholesky(damping=0.0)})
    record = found.weight if side == "weights" else found.input
    z = _input_of(x)
    if side == "inputs":
        ranks = [
            np.linalg.matrix_rank(torch.autograd.functional.jacobian(layer, row).numpy())
            for row in z
        ]
    else:
        slopes = (layer[0](z) > 0).double().T
        augmented = torch.cat([z, torch.ones(6, 1)], 1)
        ranks = [np.linalg.matrix_rank((d[:, None] * augmented).detach().numpy()) for d in slopes]
    assert record.rank == sum(int(r) for r in ranks)


def _input_of(x):
    """The input of the second block in :func:`report`."""
    generator = torch.Generator().manual_seed(0)
    W = 0.5 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    b = 0.5 * torch.randn(5, generator=generator, dtype=torch.float64)
    return x @ W.T + b


def test_relative_damping_reports_how_its_trace_was_found():
    exact = report(nn.Tanh(), batch(6, 5))
    assert exact.input.trace == "exact"
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    large = nn.Sequential(nn.Unflatten(1, (1, 20, 20)), conv, nn.Flatten())
    found = report(large, batch(2, 400), weights=bm.Gradient(), inputs=bm.CG(bm.Relative(1.0)))
    assert found.input.trace == "estimated"
    # Constant coefficients: every interior pixel has the same column norm.
    dense = torch.autograd.functional.jacobian(large, torch.zeros(1, 400).double())[0, :, 0]
    want = float(dense.square().sum()) / 400
    assert float(found.input.damping[0]) == pytest.approx(want, rel=0.2)
    assert found.input.damping[0] == found.input.damping[1]  # the same probes for every sample


BADLY_SCALED = {
    "linear": (nn.Linear(30, 20), batch(40, 30) * torch.logspace(0, 2, 30)),
    "conv": (
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        batch(9, 4, 5, 5) * torch.logspace(0, 2, 4).view(4, 1, 1),
    ),
}


@pytest.mark.parametrize("name", BADLY_SCALED)
@pytest.mark.parametrize("preconditioner", ["shared", "jacobi"])
def test_a_preconditioner_saves_iterations_and_keeps_the_answer(name, preconditioner):
    linear, x = BADLY_SCALED[name]
    layer = nn.Sequential(linear, nn.Softplus(beta=1e-3))
    plain = report(layer, x, weights=bm.CG(1e-3), inputs=bm.CG(1e-3))
    solver = bm.CG(1e-3, preconditioner=preconditioner)
    helped = report(layer, x, weights=solver, inputs=solver)
    assert helped.weight.iterations < plain.weight.iterations
    exact = report(layer, x, weights=bm.Cholesky(1e-3), inputs=bm.Cholesky(1e-3))
    pairs = [(helped.weight_step[k], value) for k, value in exact.weight_step.items()]
    for got, want in [*pairs, (helped.input_step, exact.input_step)]:
        # A residual of 1e-10 times a condition number of about 1e5 (inputs from 1 to 100).
        assert torch.linalg.vector_norm(got - want) < 1e-5 * torch.linalg.vector_norm(want)


@pytest.mark.parametrize(("name", "text"), [("shared", "no shared matrix"), ("jacobi", "diagonal")])
def test_a_preconditioner_that_a_block_lacks_is_refused(name, text):
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError, match=text):
        report(block, batch(3, 3, 5, 5), weights=bm.CG(0.1, preconditioner=name))


def test_a_callable_preconditioner_sees_problem_and_damping():
    seen = []

    def jacobi(problem, damping):
        seen.append((problem.systems, damping))
        return lambda residual: residual / 2.0

    report(nn.Linear(5, 4), batch(6, 5), weights=bm.CG(0.1, preconditioner=jacobi))
    assert seen == [(5, 0.1), (4, 0.1)] or seen == [(4, 0.1), (5, 0.1)]


def test_cg_with_rtol_0_runs_exactly_max_steps():
    found = report(nn.GRUCell(5, 4), batch(3, 5), weights=bm.CG(0.1, rtol=0, max_steps=7))
    assert found.weight.iterations == 7


def test_records_become_plain_numbers():
    record = report(nn.Tanh(), batch(6, 5)).input
    assert isinstance(record.damping, torch.Tensor)
    assert isinstance(record.as_dict()["damping"], float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_finds_the_largest_eigenvalue_of_the_batch(dtype):
    J = torch.randn(5, 30, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    H = (J.mT @ J).to(dtype)
    found = lanczos_largest(lambda d: torch.einsum("sij,sj->si", H, d), torch.empty(5, 20).to(H))
    want = float(np.linalg.eigvalsh(H.double().numpy()).max())
    assert float(found) == pytest.approx(want, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_zero_jacobian_gives_a_zero_step():
    dead = nn.Sequential(nn.Linear(5, 4), nn.Threshold(1e9, 0.0))
    for solver in (bm.Auto(bm.Relative(0.1)), bm.Auto(0.0), bm.Scalar(), bm.CG(0.1)):
        found = report(dead, batch(6, 5), weights=solver, inputs=solver)
        assert all((value == 0).all() for value in found.weight_step.values())
        assert (found.input_step == 0).all()
