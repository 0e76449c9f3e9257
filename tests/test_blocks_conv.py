"""Which route the problems of a convolution take, what it costs, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import backmatch as bm
from backmatch.linalg import _library
from backmatch.problems import operator
from backmatch.training.peak_memory import PeakMemory

CPU = torch.device("cpu")
F32, F64 = torch.float32, torch.float64


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_square(out: Tensor) -> Tensor:
    return 0.5 * (out - 1).square().sum() / len(out)


def sweep(block: nn.Module, z: Tensor, **options: object) -> bm.BlockReport:
    """The block above an Identity, so that it has an input problem."""
    torch.manual_seed(0)
    matcher = bm.BackMatching([nn.Identity(), block.to(z.dtype)], **options)
    return matcher.backward(z, half_square, keep=True).blocks[1]


def conv_relu(channels: int, out: int, **options: object) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, **options), nn.ReLU())


@pytest.mark.parametrize(
    ("layers", "structure", "systems"),
    [
        ([nn.Conv2d(4, 6, 3)], "unit", 6),
        ([nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten()], "unit", 6),
        ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], "joint", 1),
        ([nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2)], "joint", 1),
        ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)], "joint", 1),
    ],
)
def test_weights_are_solved_directly_whatever_their_number(layers, structure, systems):
    """36 unknowns per channel, more than 256 rows and unknowns in all: Auto needs no CG."""
    record = sweep(nn.Sequential(*layers), seeded(20, 4, 8, 8)).weight
    assert (record.solver, record.structure, record.systems) == ("cholesky", structure, systems)
    assert record.residual < 1e-10
    assert record.trace == "exact"


@pytest.mark.parametrize("slopes", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("samples", [2, 30])
def test_chunks_change_nothing_but_rounding(monkeypatch, slopes, norm, samples):
    """Primal (many rows) and dual (few), patches and channels in one chunk or in many."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(4, 6, 3, groups=2)]
    layers += [nn.BatchNorm2d(6)] * norm + [nn.GELU()] * slopes
    block, z = nn.Sequential(*layers), seeded(samples, 4, 5, 6)
    whole = sweep(block, z, weights=bm.Cholesky(bm.Relative(0.1)))
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", 40_000)
    parts = sweep(block, z, weights=bm.Cholesky(bm.Relative(0.1)))
    for name, want in whole.weight_step.items():
        assert torch.allclose(parts.weight_step[name], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", [True, False])
def test_no_patch_matrix_of_the_whole_batch(monkeypatch, norm):
    """Patches and Gram matrices stay within the workspace beside what grows with in- and output.

    In float32: torch's own float64 convolution on the CPU unfolds the whole batch.
    """
    workspace = 2**20
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", workspace)
    block, z = conv_relu(16, 4), seeded(64, 16, 16, 16).float()
    if norm:
        block.insert(1, nn.BatchNorm2d(4))
    patches = 4 * 64 * 16 * 16 * (16 * 9 + 1)
    output = 4 * 64 * 4 * 16 * 16
    matcher = bm.BackMatching([block], weights=bm.Cholesky(0.1))
    with PeakMemory(CPU) as memory:
        matcher.backward(z, half_square)
    # Slopes, residual, displacement and the like; the input squared, and in another layout.
    stated = workspace + 12 * output + 2 * 4 * z.numel()
    assert stated < 0.75 * patches
    assert memory.total < stated


def test_large_undamped_systems_take_cg_by_default():
    """The factors of 1700 channels with 145 unknowns are too large to hold: Auto takes CG."""
    block, z = nn.Sequential(nn.Conv2d(16, 1700, 3), nn.Tanh()), seeded(20, 16, 5, 5)
    record = sweep(block, z, weights=bm.Auto(0.0), inputs=bm.Gradient()).weight
    assert record.solver == "cg"
    with pytest.raises(ValueError, match=r"damping 0 .* CG"):
        sweep(block, z, weights=bm.Cholesky(0.0), inputs=bm.Gradient())


def test_few_rows_take_little_room_at_damping_0():
    """Ten Jacobians of 8 x 4609: R has no more rows than J, so Cholesky solves them."""
    record = sweep(nn.Conv2d(512, 10, 3), seeded(8, 512, 3, 3), weights=bm.Cholesky(0.0)).weight
    assert (record.solver, record.rank) == ("cholesky", 80)
    block = nn.Sequential(nn.Conv2d(512, 10, 3), nn.Tanh())
    assert sweep(block, seeded(8, 512, 3, 3), weights=bm.Cholesky(0.0)).weight.rank == 80


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3, padding=1), "linear"])
@pytest.mark.parametrize("solver", [bm.Auto(bm.Relative(0.1)), bm.CG(bm.Relative(0.1))])
def test_float32_survives_a_mean_far_above_the_spread(layer, solver):
    """Batch statistics take the mean off; no sum over uncentred patches may come before."""
    z = 255 - 0.1 * torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    norm: nn.Module = nn.BatchNorm2d(6)
    if layer == "linear":
        torch.manual_seed(0)
        layer, norm, z = nn.Linear(9, 6), nn.BatchNorm1d(6), z.flatten()[: 16 * 9].view(16, 9)
    block = nn.Sequential(layer, norm, nn.LeakyReLU(0.1))
    low, high = (sweep(copy.deepcopy(block), z.to(t), weights=solver) for t in (F32, F64))
    # The spread of z itself is known to 2^-16 / 0.1 here; batch norm hands that on.
    assert low.weight.damping == pytest.approx(high.weight.damping, rel=1e-2)
    size = max(float(v.abs().max()) for v in high.weight_step.values())
    for name, want in high.weight_step.items():
        assert (low.weight_step[name] - want).abs().max() < 0.02 * size


