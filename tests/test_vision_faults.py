"""Vision nets: failures that must change nothing, wrong inputs, and identities of a step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sweep_nets import ORDERS, batch, close, grads, square
from test_vision_lstsq import jacobians
from test_vision_model import EXACT, everything, maps, net
from torch import Tensor, nn
from vision_cases import NETS
from vision_modules import Residual

import backmatch as bm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

Conv = nn.Conv2d

#: Blocks that do not couple the samples, and some that do.
KINDS = [
    "conv-padded", "conv-grouped-act", "bn-train", "conv-bn-relu", "layer-norm", "group-norm",
    "conv-relu-max", "pool-avg-overlapping", "residual", "basic-block", "tied", "by-layer",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_the_batch_does_not_matter(order, name):
    turned = torch.tensor([2, 0, 1])
    steps = []
    for permutation in (torch.arange(3), turned):
        blocks, x, _ = NETS[name].make()
        step = bm.BackMatching(blocks, **EXACT, order=order).backward(
            x[permutation], square, keep=True
        )
        steps.append((grads(nn.ModuleList(blocks)), step.blocks[1].input_step))
    assert close(steps[0][0], steps[1][0])
    assert close([steps[0][1][turned]], [steps[1][1]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("place", ["0.0.weight", "2.body.0.weight", "0.1.bias", "input", "loss"])
def test_nothing_changes_when_a_number_is_not_finite(place, order, value):
    model, x = net(), maps()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    if place == "input":
        x[1, 0, 2, 2] = value
    elif place != "loss":
        model.get_parameter(place).data.view(-1)[0] = value
    torch.manual_seed(9)
    before = [t.clone() for t in everything(model)]

    def loss(out: Tensor) -> Tensor:
        return square(out) * (value if place == "loss" else 1.0)

    with pytest.raises(bm.NonFiniteError) as caught:
        bm.BackMatching(model, **EXACT, order=order).backward(x, loss)
    if "." in place:
        assert caught.value.block == place[0]
        assert caught.value.count == 1
    after = list(everything(model))
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


class Overflowing(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * 1e200 * 1e200


@pytest.mark.parametrize("order", ORDERS)
def test_numbers_that_overflow_above_a_norm_undo_its_statistics(order):
    model = net(Conv(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), Overflowing())
    before = [t.clone() for t in everything(model)]
    with pytest.raises(bm.NonFiniteError, match="block '3'"):
        bm.BackMatching(model, **EXACT, order=order).backward(maps(), square)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model), strict=True))
    assert all(p.grad is None for p in model.parameters())


WRONG = {
    "channels": (maps(channels=3), "2"),
    "unbatched": (maps()[0], "got"),
    "flat": (maps().flatten(1), "got"),
    "too-deep": (maps()[None], "got"),
    "integers": (torch.ones(3, 2, 4, 4, dtype=torch.long), ""),
    "smaller-than-the-kernel": (maps()[..., :1, :], ""),
}


def wrong(where: str) -> nn.Sequential:
    layers = {
        "alone": [Conv(2, 2, 3)],
        "activated": [nn.Sequential(Conv(2, 2, 3), nn.ReLU())],
        "normed": [nn.Sequential(Conv(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU())],
        "above": [nn.Identity(), Conv(2, 2, 3)],
    }
    return net(*layers[where])


@pytest.mark.parametrize("where", ["alone", "activated", "normed", "above"])
@pytest.mark.parametrize("kind", WRONG)
def test_inputs_that_a_convolution_cannot_take(kind, where):
    """The error names the block; nothing has changed."""
    x, text = WRONG[kind]
    model = wrong(where)
    before = [t.clone() for t in everything(model)]
    with pytest.raises((ValueError, TypeError)) as caught:
        bm.BackMatching(model, **EXACT).backward(x, square)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model), strict=True))
    message = str(caught.value)
    assert f"block '{len(model) - 1}'" in message
    assert text in message


def local_losses(name: str, **options: object) -> list[tuple[float, float, float]]:
    """Of every block: the loss, and what the weight and the input step leave of it."""
    blocks, x, loss = NETS[name].make()
    state = torch.get_rng_state()
    forward, inputs = x, []
    for block in copy.deepcopy(blocks):
        inputs.append(forward)
        forward = block(forward.clone()).detach()
    torch.set_rng_state(state)
    step = bm.BackMatching(copy.deepcopy(blocks), **options).backward(x, loss, keep=True)
    found = []
    for block, z, report in zip(blocks, inputs, step.blocks, strict=True):
        target = copy.deepcopy(block)(z.clone()).detach() + report.displacement

        def left(module: nn.Module, z: Tensor, target: Tensor = target) -> float:
            with torch.no_grad():
                return 0.5 * float((module(z.clone()) - target).square().sum()) / len(target)

        moved = copy.deepcopy(block)
        for n, d in (report.weight_step or {}).items():
            moved.get_parameter(n).data.add_(d)
        shifted = z if report.input_step is None else z + report.input_step
        found.append((report.loss_before, left(moved, z), left(copy.deepcopy(block), shifted)))
    return found


@pytest.mark.parametrize("damping", [1e-3, bm.Relative(0.1)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["conv-padded", "conv-same-even", "conv-grouped", "conv-depthwise", "conv-1x1-strided",
     "pool-avg-overlapping", "pool-adaptive-oblong", "pool-max-overlapping", "strided-pooled"],
)  # fmt: skip
def test_an_exact_step_of_a_linear_block_lowers_its_loss(name, damping):
    solver = bm.Cholesky(damping)
    for before, weights, inputs in local_losses(name, weights=solver, inputs=solver):
        assert weights <= before * (1 + 1e-12)
        if name != "pool-max-overlapping":  # a far step changes who is the largest
            assert inputs <= before * (1 + 1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*KINDS, "conv-same-even-act", "conv-gn-relu", "conv-relu-max"])
def test_newton_steps_never_raise_the_loss(name, order):
    solver = bm.Cholesky(bm.Relative(1e-3))
    options = {"weights": solver, "inputs": solver, "newton_steps": 2, "order": order}
    for before, weights, inputs in local_losses(name, **options):
        assert weights <= before * (1 + 1e-12)
        if order == "simultaneous":
            assert inputs <= before * (1 + 1e-12)


@pytest.mark.parametrize(
    "name", ["conv-padded", "conv-grouped", "conv-relu-max", "bn-eval", "tied"]
)
def test_what_an_undamped_step_leaves_is_orthogonal_to_the_range(name):
    """Identity 6: J^T (r - J d) = 0 on both sides."""
    blocks, x, loss = NETS[name].make()
    with torch.no_grad():
        z = blocks[0](x)
    J_w, J_z, _ = jacobians(blocks[1], z)
    solver = bm.Cholesky(0.0)
    report = (
        bm.BackMatching(blocks, weights=solver, inputs=solver)
        .backward(x, loss, keep=True)
        .blocks[1]
    )
    r = report.displacement.flatten().numpy()
    step = torch.cat([d.flatten() for d in report.weight_step.values()]).numpy()
    for J, d in [(J_w, step), (J_z, report.input_step.flatten().numpy())]:
        assert np.abs(J.T @ (r - J @ d)).max() < 1e-9 * np.abs(r).max()


def test_a_norm_of_one_value_hands_nothing_down():
    """Its output is beta whatever comes in: J = 0, so d = 0, however small the damping."""
    for norm in (nn.LayerNorm((1, 1)), nn.GroupNorm(2, 2)):
        model = net(Conv(2, 2, 1), norm)
        x = batch(4, 2, 1, 1)
        solver = bm.Cholesky(bm.Relative(0.1))
        step = bm.BackMatching(model, weights=solver, inputs=solver).backward(x, square, keep=True)
        assert step.blocks[1].input_step.abs().max() < 1e-9


def test_residual_blocks_and_their_parts_have_separate_parameters():
    model = net(Conv(2, 2, 1), Residual(Conv(2, 2, 1), Conv(2, 2, 1)))
    step = bm.BackMatching(model, **EXACT).backward(maps(), square, keep=True)
    assert set(step.blocks[1].weight_step) == {
        "body.weight", "body.bias", "shortcut.weight", "shortcut.bias",
    }  # fmt: skip


LARGE = {
    "conv": lambda: Conv(3, 4, 3, padding=1),
    "conv-relu-pool": lambda: nn.Sequential(Conv(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2, stride=1)),
    "conv-bn-relu": lambda: nn.Sequential(
        Conv(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4, eps=0.1), nn.ReLU()
    ),
    "pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "group-norm": lambda: nn.GroupNorm(3, 3, 0.1),
    "residual": lambda: Residual(nn.Sequential(Conv(3, 3, 3, padding=1), nn.Tanh())),
}


@pytest.mark.parametrize("name", LARGE)
def test_maps_above_the_direct_limit(name):
    """More than 256 unknowns and rows: ``Auto`` may take CG, the answer stays the dense one's."""
    answers = []
    for solver in (bm.Cholesky(0.3), bm.CG(0.3, rtol=1e-12), bm.Auto(0.3)):
        model = net(Conv(1, 3, 1), LARGE[name]())
        x = batch(4, 1, 10, 11)
        step = bm.BackMatching(model, weights=solver, inputs=solver).backward(x, square, keep=True)
        answers.append([*grads(model), step.blocks[1].input_step])
    dense, *others = answers
    for other in others:
        for a, b in zip(dense, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8 * float(dense[-1].abs().max()))
