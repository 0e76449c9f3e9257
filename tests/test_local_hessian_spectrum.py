"""Spectra that can be written down: ranks, condition numbers, kappa; Lanczos against dense."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backmatch as bm
from backmatch.analysis import hessian, lanczos

F32, F64 = torch.float32, torch.float64


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    layer.weight.data.copy_(W)
    return layer


def with_condition(n: int, condition: float) -> Tensor:
    """A matrix whose J^T J has this condition number."""
    U, V = torch.linalg.qr(seeded(n, n)).Q, torch.linalg.qr(seeded(n, n, seed=1)).Q
    return (U * torch.logspace(0, -math.log10(condition) / 2, n, dtype=F64)) @ V


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("a", "median", "tolerance"),
    [(None, 5.5e4, 0.25), (0.1, 1.72, 0.02), (0.25, 3.97, 0.03), (0.5, 18.8, 0.12)],
)
def test_kappa_of_initialisations(
    dtype: torch.dtype, a: float | None, median: float, tolerance: float
) -> None:
    """Gaussian W, and I + aW with a skip connection, at n = 64; the medians of 200 draws."""
    found = []
    for seed in range(200):
        W = seeded(64, 64, seed=seed) / 8
        if a is None:
            block: nn.Module = linear(W.to(dtype))
        else:
            block = bm.blocks.Residual(linear((a * W).to(dtype)))
        H = bm.local_hessian(block, torch.zeros(1, 64, dtype=dtype))
        found.append(H.kappa(64))
        # A float32 J below its own resolution is the one case where the range is smaller.
        assert H.condition_number == H.kappa(64) or (dtype == F32 and H.kappa(64) == math.inf)
    assert statistics.median(found) == pytest.approx(median, rel=tolerance)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_centring_mends_the_weight_side(dtype: torch.dtype) -> None:
    X = torch.rand(256, 64, generator=torch.Generator().manual_seed(0), dtype=F64).add(0.5)
    layer = linear(seeded(3, 64, dtype=dtype))
    raw = bm.local_hessian(layer, X.to(dtype), "weight").condition_number
    centred = bm.local_hessian(layer, (X - X.mean(0)).to(dtype), "weight").condition_number
    assert raw == pytest.approx(2.8e3, rel=0.15)
    assert centred == pytest.approx(8.1, rel=0.15)
    values = np.linalg.svd(X.to(dtype).double().numpy(), compute_uv=False)
    assert raw == pytest.approx((values[0] / values[-1]) ** 2, rel=1e-9)


@pytest.mark.parametrize("condition", [1e8, 1e12, 1e20])
@pytest.mark.parametrize("behind", [None, nn.LeakyReLU(1.0), nn.Softplus(beta=50.0)])
def test_condition_numbers_beyond_one_over_eps(condition: float, behind: nn.Module | None) -> None:
    """From the singular values of J: J^T J would lose all above 1e16."""
    layer = linear(with_condition(24, condition))
    block = layer if behind is None else nn.Sequential(layer, behind)
    z = torch.linalg.solve(layer.weight.detach(), torch.full((24,), 9.0, dtype=F64)).unsqueeze(0)
    for each in (block, bm.blocks.Residual(nn.Linear(24, 24).double(), block)):
        if each is not block:  # an operator: J by products
            nn.init.zeros_(each.body.weight)
        H = bm.local_hessian(each, z)
        assert H.rank == 24
        assert H.condition_number == pytest.approx(condition, rel=1e-3)


def test_orthonormal_weights_have_condition_one() -> None:
    """Identity 7's companion: W = cQ gives c^2 I."""
    block = linear(3.0 * torch.linalg.qr(seeded(9, 9)).Q)
    H = bm.local_hessian(block, seeded(4, 9))
    assert torch.allclose(H.eigenvalues, torch.full((36,), 9.0, dtype=F64))
    assert H.condition_number == pytest.approx(1.0)
    assert H.trace_mean == pytest.approx(9.0)
    assert torch.allclose(H.to_dense(), 9 * torch.eye(36, dtype=F64))


