"""The reference sweep against autograd, normal equations written by hand and finite differences."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import NETS, half_square, mlp
from torch import nn

from backmatch import reference
from backmatch.reference.jacobian import BlockMap
from backmatch.reference.sweep import weight_systems


# The reference reads class names and attributes only; these stand for the solvers of backmatch.
class Relative(SimpleNamespace):
    pass


class Gradient(SimpleNamespace):
    pass


class Scalar(SimpleNamespace):
    pass


class Cholesky(SimpleNamespace):
    pass


class LayerInverse(SimpleNamespace):
    pass


def exact(damping=0.0, rcond=None):
    return Cholesky(damping=damping, rcond=rcond)


def largest(*arrays):
    return max((float(np.abs(a).max()) for a in arrays if np.size(a)), default=0.0)


@pytest.mark.parametrize("name", NETS)
def test_gradient_on_both_sides_is_back_propagation(name):
    blocks, x, loss = NETS[name].make()
    state = torch.get_rng_state()
    result = reference.sweep(
        blocks, x, loss, weights=Gradient(), inputs=Gradient(), target_step=0.7
    )
    torch.set_rng_state(state)
    value = loss(nn.Sequential(*blocks)(x.clone()))
    value.backward()
    assert result.loss == pytest.approx(value.item(), rel=1e-14)
    for block, found in zip(blocks, result.blocks, strict=True):
        for parameter, p in block.named_parameters():
            if p.requires_grad:
                expected = 0.0 if p.grad is None else -0.7 * p.grad.numpy()
                assert largest(found.weight_step[parameter] - expected) < 1e-12
            else:
                assert parameter not in found.weight_step


@pytest.mark.parametrize("name", ["tanh", "dropout", "batch-norm", "conv", "tied", "features-3d"])
def test_jacobians_agree_with_finite_differences(name):
    blocks, x, _ = NETS[name].make()
    rng = np.random.default_rng(0)
    for block in blocks:
        f = BlockMap(block, x)
        d_w, d_z = rng.standard_normal(f.zero_w.shape), rng.standard_normal(f.zero_z.shape)
        for J, move in [
            (f.weight_jacobian(f.zero_w, f.zero_z) @ d_w, (1e-5 * d_w, f.zero_z)),
            (f.input_jacobian(f.zero_w, f.zero_z) @ d_z, (f.zero_w, 1e-5 * d_z)),
        ]:
            difference = (f.value(*move) - f.value(-move[0], -move[1])) / 2e-5
            assert largest(J - difference) < 1e-7
        x = f.out


@pytest.mark.parametrize("damping", [0.0, 0.3, Relative(factor=0.1)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_weights_are_a_ridge_regression(damping, bias):
    torch.manual_seed(1)
    block, x = nn.Linear(4, 3, bias=bias).double(), torch.randn(9, 4, dtype=torch.float64)
    y = torch.randn(9, 3, dtype=torch.float64)
    found = reference.sweep(
        [block], x, lambda z: half_square(z, y), weights=exact(damping), inputs=exact()
    ).blocks[0]
    Z = np.hstack([x.numpy(), np.ones((9, 1))]) if bias else x.numpy()
    r = (y - block(x)).detach().numpy()
    assert largest(found.displacement - r) < 1e-14
    trace = (Z**2).sum() / 9  # of one output unit; H_W has three such blocks
    shift = damping if isinstance(damping, float) else 0.1 * trace / Z.shape[1]
    d = np.linalg.solve(Z.T @ Z / 9 + shift * np.eye(Z.shape[1]), Z.T @ r / 9).T
    got = found.weight_step["weight"]
    got = np.hstack([got, found.weight_step["bias"][:, None]]) if bias else got
    assert largest(got - d) < 1e-12
    assert largest(found.weight_damping - shift) < 1e-14


@pytest.mark.parametrize("damping", [0.3, Relative(factor=0.1)])
def test_inputs_solve_their_normal_equations_sample_by_sample(damping):
    torch.manual_seed(2)
    top, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).double(), torch.randn(6, 3).double()
    bottom = nn.Linear(3, 5).double()
    result = reference.sweep(
        [bottom, top], x, lambda z: z.square().sum(), weights=exact(1.0), inputs=exact(damping)
    )
    r, W = result.blocks[1].displacement, top[0].weight.detach().numpy()
    for i, active in enumerate((top(bottom(x)) > 0).numpy()):
        J = active[:, None] * W
        mu = damping if isinstance(damping, float) else 0.1 * (J**2).sum() / 5
        expected = np.linalg.solve(J.T @ J + mu * np.eye(5), J.T @ r[i])
        assert largest(result.blocks[1].input_step[i] - expected) < 1e-12
        assert result.blocks[1].input_damping[i] == pytest.approx(mu)
    assert np.array_equal(result.blocks[0].displacement, result.blocks[1].input_step)
    assert result.blocks[0].input_step is None


@pytest.mark.parametrize("name", ["relu", "wide", "residual", "batch-norm", "features-3d"])
def test_damping_zero_is_the_pseudo_inverse(name):
    blocks, x, loss = NETS[name].make()
    result = reference.sweep(blocks, x, loss, weights=exact(), inputs=exact())
    for index, (block, found) in enumerate(zip(blocks, result.blocks, strict=True)):
        f, r = BlockMap(copy.deepcopy(block), x), found.displacement.ravel()
        d_w = np.concatenate([v.ravel() for v in found.weight_step.values()])
        J = f.weight_jacobian(f.zero_w, f.zero_z)
        assert largest(d_w - np.linalg.pinv(J, rcond=1e-9) @ r) < 1e-8 * (1 + largest(d_w))
        if index:
            J = f.input_jacobian(f.zero_w, f.zero_z)
            d_z = found.input_step.ravel()
            assert largest(d_z - np.linalg.pinv(J, rcond=1e-9) @ r) < 1e-8 * (1 + largest(d_z))
        x = f.out


@pytest.mark.parametrize("kind", ["trace", "spectral", "rayleigh"])
def test_scalar_divides_the_gradient_by_one_curvature(kind):
    blocks, x, loss = NETS["tanh"].make()
    solver = Scalar(kind=kind, damping=0.2)
    top = reference.sweep(blocks, x, loss, weights=solver, inputs=solver).blocks[2]
    z = nn.Sequential(*blocks[:2])(x).detach().numpy()
    Z, W, r = np.hstack([z, np.ones((5, 1))]), blocks[2].weight.detach().numpy(), top.displacement
    for H, g, got in [
        (Z.T @ Z / 5, (r.T @ Z / 5), np.column_stack(list(top.weight_step.values()))),
        (W.T @ W, r @ W, top.input_step),
    ]:
        c = {
            "trace": np.trace(H) / len(H),
            "spectral": np.linalg.eigvalsh(H)[-1],
            "rayleigh": np.einsum("ia,ab,ib->", g, H, g) / (g**2).sum(),
        }[kind]
        assert largest(got - g / (c + 0.2)) < 1e-13


def test_scalar_of_a_dead_block_is_zero():
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    nn.init.constant_(dead[0].bias, -100.0)
    solver = Scalar(kind="rayleigh", damping=0.0)
    result = reference.sweep(
        [nn.Linear(3, 3).double(), dead],
        torch.ones(2, 3),
        lambda z: (z - 1).square().sum(),
        weights=solver,
        inputs=solver,
    )
    assert not any(step.any() for b in result.blocks for step in b.weight_step.values())


def test_sequential_poses_the_input_problem_after_the_weights_moved():
    blocks, x, loss = NETS["tanh"].make()
    solver = exact(Relative(factor=0.1))
    options = {"weights": solver, "inputs": solver}
    sequential = reference.sweep(blocks, x, loss, order="sequential", **options)
    top, below = sequential.blocks[2], nn.Sequential(*blocks[:2])
    target = below[:2](x).detach() @ blocks[2].weight.T + blocks[2].bias
    target = (target + torch.from_numpy(top.displacement)).detach()
    with torch.no_grad():
        for name, p in blocks[2].named_parameters():
            p += torch.from_numpy(top.weight_step[name])
    # The moved net with the same target, simultaneous: its input step is the one asked for.
    moved = reference.sweep(blocks, x, lambda z: half_square(z, target), **options).blocks[2]
    assert largest(moved.input_step - top.input_step) < 1e-12
    assert largest(moved.displacement - top.displacement) > 1e-3


def test_passes_work_on_what_remains():
    blocks, x, loss = NETS["tanh"].make()
    solver = exact(Relative(factor=0.3))
    left = []
    for passes in (1, 2, 8):
        top = reference.sweep(
            blocks, x, loss, weights=solver, inputs=solver, order="sequential", passes=passes
        ).blocks[2]
        f = BlockMap(copy.deepcopy(blocks[2]), nn.Sequential(*blocks[:2])(x).detach())
        d_w = np.concatenate([v.ravel() for v in top.weight_step.values()])
        remaining = (
            f.out.numpy() + top.displacement - f.value(d_w, top.input_step.ravel()).reshape(5, 4)
        )
        left.append(np.linalg.norm(remaining))
    assert left[0] > 2 * left[1] > 2 * left[2]


def test_newton_steps_reach_a_stationary_point_of_phi():
    torch.manual_seed(3)
    block, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double(), torch.randn(6, 3).double()
    target = torch.rand(6, 2, dtype=torch.float64) - 0.5
    f = BlockMap(copy.deepcopy(block), x)

    def phi(d, damping):
        rho = target.numpy().ravel() - f.value(d, f.zero_z)
        return (rho @ rho) / 12 + damping / 2 * (d @ d)

    values = []
    for steps in (1, 2, 60):
        found = reference.sweep(
            [block], x, lambda z: half_square(z, target), weights=exact(Relative(factor=0.05)),
            inputs=exact(), newton_steps=steps,
        ).blocks[0]  # fmt: skip
        d = np.concatenate([v.ravel() for v in found.weight_step.values()])
        damping = found.weight_damping[0]
        values.append(phi(d, damping))
    assert values[0] > values[1] > values[2]
    slopes = [(phi(d + e, damping) - phi(d - e, damping)) / 2e-5 for e in 1e-5 * np.eye(8)]
    assert largest(np.array(slopes)) < 1e-7


def test_newton_halves_a_step_that_overshoots():
    # From the flat end of the sigmoid the linearised step overshoots by far.
    block = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid()).double()
    nn.init.constant_(block[0].weight, 6.0)
    x, y = torch.ones(1, 1).double(), torch.full((1, 1), 0.5).double()
    steps = {}
    for count in (1, 2):
        steps[count] = reference.sweep(
            [block], x, lambda z: half_square(z, y), weights=exact(), inputs=exact(),
            newton_steps=count,
        ).blocks[0].weight_step["0.weight"].item()  # fmt: skip
    assert steps[1] < -100
    after = 1 / (1 + np.exp(-(6.0 + steps[2])))
    assert abs(after - 0.5) < abs(1 / (1 + np.exp(-6.0)) - 0.5)


def test_model_and_random_state_are_as_after_one_forward_pass():
    net = nn.Sequential(*mlp(4, 5, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(4)
    x = torch.randn(6, 4)
    state = torch.get_rng_state()
    reference.sweep(net, x, lambda z: z.square().sum(), weights=exact(1.0), inputs=exact(1.0))
    after = torch.get_rng_state()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    torch.set_rng_state(state)
    copy.deepcopy(net).double()(x.double())
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", NETS)
def test_coupling_is_found(name):
    blocks, x, loss = NETS[name].make()
    result = reference.sweep(blocks, x, loss, weights=Gradient(), inputs=Gradient())
    assert any(block.coupled for block in result.blocks) == NETS[name].coupled


def test_solvers_can_be_chosen_per_block():
    blocks, x, loss = NETS["relu"].make()
    seen = []

    def choose(name, block):
        seen.append((name, type(block).__name__))
        return Gradient() if name == "2" else exact(0.1)

    mixed = reference.sweep(blocks, x, loss, weights=choose, inputs=Gradient())
    assert seen == [("2", "Linear"), ("1", "Sequential"), ("0", "Sequential")]
    plain = reference.sweep(blocks, x, loss, weights=Gradient(), inputs=Gradient())
    assert largest(mixed.blocks[2].weight_step["bias"] - plain.blocks[2].weight_step["bias"]) == 0


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(0.2), nn.Tanh(), nn.Sigmoid(), nn.Softplus(beta=1.5), nn.ELU(alpha=0.8)],
    ids=lambda module: type(module).__name__,
)
def test_layer_inverse_reaches_a_target_inside_the_range(activation):
    torch.manual_seed(5)
    bottom, x = nn.Linear(4, 4).double(), torch.randn(6, 4).double()
    top = nn.Sequential(nn.Linear(4, 4), activation).double()
    z = bottom(x).detach()
    y = activation(top[0](z) + torch.randn(6, 4)).detach()
    found = reference.sweep(
        [bottom, top], x, lambda out: half_square(out, y),
        weights=Gradient(), inputs=LayerInverse(damping=0.0, clamp=1e-3),
    ).blocks[1]  # fmt: skip
    assert largest((top(z + torch.from_numpy(found.input_step)) - y).detach().numpy()) < 1e-10


def test_layer_inverse_clamps_a_target_outside_the_range():
    top = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    nn.init.ones_(top[0].weight)
    found = reference.sweep(
        [nn.Identity(), top], torch.zeros(1, 1), lambda z: -5 * z.sum(),
        weights=Gradient(), inputs=LayerInverse(damping=0.0, clamp=1e-2),
    ).blocks[1]  # fmt: skip
    assert found.input_step.item() == pytest.approx(np.arctanh(0.99))


def test_unknown_options_are_refused():
    blocks, x, loss = NETS["linear"].make()
    good = {"weights": Gradient(), "inputs": Gradient()}
    with pytest.raises(ValueError, match="order"):
        reference.sweep(blocks, x, loss, order="parallel", **good)
    with pytest.raises(ValueError, match="passes"):
        reference.sweep(blocks, x, loss, passes=2, **good)
    with pytest.raises(TypeError, match="SimpleNamespace"):
        reference.sweep(blocks, x, loss, weights=SimpleNamespace(), inputs=Gradient())
    with pytest.raises(TypeError, match="cannot invert ReLU; use Auto"):
        reference.sweep(
            mlp(3, 3, 3)[:1] * 2, torch.ones(2, 3), lambda z: z.sum(),
            weights=Gradient(), inputs=LayerInverse(damping=0.1, clamp=1e-3),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("count", "layers"),
    [
        (4, [nn.Conv2d(2, 4, 2)]),
        (4, [nn.Tanh(), nn.Conv2d(2, 4, (1, 2), groups=2, bias=False), nn.ReLU()]),
        (3, [nn.Conv2d(2, 3, 3, 2, "valid", dilation=(1, 2)), nn.Dropout(0.3), nn.Flatten()]),
        (2, [nn.Conv2d(2, 2, (1, 3), padding="same")]),
        (1, [nn.Conv2d(2, 2, 1), nn.AvgPool2d(2)]),
        (1, [nn.Conv2d(2, 2, 1), nn.Linear(5, 2)]),
        (1, [nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")]),
    ],
)
def test_weight_systems_of_a_convolution_are_its_output_channels(count, layers):
    torch.manual_seed(6)
    f = BlockMap(nn.Sequential(*layers).double(), torch.randn(3, 2, 3, 5).double())
    J, systems = f.weight_jacobian(f.zero_w, f.zero_z), weight_systems(f)
    inside = np.zeros(J.shape, dtype=int)
    for rows, columns in systems:
        inside[np.ix_(rows, columns)] += 1
    assert len(systems) == count
    assert (inside.sum(1) == J.shape[1] // count).all()  # every row in one system
    assert not J[inside == 0].any()
