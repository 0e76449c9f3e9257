"""Estimates, averages, held scales and the normalisation, against dense oracles."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import BOTH, backward, batches, model, train
from torch import nn
from torch.func import functional_call

import backmatch as bm
from backmatch.optim import ScaleAmendedSGD
from backmatch.optim.divisors import factors, normalising


def net(seed=0):
    torch.manual_seed(seed)
    blocks = [
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)),
        nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)),
    ]
    return nn.Sequential(*blocks).double()


def hessians(model, x):
    """Dense H_W and H_z of every block of a per-sample chain, by torch's own Jacobians."""
    found, z = [], x
    for block in model:
        named = {k: p.detach() for k, p in block.named_parameters()}

        def of(z, *values, block=block, named=named):
            return functional_call(block, dict(zip(named, values, strict=True)), (z,)).flatten()

        J_z, *J_W = torch.autograd.functional.jacobian(of, (z, *named.values()))
        J_W = torch.cat([J.reshape(len(J), -1) for J in J_W], 1)
        J_z = J_z.reshape(len(J_z), -1)
        found.append(((J_W.T @ J_W / len(x)).numpy(), (J_z.T @ J_z).numpy()))
        z = block(z).detach()
    return found


def scales(model, x, **options):
    with ScaleAmendedSGD(model, lr=0.0, **options) as optimizer:
        model(x).square().mean().backward()
        optimizer.step()
        return list(optimizer.scales.values())