@pytest.mark.parametrize(("dtype", "hooked"), [(F32, False), (F64, False), (F64, True)])
def test_batch_norm_spectrum(dtype: torch.dtype, hooked: bool) -> None:
    """0 on the constants, (k e)^2 on xhat, k^2 on the rest: rank N - 1 per channel."""
    block = nn.BatchNorm1d(3).to(dtype)
    nn.init.normal_(block.weight, generator=torch.Generator().manual_seed(0))
    z = seeded(11, 3, dtype=dtype)
    if hooked:
        block.register_forward_hook(lambda *_: None)
    H = bm.local_hessian(block, z)
    variance = z.double().var(0, unbiased=False)
    k2 = block.weight.detach().double().square() / (variance + block.eps)
    e2 = (block.eps / (variance + block.eps)).square()
    want = torch.cat([k2.repeat_interleave(9), k2 * e2, torch.zeros(3)]).sort(descending=True)
    assert H.method == ("svd" if hooked else "closed form")
    assert H.rank == 3 * 10
    assert torch.allclose(H.eigenvalues[27:30].double(), want.values[27:30], rtol=1e-5, atol=0)
    assert torch.allclose(H.eigenvalues.double(), want.values, rtol=1e-5, atol=1e-12)


def test_rank_of_masked_and_wide_layers() -> None:
    """ReLU masks drop rows, wide layers lack them; each sample's own mask counts."""
    layer = nn.Linear(6, 9).double()
    z = seeded(5, 6)
    active = (layer(z) > 0).sum(1).clamp_max(6)
    assert bm.local_hessian(nn.Sequential(layer, nn.ReLU()), z).rank == int(active.sum())
    H = bm.local_hessian(layer, z, "weight")
    assert (H.rank, H.size) == (9 * 5, 9 * 7)
    assert int((H.eigenvalues == 0).sum()) == 9 * 2


def test_low_rank_float32_weights() -> None:
    """Rounding of a product of float32 factors is no rank."""
    W = seeded(32, 4, dtype=F32) @ seeded(4, 32, seed=1, dtype=F32)
    assert bm.local_hessian(linear(W), torch.ones(3, 32)).rank == 12
    assert bm.local_hessian(nn.Sequential(linear(W), nn.Tanh()), torch.ones(3, 32) / 99).rank == 12


def test_samples_are_cut_by_their_own_scale() -> None:
    """A sample with tiny slopes has as full a rank as its neighbour."""
    block = nn.Sequential(linear(torch.eye(4, dtype=F64)), nn.Sigmoid())
    z = torch.stack([torch.zeros(4), torch.full((4,), -60.0)]).double()
    H = bm.local_hessian(block, z)
    assert H.rank == 8
    assert H.condition_number == pytest.approx((0.25 / math.exp(-60)) ** 2, rel=1e-9)


def test_rcond_moves_the_cut() -> None:
    block = linear(torch.diag(torch.tensor([1.0, 1e-2, 1e-6], dtype=F64)))
    z = seeded(2, 3)
    assert [bm.local_hessian(block, z, rcond=c).rank for c in (None, 1e-4, 0.1)] == [6, 4, 2]
    assert bm.local_hessian(block, z, rcond=0.1).condition_number == 1.0
    assert bm.local_hessian(block, z, rcond=0.1).kappa(3) == math.inf


def test_kappa_counts_from_the_largest() -> None:
    block = linear(torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=F64)))
    H = bm.local_hessian(block, seeded(1, 3))
    assert [round(H.kappa(p), 9) for p in (1, 2, 3)] == [1.0, 4.0, 16.0]
    with pytest.raises(ValueError, match="p must be at most 3, the size, got 4"):
        H.kappa(4)
    with pytest.raises(ValueError, match="p must be at least 1, got 0"):
        H.kappa(0)
    with pytest.raises(TypeError, match="p must be an int, got float"):
        H.kappa(1.5)  # type: ignore[arg-type]


def test_zero_matrix() -> None:
    H = bm.local_hessian(linear(torch.zeros(3, 3)), torch.ones(2, 3))
    assert (H.rank, H.spectral_norm, H.trace) == (0, 0.0, 0.0)
    assert math.isnan(H.condition_number)
    assert math.isnan(H.kappa(1))
    large = bm.local_hessian(linear(torch.zeros(30, 30)), torch.ones(2, 30), k=2)
    assert large.eigenvalues.tolist() == [0.0, 0.0]


