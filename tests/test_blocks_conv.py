"""Which route the problems of a convolution take, what it costs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import backmatch as bm
from backmatch.linalg import _library
from backmatch.training.peak_memory import PeakMemory

CPU = torch.device("cpu")


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
    """The factors of 300 channels with 145 unknowns are too large to hold: Auto goes on with CG."""
    block, z = nn.Conv2d(16, 1700, 3, bias=False), seeded(1, 16, 3, 3)
    record = sweep(block, z, weights=bm.Auto(0.0), inputs=bm.Gradient()).weight
    assert record.solver == "cg"
    with pytest.raises(ValueError, match=r"damping 0 .* CG"):
        sweep(block, z, weights=bm.Cholesky(0.0), inputs=bm.Gradient())


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
