"""Whole steps in ``backmatch bench``: the plain step and the re-implemented peers are right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from backmatch import reference
from backmatch.bench import peers, step, timing
from backmatch.bench.case import OURS, Settings
from backmatch.bench.measure import measure
from backmatch.bench.options import BenchOptions
from backmatch.bench.plain_step import plain_step
from backmatch.matching import BackMatching
from backmatch.partitioning import partition
from backmatch.solvers import Cholesky, Relative

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = timing.Effort(repeats=2, seconds=1e-3, fewest=1, fewest_of_peers=1)


@pytest.fixture(autouse=True)
def small_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = {"wide": ((5, 13, 9, 4), 7), "tall": ((11, 6, 3), 20)}
    monkeypatch.setattr(step, "NETS", nets)


def settings(dtype: str) -> Settings:
    options = BenchOptions(quick=True, dtypes=(dtype,))
    return Settings(options, torch.device("cpu"), TINY)


def small_net(sizes: tuple[int, ...], relu_at_top: bool = False) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(len(sizes))
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    net = nn.Sequential(*(layers if relu_at_top else layers[:-1])).double()
    x, y = torch.randn(8, sizes[0]).double(), torch.randint(sizes[-1], (8,))
    return net, (x, y)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("relu_at_top", [False, True])
@pytest.mark.parametrize("sizes", [(5, 13, 9, 4), (12, 3), (3, 20, 20, 6)])
def test_plain_step_is_the_exact_step(sizes: tuple[int, ...], relu_at_top: bool) -> None:
    net, (x, y) = small_net(sizes, relu_at_top)

    def loss(out: Tensor) -> Tensor:
        return nnf.cross_entropy(out, y)

    found = plain_step(net, x, loss, weights=0.1, inputs=0.01)
    matcher = BackMatching(
        partition(net), weights=Cholesky(Relative(0.1)), inputs=Cholesky(Relative(0.01))
    )
    matcher.backward(x, loss)
    for value, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(value, parameter.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("module", [step, peers], ids=["step", "peers"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_step_case_is_right(module: Any, dtype: str) -> None:
    """Identities: FOOF and ProxProp are partitions by layer, LocoProp-S a power of I - eta H."""
    for case in module.cases(settings(dtype)):
        row = measure(case, settings(dtype))
        assert "error" not in row, row["error"]
        assert row["failed"] == {}
        assert set(row["ratios"]) == set(case.candidates) - {OURS}


def test_foof_is_ridge_regression_of_the_gradient() -> None:
    """A second opinion that shares no code: the reference's ridge, layer by layer."""
    net, (x, y) = small_net((6, 5))
    found = peers.foof(net, x, lambda out: nnf.cross_entropy(out, y), 0.3)
    out = net(x).detach().requires_grad_()
    G = torch.autograd.grad(nnf.cross_entropy(out, y), out)[0]
    Z = torch.cat([x, torch.ones(8, 1).double()], 1)
    want = reference.ridge(Z.numpy(), -8 * G.T.numpy(), damping=8 * 0.3)
    got = torch.cat([found[0], found[1].unsqueeze(1)], 1)
    torch.testing.assert_close(got, -torch.from_numpy(want), rtol=1e-9, atol=1e-12)


def test_locoprop_approaches_foof_with_many_local_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = small_net((6, 7, 5))

    def loss(out: Tensor) -> Tensor:
        return nnf.cross_entropy(out, y)

    exact = flat(peers.foof(net, x, loss, 0.3))
    errors = []
    for count in (1, 30, 1000):
        monkeypatch.setattr(peers, "LOCAL_STEPS", count)
        errors.append(float((flat(peers.locoprop_s(net, x, loss, 0.3)) - exact).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6 * float(exact.norm())


def test_settings_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    next(iter(step.cases(settings("float64"))))
    assert torch.equal(torch.random.get_rng_state(), before)
