"""What a probe reports, beside dense Jacobians, autograd, and the step that the sweep takes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_nets import ORDERS, batch, net, square
from torch import nn

import backmatch as bm
from backmatch.probing import Likeness, Spread, spectrum
from backmatch.probing.likeness import liken
from backmatch.problems import DenseBatch
from backmatch.training.shadow_adam import ShadowAdam

NETS = {
    "mlp": (lambda: net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.LeakyReLU()), (6, 5)),
    "joint": (lambda: net(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (9, 5)),
    "conv": (
        lambda: net(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        (5, 2, 4, 4),
    ),
}


def dense(block: nn.Module, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """J_W (parameters in the order of their names) and J_z of a block, by autograd alone."""
    names, values = zip(*block.named_parameters(), strict=True)

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        # Batch norm must not move its running statistics here.
        buffers = {name: b.clone() for name, b in block.named_buffers()}
        named = dict(zip(names, leaves[1:], strict=True))
        return torch.func.functional_call(block, {**buffers, **named}, (leaves[0],)).flatten()

    parts = torch.autograd.functional.jacobian(run, (z.detach(), *values))
    flat = [part.reshape(part.shape[0], -1) for part in parts]
    return torch.cat(flat[1:], 1), flat[0]


def same(got: Likeness | None, expected: Likeness) -> bool:
    assert got is not None
    return got.cosine == pytest.approx(expected.cosine, abs=1e-9) and got.ratio == pytest.approx(
        expected.ratio, rel=1e-9
    )


def eigenvalues_of_systems(J: torch.Tensor) -> list[torch.Tensor]:
    """Squared singular values of J's independent parts, found by which entries it couples."""
    couples = (J.t() @ J).abs() > 1e-12
    left, found = set(range(J.shape[1])), []
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {j for i in edge for j in couples[i].nonzero().flatten().tolist()} - group
        left -= group
        found.append(torch.linalg.svdvals(J[:, sorted(group)]).square())
    return found


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("side", ["weight", "input"])
def test_spectra_are_those_of_the_dense_jacobian(name: str, side: str) -> None:
    make, shape = NETS[name]
    model, x = make(), batch(*shape)
    matcher = bm.BackMatching(bm.partition(model))
    found = bm.probe(matcher, x, square)
    z, compared = x, 0
    for b, block in enumerate(matcher.blocks.values()):
        J = dense(block, z)[0 if side == "weight" else 1]
        report = getattr(found.blocks[b], side)
        if report is not None:
            scale = 1 / len(x) if side == "weight" else 1.0
            seen = report.spectrum
            every = torch.linalg.svdvals(J).square() * scale
            assert seen.exact
            assert seen.reason is None
            assert seen.systems == min(16, report.record.systems)
            assert seen.trace_mean == pytest.approx(float(every.sum() / J.shape[1]), rel=1e-9)
            whole = [torch.linalg.svdvals(J).square()]
            parts = whole if report.record.systems == 1 else eigenvalues_of_systems(J)
            if seen.systems == report.record.systems == len(parts):
                assert seen.largest.max == pytest.approx(float(every.max()), rel=1e-9)
                cut = max(J.shape) * 2.3e-16  # our parts are never larger
                inside = [p > cut * p.max() for p in parts]
                kept = [p[i] for p, i in zip(parts, inside, strict=True) if p.max() > 0]
                conditions = sorted(float(p.max() / p.min()) for p in kept)
                assert seen.condition.min == pytest.approx(conditions[0], rel=1e-6)
                assert seen.condition.max == pytest.approx(conditions[-1], rel=1e-6)
                ranks = sorted(int(i.sum()) for i in inside)
                assert (seen.rank.min, seen.rank.max) == (ranks[0], ranks[-1])
                compared += 1
        z = block(z).detach()
    assert compared  # guards the condition above


def test_the_damped_condition_is_that_of_the_matrix_that_was_solved() -> None:
    model, x = net(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), batch(7, 4)
    damping = 0.03
    matcher = bm.BackMatching(bm.partition(model), weights=bm.Cholesky(damping=damping))
    block = bm.probe(matcher, x, square).blocks[0]
    J, _ = dense(bm.partition(model)[0], x)
    # Parameters: weight (3, 4), then bias (3): unit j has columns 4j .. 4j + 3 and 12 + j.
    conditions = []
    for j in range(3):
        columns = [*range(4 * j, 4 * j + 4), 12 + j]
        H = J[:, columns].t() @ J[:, columns] / 7 + damping * torch.eye(5, dtype=torch.float64)
        conditions.append(float(torch.linalg.cond(H)))
    seen = block.weight.spectrum.condition_damped
    assert [seen.min, seen.median, seen.max] == pytest.approx(sorted(conditions), rel=1e-9)
    assert block.weight.damping == Spread(damping, damping, damping)