def test_indefinite_full_hessian() -> None:
    """Signed descending values; norm, kappa and condition number by magnitude."""
    block = nn.Tanh()
    z = torch.tensor([[0.3, 0.9, -0.5]], dtype=F64)
    r = torch.tensor([[-20.0, 3.0, 1.0]], dtype=F64)
    t = torch.tanh(z)
    want = ((1 - t * t) ** 2 + 2 * r * t * (1 - t * t)).flatten()
    H = bm.local_hessian(block, z, displacement=r)
    assert torch.allclose(H.eigenvalues, want.sort(descending=True).values)
    assert float(H.eigenvalues[-1]) < 0
    sizes = want.abs().sort(descending=True).values
    assert H.spectral_norm == pytest.approx(float(sizes[0]))
    assert H.kappa(3) == H.condition_number == pytest.approx(float(sizes[0] / sizes[2]))
    assert H.rank == 3
    two = bm.local_hessian(block, z, displacement=r, k=2).eigenvalues
    assert torch.allclose(two.abs().sort(descending=True).values, sizes[:2])


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "shared-input": (lambda: nn.Linear(20, 15), (4, 20), "input"),
    "shared-weight": (lambda: nn.Linear(20, 6), (9, 20), "weight"),
    "family": (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh()), (5, 12), "input"),
    "grouped-conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5), "weight"),
    "conv-input": (lambda: nn.Conv2d(2, 3, 3, padding=1), (3, 2, 5, 4), "input"),
    "joint": (lambda: nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9)), (7, 8), "input"),
    "operator": (lambda: bm.blocks.Residual(nn.Linear(9, 9)), (6, 9), "weight"),
}