def test_a_bias_that_batch_statistics_take_away_stays():
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    for solver in (bm.Cholesky(1e-3), bm.CG(1e-3), bm.Gradient()):
        assert (
            not sweep(block, seeded(5, 3, 6, 6).float(), weights=solver).weight_step["0.bias"].any()
        )


def test_a_channel_too_large_for_its_gram_names_cg(monkeypatch):
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", 10_000)
    block, z = conv_relu(8, 3), seeded(20, 8, 6, 6)
    with pytest.raises(ValueError, match=r"weight problem of block .1. .* use CG"):
        sweep(block, z, weights=bm.Cholesky(0.1))
    assert sweep(block, z, weights=bm.Auto(0.1)).weight.solver == "cg"


def test_inputs_are_one_system_per_sample_with_a_stop_of_its_own():
    """A sample with a zero displacement takes no step and stops at once."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 9, 3, padding=1, bias=False).double()
    z = seeded(5, 4, 24, 24)
    z[2] = 0

    def loss(out: Tensor) -> Tensor:
        return 0.5 * out.square().sum() / len(out)

    matcher = bm.BackMatching([nn.Identity(), conv], inputs=bm.Auto(bm.Relative(1e-2)))
    report = matcher.backward(z, loss, keep=True).blocks[1]
    assert (report.input.solver, report.input.structure, report.input.systems) == (
        "cg",
        "sample",
        5,
    )
    assert report.input.converged
    assert not report.input_step[2].any()
    assert report.input_step[1].any()


def test_small_maps_take_the_explicit_operator():
    report = sweep(conv_relu(3, 5), seeded(6, 3, 5, 4))
    assert (report.input.solver, report.input.trace) == ("cholesky", "exact")


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.Tanh(), nn.Softplus()])
def test_layer_inverse_of_a_convolution(activation):
    """At damping 0 and full row rank the new pre-activation hits the inverted target."""
    torch.manual_seed(3)
    block = nn.Sequential(nn.Conv2d(6, 2, 2, groups=2, stride=2), activation).double()
    z = seeded(3, 6, 4, 6)

    def loss(out: Tensor) -> Tensor:
        return 0.05 * (out * seeded(*out.shape, seed=4)).sum() / len(out)

    matcher = bm.BackMatching([nn.Identity(), block], inputs=bm.LayerInverse(0.0, clamp=1e-6))
    report = matcher.backward(z, loss, keep=True).blocks[1]
    reached = block(z + report.input_step)
    assert torch.allclose(reached, block(z) + report.displacement, atol=1e-9)


JOINT = {
    "relu": [nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.ReLU()],
    "grouped": [nn.Conv2d(4, 6, (2, 3), groups=2, padding="same"), nn.BatchNorm2d(6), nn.Tanh()],
    "pooled": [nn.Conv2d(4, 2, 3, 2, 1), nn.BatchNorm2d(2, affine=False), nn.MaxPool2d(2, 1)],
    "dilated": [nn.Conv2d(4, 4, 2, groups=4, padding=1, dilation=2), nn.BatchNorm2d(4)],
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", JOINT)
def test_the_trace_behind_batch_statistics_is_exact_at_any_size(monkeypatch, name):
    """The same damping as from the dense Jacobian, which the limits rule out the second time."""
    block, z = nn.Sequential(*JOINT[name]), seeded(3, 4, 5, 6)
    solver = bm.CG(bm.Relative(0.1), rtol=1e-12)
    dense = sweep(copy.deepcopy(block), z, inputs=solver, weights=bm.Gradient()).input
    for constant in ("EXACT_SIDE", "UNDAMPED_SIDE"):
        monkeypatch.setattr(operator, constant, 0)
    free = sweep(copy.deepcopy(block), z, inputs=solver, weights=bm.Gradient()).input
    assert free.trace == "exact"
    assert free.damping == pytest.approx(dense.damping, rel=1e-12)


def test_the_trace_of_a_joint_linear_is_exact():
    block = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.ReLU())
    z = seeded(20, 40)
    found = sweep(block, z, inputs=bm.CG(bm.Relative(0.1)), weights=bm.Gradient()).input
    J = torch.autograd.functional.jacobian(block, z).reshape(600, 800)
    assert found.damping == pytest.approx(0.1 * float(J.square().sum()) / 800, rel=1e-10)


def test_the_order_of_the_batch_does_not_matter_by_default():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), *layers).double()
    z, order = seeded(20, 1, 8, 8), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    matcher = bm.BackMatching(bm.partition(model))
    straight = matcher.backward(z, half_square, keep=True).blocks
    mixed = matcher.backward(z[order], half_square, keep=True).blocks
    assert straight[1].input.systems == 1
    size = straight[0].displacement.abs().max()
    # Conjugate gradient stops at a residual of 1e-10.
    assert (mixed[0].displacement - straight[0].displacement[order]).abs().max() < 1e-7 * size


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=["batch", "group"])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_dropout_behind_a_norm_keeps_its_mask_on_channels_last_maps(norm, order):
    """The mask is drawn in the order of memory: every evaluation must have the same layout."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, nn.Dropout(0.5)).double()
    block = block.to(memory_format=torch.channels_last)
    z = seeded(4, 2, 6, 6).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(5)
    want = copy.deepcopy(block)(z)
    torch.manual_seed(5)
    matcher = bm.BackMatching(
        [nn.Identity(), block], weights=bm.Gradient(), inputs=bm.Gradient(), order=order
    )
    step = matcher.backward(z, lambda out: 0.0 * out.sum(), keep=True)
    assert torch.equal(step.output, want)
    assert not step.blocks[1].input_step.any()
    (_, report) = bm.audit(
        matcher, z, half_square, optimizer=torch.optim.SGD(block.parameters(), 0)
    )
    assert report.local.norm == 0.0