def batch(m=6):
    return torch.randn(m, 4, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("kind", ["trace", "spectral"])
def test_exact_scales_are_those_of_the_dense_hessians(kind):
    model, x = net(), batch()
    of = (lambda H: np.trace(H) / len(H)) if kind == "trace" else (lambda H: np.linalg.norm(H, 2))
    product = 1.0
    found = scales(model, x, kind=kind, damping=0.2)
    for scale, (H_W, H_z) in reversed(list(zip(found, hessians(model, x), strict=True))):
        assert scale.weight == pytest.approx(of(H_W), rel=1e-10)
        assert scale.factor == pytest.approx(product / (of(H_W) + 0.2), rel=1e-10)
        if scale.input is not None:
            assert scale.input == pytest.approx(of(H_z), rel=1e-10)
            product /= of(H_z) + 0.2
    assert found[0].input is None


def test_hutchinson_is_unbiased():
    """The mean over many probes nears the trace as 1/sqrt(probes); few probes are close, too."""
    model, x = net(), batch()
    exact = scales(model, x)
    for probes, tolerance in ((3000, 0.03), (8, 0.8)):
        found = scales(model, x, estimate="hutchinson", probes=probes)
        for a, b in zip(found, exact, strict=True):
            assert a.weight == pytest.approx(b.weight, rel=tolerance)
            assert (a.input is None) == (b.input is None)
            if a.input is not None:
                assert a.input == pytest.approx(b.input, rel=tolerance)
    assert [s.weight for s in found] != [s.weight for s in exact]


def test_fresh_probes_every_time_and_the_same_in_the_next_run():
    model, x, runs = net(), batch(), []
    for _ in range(2):
        with ScaleAmendedSGD(model, lr=0.0, estimate="hutchinson", probes=1) as optimizer:
            seen = []
            for _ in range(3):
                model(x).square().mean().backward()
                optimizer.step()
                seen.append(optimizer.scales["0"].weight)
        runs.append(seen)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_power_iteration_comes_from_below():
    model, x = net(), batch()
    exact = scales(model, x, kind="spectral")
    few = scales(model, x, kind="spectral", estimate="power", probes=2)
    many = scales(model, x, kind="spectral", estimate="power", probes=300)
    for a, b, c in zip(few, many, exact, strict=True):
        assert 0 < a.weight <= c.weight * (1 + 1e-12)
        assert a.weight <= b.weight * (1 + 1e-12)
        assert b.weight == pytest.approx(c.weight, rel=1e-3)


@pytest.mark.parametrize("average", [0.0, 0.75])
def test_held_and_averaged(average):
    """A plain recursion over the measurements of steps 0, 2, 4, ..."""
    twin, data = model(), batches(6)
    with ScaleAmendedSGD(bm.partition(twin), lr=0.05) as fresh:
        every_step = []
        torch.manual_seed(3)
        for x, y in data:
            fresh.zero_grad()
            backward(twin, x, y)
            fresh.step()
            every_step.append(fresh.scales["0"].weight)
    other = model()
    # lr 0: the weights, and with them the measurements, depend on the batch alone.
    with ScaleAmendedSGD(bm.partition(other), lr=0.0) as measuring:
        seen = []
        for x, y in data:
            measuring.zero_grad()
            backward(other, x, y)
            measuring.step()
            seen.append(measuring.scales["0"].weight)
    held = model()
    with ScaleAmendedSGD(bm.partition(held), lr=0.0, every=2, average=average) as optimizer:
        expected = None
        for i, (x, y) in enumerate(data):
            optimizer.zero_grad()
            backward(held, x, y)
            optimizer.step()
            if i % 2 == 0:
                c = seen[i]
                expected = c if expected is None else average * expected + (1 - average) * c
            assert optimizer.scales["0"].weight == pytest.approx(expected, rel=1e-12)
    assert len(set(every_step)) == 6


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_steps_have_the_length_of_plain_ones(kind, dtype):
    """|step| = lr |gradient| over the whole model, in the direction of the divided gradient."""
    twin, data = model(dtype), batches(3, dtype)
    ways = {}
    for normalize in (False, True):
        own = model(dtype)
        with kind(bm.partition(own), lr=0.01, normalize=normalize) as optimizer:
            before = nn.utils.parameters_to_vector(own.parameters()).detach()
            train(own, optimizer, data[:1])
            moved = nn.utils.parameters_to_vector(own.parameters()).detach() - before
            grads = nn.utils.parameters_to_vector(p.grad for p in own.parameters())
            ways[normalize] = moved
    rel = 1e-4 if dtype == torch.float32 else 1e-10
    assert float(ways[True].norm()) == pytest.approx(0.01 * float(grads.norm()), rel=rel)
    cosine = torch.nn.functional.cosine_similarity(ways[True], ways[False], dim=0)
    assert float(cosine) == pytest.approx(1.0, rel=rel)
    assert twin is not own


@given(
    st.lists(st.floats(1e-150, 1e150), min_size=1, max_size=6),
    st.lists(st.floats(1e-150, 1e150), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_normalising_any_factors(found, sizes):
    """No over- or underflow spoils the length, whatever a deep chain multiplies up to."""
    factor = dict(enumerate(found))
    size = dict(enumerate(sizes[: len(found)]))
    new = normalising(size, factor)
    plain = math.hypot(*size.values())
    got = math.hypot(*(new[b] * size[b] for b in new))
    assert got == pytest.approx(plain, rel=1e-9)
    ratios = [new[b] / factor[b] for b in factor if factor[b] > 1e-100 * max(found)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-9)


def test_normalising_zeros():
    assert normalising({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}) == {0: 0.0, 1: 0.0}
    assert normalising({0: 0.0}, {0: 3.0}) == {0: 3.0}
    assert normalising({}, {}) == {}
    assert normalising({0: 3.0, 1: 4.0}, {0: 0.0, 1: 7.0}) == {0: 0.0, 1: 1.25}


def test_a_chain_of_vanishing_scales():
    """A factor that no float holds is an error that names the block; zeros give zeros."""
    keys = [(side, b) for b in range(3) for side in ("weight", "input")]
    tiny = dict.fromkeys(keys, 1e-120)
    with pytest.raises(bm.NonFiniteError, match=r"factor of the gradient .* block 'a'"):
        factors(tiny, [0, 1, 2], 2, 0.0, "abc", chained=True)
    assert factors(tiny, [0, 1, 2], 2, 1.0, "abc", chained=True) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert factors(tiny, [0], 2, 0.0, "abc", chained=False)[0] == pytest.approx(1e120)
    zero = {**tiny, ("input", 2): 0.0}
    assert factors(zero, [0, 1, 2], 2, 0.5, "abc", chained=True)[1] == 0.0


def test_factors_beyond_float32():
    """A deep chain of small scales: the factor is no float32, the step is."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(12)))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(0.01)
    double, x = copy.deepcopy(model).double(), torch.randn(4, 3)
    moved = []
    for net, z in ((model, x), (double, x.double())):
        with ScaleAmendedSGD(net, lr=1e-20, damping=1e-6) as optimizer:
            (net(z).sum() * 1e10).backward()
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
            factor = optimizer.scales["0"].factor
            moved.append([p.detach() - b for p, b in zip(net.parameters(), before, strict=True)])
    assert factor > 1e39
    for a, b in zip(*moved, strict=True):
        assert torch.isfinite(a).all()
        # Both are differences of parameters: the rounding of a float32 parameter is in one.
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max()) + 1e-8
    for p, q in zip(model.parameters(), before, strict=True):
        p.grad, p.data = None, q.float()
    with ScaleAmendedSGD(model, lr=1.0) as optimizer:
        (model(x).sum() * 1e30).backward()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(bm.NonFiniteError, match=r"divided gradient .* in block '\d"):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_normalising_a_vanishing_gradient(size):
    model, x = net().float(), batch().float()
    with ScaleAmendedSGD(model, lr=1.0 / size, normalize=True) as optimizer:
        (model(x).square().mean() * size).backward()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.step()
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        grads = nn.utils.parameters_to_vector(p.grad for p in model.parameters()) / size
        assert float(moved.norm()) == pytest.approx(float(grads.norm()), rel=1e-3)


def test_rayleigh_of_a_vanishing_gradient():
    """In float32 the square of a gradient of 1e-30 is 0; its direction still counts."""
    found = []
    for size in (1.0, 1e-30):
        model, x = net().float(), batch().float()
        with ScaleAmendedSGD(model, lr=0.0, kind="rayleigh") as optimizer:
            (model(x).square().mean() * size).backward()
            optimizer.step()
            found.append([scale.weight for scale in optimizer.scales.values()])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