@pytest.mark.parametrize("full", [False, True], ids=["gauss-newton", "full"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("run", [lanczos.arpack, lanczos.torch_lanczos])
def test_lanczos_finds_multiple_eigenvalues(
    run: lanczos.Run, name: str, dtype: torch.dtype, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k largest of all eigenvalues, copies included, on the CPU's and on CUDA's route."""
    torch.manual_seed(0)
    make, shape, side = CASES[name]
    block, z = make().to(dtype), seeded(*shape, dtype=dtype)
    r = seeded(*block(z).shape, seed=1, dtype=dtype) if full else None
    dense = bm.local_hessian(block, z, side, r)
    sizes = dense.eigenvalues.abs().sort(descending=True).values[:8]
    monkeypatch.setattr(hessian, "DENSE_WORK", 0.0)
    chosen = lanczos.extreme_eigenvalues
    for module in ("gauss_newton", "full_hessian"):
        monkeypatch.setattr(
            f"backmatch.analysis.{module}.extreme_eigenvalues",
            lambda product, like, k: chosen(product, like, k, run),
        )
    H = bm.local_hessian(block, z, side, r, k=8)
    tolerance = 1e-5 if dtype == F32 else 1e-10
    found = H.eigenvalues.abs().sort(descending=True).values
    assert H.method == "lanczos"
    assert not H.is_complete
    assert torch.allclose(found, sizes, rtol=tolerance, atol=tolerance * float(sizes[0]))
    assert torch.equal(H.eigenvalues, H.eigenvalues.sort(descending=True).values)
    assert H.spectral_norm == pytest.approx(dense.spectral_norm, rel=tolerance)
    assert H.kappa(8) == pytest.approx(dense.kappa(8), rel=100 * tolerance)
    for name in ("rank", "condition_number"):
        with pytest.raises(ValueError, match=f"{name} needs all eigenvalues"):
            getattr(H, name)
    with pytest.raises(ValueError, match=r"p must be at most 8, .*raise k"):
        H.kappa(9)


@pytest.mark.parametrize("run", [lanczos.arpack, lanczos.torch_lanczos])
def test_lanczos_on_operators_of_low_rank_and_clusters(run: lanczos.Run) -> None:
    U = seeded(60, 2)
    spread = torch.linspace(0, 1, 800, dtype=F64)
    for A in (U @ U.T, torch.eye(40, dtype=F64), torch.diag(spread), torch.zeros(9, 9).double()):
        want = torch.linalg.eigvalsh(A).flip(0)[:5]
        got = lanczos.extreme_eigenvalues(lambda v, A=A: A @ v, A.new_empty(len(A)), 5, run)
        assert torch.allclose(got.sort(descending=True).values, want, rtol=1e-9, atol=1e-9)


def test_lanczos_that_stops_early_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    A = torch.diag(torch.linspace(0, 1, 3000, dtype=F64))
    monkeypatch.setattr(lanczos, "LEAST_STEPS", 20)
    with pytest.raises(bm.NotConvergedError, match="did not settle 1 eigenvalues within 40 steps"):
        lanczos.torch_lanczos(lambda v: A @ v, A.new_empty(3000), 1, 0)
    solve = lanczos.eigsh
    monkeypatch.setattr(lanczos, "eigsh", lambda *a, **options: solve(*a, **options, maxiter=1))
    with pytest.raises(bm.NotConvergedError, match=r"found \d of 3 eigenvalues before its cap"):
        lanczos.arpack(lambda v: A @ v, A.new_empty(3000), 3, 0)


def test_large_blocks_take_lanczos_by_themselves() -> None:
    """A few samples of a wide convolution with a batch norm: all eigenvalues would take hours."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    H = bm.local_hessian(block, torch.randn(4, 8, 16, 16))
    assert H.size == 8192
    assert H.method == "lanczos"
    assert len(H.eigenvalues) == 10
    v = torch.randn(H.size)
    assert float(v @ (H @ v) / (v @ v)) < H.spectral_norm
    assert H.trace_is_exact


def test_gram_route_where_one_side_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jacobians too large to keep: eigenvalues of J^T J or J J^T, whichever is smaller."""
    from backmatch.analysis import singular_values

    torch.manual_seed(0)
    tall, wide = nn.Linear(3, 3), nn.Linear(40, 2)
    for layer, samples in ((tall, 50), (wide, 4)):
        block = (
            bm.blocks.Residual(layer) if layer is tall else nn.Sequential(layer, nn.Linear(2, 2))
        )
        block, z = block.double(), seeded(samples, layer.in_features)
        want, got = (bm.local_hessian(block, z, "weight") for _ in range(2))
        assert want.method == "svd"
        monkeypatch.setattr(singular_values, "DENSE_ENTRIES", 10)
        assert got.method == "gram"
        assert torch.allclose(got.eigenvalues, want.eigenvalues, rtol=1e-9, atol=1e-12)
        assert got.rank == want.rank
        monkeypatch.undo()


def test_estimated_trace_says_so() -> None:
    """Wide and tall at once, without structure: Hutchinson, close to the truth."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 40)).double()
    H = bm.local_hessian(block, seeded(10, 20), "weight")
    assert H.size > 256
    assert not H.trace_is_exact
    estimate = H.trace
    total = float(H.eigenvalues.sum())
    assert H.trace_is_exact  # now that all eigenvalues are known
    assert H.trace == pytest.approx(total)
    assert estimate == pytest.approx(total, rel=0.2)


def test_trace_mean_is_the_scalar_of_the_sweep() -> None:
    """``Scalar(kind="trace")`` divides the gradient by it, on both sides."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()).double()
    z = seeded(7, 4)
    traces = [bm.local_hessian(block, z, side).trace_mean for side in ("weight", "input")]
    steps = []
    for solver in (bm.Gradient(), bm.Scalar(kind="trace")):
        matcher = bm.BackMatching([nn.Identity(), block], weights=solver, inputs=solver)
        step = matcher.backward(z, lambda out: out.square().sum() / 7, keep=True).blocks[1]
        steps.append((step.weight_step["0.weight"], step.input_step))
    for c, gradient, scaled in zip(traces, *steps, strict=True):
        assert torch.allclose(scaled * c, gradient, rtol=1e-9, atol=1e-14)


def test_eigenvalues_are_the_callers_own() -> None:
    H = bm.local_hessian(linear(torch.eye(3, dtype=F64)), seeded(2, 3))
    H.eigenvalues.zero_()
    assert (H.rank, float(H.eigenvalues.sum())) == (6, 6.0)