def test_what_is_too_large_is_bounded_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3)), batch(20, 9)
    matcher = bm.BackMatching(bm.partition(model))
    exact = bm.probe(matcher, x, square).blocks[1].input.spectrum
    monkeypatch.setattr("backmatch.probing.spectrum.EXACT_SIDE", 2)
    found = bm.probe(matcher, x, square).blocks[1].input.spectrum
    assert not found.exact
    assert found.reason == "3 x 12 Jacobian: its short side is above 2"
    assert found.rank is None
    assert found.condition is None
    # A Krylov space of rank 3 is spent after 3 steps: the largest eigenvalue is exact, and 3 < 12
    # rows leave a null space, where the bound is reached.
    assert found.largest.max == pytest.approx(exact.largest.max, rel=1e-9)
    assert found.condition_damped.max == pytest.approx(exact.condition_damped.max, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_jacobian_is_squared_to_the_same_values(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(nn.Conv2d(1, 1, 3), nn.Tanh()).to(dtype), batch(30, 1, 6, 6).to(dtype)
    matcher = bm.BackMatching(bm.partition(model))
    exact = bm.probe(matcher, x, square).blocks[0].weight.spectrum
    monkeypatch.setattr("backmatch.probing.spectrum.SVD_FLOPS", 1)
    squared = bm.probe(matcher, x, square).blocks[0].weight.spectrum
    rel = 1e-3 if dtype == torch.float32 else 1e-9
    assert squared.exact
    assert squared.condition.max == pytest.approx(exact.condition.max, rel=rel)
    assert squared.largest.max == pytest.approx(exact.largest.max, rel=rel)
    assert squared.rank.max == exact.rank.max


def test_a_dead_unit_has_rank_0_and_no_condition() -> None:
    model, x = net(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), batch(7, 4)
    model[0].bias.data[1] = -100.0
    seen = bm.probe(bm.BackMatching(bm.partition(model)), x, square).blocks[0].weight.spectrum
    assert seen.rank.min == 0
    assert seen.condition is not None
    assert seen.condition.min >= 1


def test_a_dead_sample_does_not_hide_the_condition_of_the_others() -> None:
    """Relative damping of a sample without slopes is 0, and 0 / 0 is no condition."""
    model = net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for p in (model[0].weight, model[2].weight):
            p.fill_(1.0)
        for p in (model[0].bias, model[2].bias):
            p.zero_()
    x = torch.tensor([[1.0] * 4, [-1.0] * 4, [0.5, 0.2, 0.1, 0.0]], dtype=torch.float64)
    side = bm.probe(bm.BackMatching(bm.partition(model)), x, square).blocks[1].input
    assert side.damping.min == 0
    assert side.spectrum.rank.min == 0
    # J is all ones (3 x 5), H = 3 * ones(5, 5): largest 15, damping 0.01 * 15 / 5.
    expected = (15 + 0.03) / 0.03
    seen = side.spectrum.condition_damped
    assert [seen.min, seen.max] == pytest.approx([expected, expected], rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_losses_and_moves_are_those_of_the_step(order: str) -> None:
    model, x = net(), batch()
    matcher = bm.BackMatching(bm.partition(model), order=order)
    found = bm.probe(matcher, x, square)
    step = matcher.backward(x, square, keep=True)
    audits = bm.audit(matcher, x, square)
    z, m = x, len(x)
    for b, block in enumerate(matcher.blocks.values()):
        seen, report = found.blocks[b], step.blocks[b]
        target = block(z) + report.displacement
        moved = {n: p.detach() + report.weight_step[n] for n, p in block.named_parameters()}
        after = torch.func.functional_call(block, moved, (z,))
        d_z = report.input_step if report.input_step is not None else 0
        both = torch.func.functional_call(block, moved, (z + d_z,))
        expected = [report.loss_before] + [
            0.5 * float((target - each).detach().square().sum()) / m for each in (after, both)
        ]
        seen_losses = [seen.loss.before, seen.loss.after_weights, seen.loss.after_both]
        assert seen_losses == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert (seen.local, seen.joint, seen.propagated) == (
            audits[b].local,
            audits[b].joint,
            audits[b].propagated,
        )
        lengths = [p.flatten() for p in report.weight_step.values()]
        assert seen.weight.step_norm == pytest.approx(float(torch.cat(lengths).norm()), rel=1e-12)
        z = block(z).detach()


@pytest.mark.parametrize("target_step", [1.0, 0.25])
def test_steps_of_other_methods(target_step: float) -> None:
    """Gradient and scalar steps from autograd and dense traces alone, Adam's from torch's own."""
    model, x = net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)), batch()
    matcher = bm.BackMatching(bm.partition(model), target_step=target_step)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(square(model(x)), parameters)
    adam = [torch.randn(p.shape, dtype=p.dtype) for p in parameters]
    others = {"adam": dict(zip(parameters, adam, strict=True))}
    found = bm.probe(matcher, x, square, others=others)
    step = matcher.backward(x, square, keep=True)
    blocks = list(matcher.blocks.values())
    inputs = [x]
    for block in blocks:
        inputs.append(block(inputs[-1]).detach())
    c_z = 1.0
    for b in reversed(range(len(blocks))):
        exact = list(step.blocks[b].weight_step.values())
        own = [
            -target_step * g
            for p, g in zip(parameters, gradients, strict=True)
            if any(p is q for q in blocks[b].parameters())
        ]
        J, J_z = dense(blocks[b], inputs[b])
        c_W = float(J.square().sum()) / len(x) / J.shape[1]
        beside = found.blocks[b].weight.beside
        assert same(beside["gradient"], liken(exact, own))
        scalar = liken(exact, [g / (c_W * c_z) for g in own])
        assert same(beside["scalar"], scalar)
        r = step.blocks[b].displacement.flatten()
        local = (J.t() @ r / len(x)).split([p.numel() for p in blocks[b].parameters()])
        local = [part.reshape(d.shape) for part, d in zip(local, exact, strict=True)]
        assert same(beside["local_gradient"], liken(exact, local))
        shrunk = liken(exact, [part / c_W for part in local])
        assert same(beside["local_scalar"], shrunk)
        theirs = [
            a
            for p, a in zip(parameters, adam, strict=True)
            if any(p is q for q in blocks[b].parameters())
        ]
        assert same(beside["adam"], liken(exact, theirs))
        c_z *= float(J_z.square().sum()) / J_z.shape[1]
        if b:
            d_z = step.blocks[b].input_step
            leaf = inputs[b].clone().requires_grad_()
            value = leaf
            for block in blocks[b:]:
                value = block(value)
            (gradient,) = torch.autograd.grad(square(value), leaf)
            towards = -target_step * len(x) * gradient
            beside_z = found.blocks[b].input.beside
            assert same(beside_z["gradient"], liken([d_z], [towards]))
            assert same(beside_z["scalar"], liken([d_z], [towards / c_z]))
            assert "adam" not in beside_z


def test_gradient_solvers_are_their_own_gradient_step() -> None:
    model, x = net(), batch()
    matcher = bm.BackMatching(bm.partition(model), weights=bm.Gradient(), inputs=bm.Gradient())
    for block in bm.probe(matcher, x, square).blocks:
        for side in (block.weight, block.input):
            if side is not None:
                assert same(side.beside["gradient"], Likeness(1.0, 1.0))
                assert side.damping is None
                assert side.spectrum.condition_damped is None


def test_nothing_is_changed() -> None:
    model = net(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(), nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = bm.probe(bm.BackMatching(bm.partition(model)), batch(), square)
    again = bm.probe(bm.BackMatching(bm.partition(model)), batch(), square)
    assert first.blocks[0].as_dict() == again.blocks[0].as_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all((p.grad == 1).all() for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_in_any_of_the_three_sweeps_changes_nothing(call: int) -> None:
    model = net(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(), nn.Linear(7, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, calls = torch.get_rng_state(), []

    def loss(out: torch.Tensor) -> torch.Tensor:
        calls.append(torch.rand(3))
        if len(calls) == call:
            raise KeyboardInterrupt
        return square(out)

    with pytest.raises(KeyboardInterrupt):
        bm.probe(bm.BackMatching(bm.partition(model)), batch(), loss)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_an_overflowing_scalar_sweep_is_missing_and_says_so() -> None:
    model = net(*(nn.Linear(5, 5) for _ in range(20))).float()
    for layer in model:
        layer.weight.data.mul_(1e-3)
    found = bm.probe(bm.BackMatching(model, inputs=bm.Gradient()), batch().float(), square)
    assert "non-finite" in found.missing["scalar"]
    assert found.blocks[0].weight.beside["scalar"] is None
    assert found.blocks[0].as_dict()["weight"]["cosine"]["scalar"] is None


def test_zero_displacement_gives_null_and_never_nan() -> None:
    found = bm.probe(bm.BackMatching(bm.partition(net())), batch(), lambda out: (0 * out).sum())
    text = json.dumps([block.as_dict() for block in found.blocks], allow_nan=False)
    block = json.loads(text)[1]
    assert block["requested"] == 0
    assert block["local"] == {"ratio": None, "cosine": None}
    assert block["weight"]["cosine"]["gradient"] is None
    assert block["weight"]["ratio"]["gradient"] is None


def test_steps_of_another_shape_are_refused() -> None:
    model = net()
    wrong = {"mine": {model[0].weight: torch.zeros(3)}}
    with pytest.raises(ValueError, match=r"others\['mine'\].*expected \(7, 5\), got \(3,\)"):
        bm.probe(bm.BackMatching(bm.partition(model)), batch(), square, others=wrong)


def test_shadow_is_adam() -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.randn(3, 2).double()) for _ in range(2))
    shadow, adam = ShadowAdam([mine]), torch.optim.Adam([theirs])
    kept = mine.detach().clone()
    for _ in range(5):
        gradient = torch.randn(3, 2).double()
        shadow.feed([gradient])
        theirs.grad, before = gradient, theirs.detach().clone()
        adam.step()
        assert torch.allclose(shadow.steps()[mine], theirs.detach() - before, rtol=1e-7, atol=1e-15)
    assert torch.equal(mine, kept)
    other = ShadowAdam([mine])
    other.restore(shadow.state())
    assert torch.equal(other.steps()[mine], shadow.steps()[mine])
    with pytest.raises(ValueError, match="another shape"):
        ShadowAdam([nn.Parameter(torch.zeros(5))]).restore(shadow.state())


@settings(max_examples=40, deadline=None)
@given(
    systems=st.integers(1, 40),
    rows=st.integers(1, 6),
    n=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    log=st.floats(-6, 6),
)
def test_spectrum_of_any_batch(systems: int, rows: int, n: int, seed: int, log: float) -> None:
    torch.manual_seed(seed)
    J = torch.randn(systems, rows, n, dtype=torch.float64)
    problem = DenseBatch(J, torch.randn(systems, rows, dtype=torch.float64), 0.5, "sample")
    damping = torch.rand(systems, dtype=torch.float64) * 10**log + 1e-9
    seen = spectrum.spectrum(problem, damping)
    assert seen.systems == min(systems, 16)
    assert 1 - 1e-12 <= seen.condition.min <= seen.condition.median <= seen.condition.max
    if systems <= 16:
        H = 0.5 * J.mT @ J + damping[:, None, None] * torch.eye(n, dtype=torch.float64)
        values = torch.linalg.eigvalsh(H)
        worst = float((values[:, -1] / values[:, 0]).max())
        assert seen.condition_damped.max == pytest.approx(worst, rel=1e-4)
        assert seen.largest.max == pytest.approx(
            0.5 * float(torch.linalg.matrix_norm(J, 2).max()) ** 2, rel=1e-9
        )
    bounded = spectrum._largest(problem, torch.arange(min(systems, 16)))
    exact = torch.linalg.matrix_norm(J, 2).square()[: min(systems, 16)]
    assert bool((bounded <= exact * (1 + 1e-6)).all())


def test_spread() -> None:
    assert Spread.of(2.0) == Spread(2.0, 2.0, 2.0)
    assert Spread.of(torch.zeros(0)) is None
    assert math.isnan(Spread.of(torch.tensor([1.0, float("nan")])).median)
    assert Spread.of(torch.tensor([float("inf"), 1.0])).as_dict()["max"] is None
