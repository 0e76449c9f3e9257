"""The CUDA implementations of the operators.

On a GPU against the CPU; without one the host side of them (chunks, workspace, pointers, stream)
with kernels that hand over to the CPU's.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import linalg_cases as lc
import pytest
import torch

from backmatch import linalg
from backmatch.linalg import _library, _ridge_routes, dense_cg, scaled_gram, spd
from backmatch.linalg._ridge_choice import choose, choose_on_device
from backmatch.linalg._ridge_routes import dual, primal
from backmatch.linalg.weighted_gram import _cuda as weighted_gram_on_cuda
from backmatch.linalg.weighted_gram import weighted_gram_unchecked

STREAM = 77
BYTES_PER_SYSTEM = 48

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(_library.native(), "cuda")),
    reason="no GPU, or a build without CUDA kernels",
)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for ``_C.cuda`` that record the batch size of every launch."""
    native = _library.native()
    launched = []

    def stand_in(kernel):
        def launch(dtype, batch, *arguments):
            *arguments, workspace, stream = arguments
            assert workspace % 16 == 0
            assert stream == STREAM
            launched.append(batch)
            kernel(dtype, batch, *arguments)

        return launch

    def without_workspace(kernel):
        def launch(dtype, batch, *arguments):
            *arguments, stream = arguments
            assert stream == STREAM
            launched.append(batch)
            kernel(dtype, batch, *arguments)

        return launch

    fake = SimpleNamespace(
        spd_solve=stand_in(native.spd_solve),
        weighted_gram=without_workspace(native.weighted_gram),
        ridge_primal=without_workspace(native.ridge_dual),  # the same minimiser
        scaled_gram_solve=stand_in(native.scaled_gram_solve),
        spd_solve_workspace=lambda dtype, batch, n, k: BYTES_PER_SYSTEM * batch,
        scaled_gram_solve_workspace=lambda dtype, batch, n: BYTES_PER_SYSTEM * batch,
        launched=launched,
    )
    for name in ("spd", "scaled_gram", "weighted_gram", "_ridge_routes"):
        module = sys.modules[f"backmatch.linalg.{name}"]
        monkeypatch.setattr(module, "native_cuda", lambda: fake)
    for module in (spd, scaled_gram):
        monkeypatch.setattr(module, "_run", module._run_on_cuda)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    return fake


@pytest.mark.parametrize("per_launch", [1, 3, 100])
def test_spd_solve_launches(kernels, monkeypatch, per_launch):
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", per_launch * BYTES_PER_SYSTEM)
    A, B, damping = lc.spd(2, 4, 5), lc.normal(4, 5, 2, seed=1), torch.tensor(0.5).double()
    X, info = linalg.spd_solve_ex(A, B, damping=damping)
    assert kernels.launched == {1: [1] * 8, 3: [3, 3, 2], 100: [8]}[per_launch]
    torch.testing.assert_close(X, torch.linalg.solve(A + 0.5 * torch.eye(5).double(), B))
    assert info.shape == (2, 4)


@pytest.mark.parametrize("per_launch", [1, 3, 100])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_scaled_gram_solve_launches(kernels, monkeypatch, lead, per_launch):
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", per_launch * BYTES_PER_SYSTEM)
    Z, D = lc.normal(*lead, 6, 7), lc.relu_like(4, 6, seed=1)
    R, damping = lc.normal(*lead, 4, 6, seed=2), lc.normal(4, seed=3).abs() + 0.1
    K = Z @ Z.mT
    X, info = linalg.scaled_gram_solve_ex(K, D, R, damping=damping)
    assert kernels.launched == {1: [1] * 4, 3: [3, 1], 100: [4]}[per_launch] * (2 if lead else 1)
    d = D.unsqueeze(-1)
    A = d * K.unsqueeze(-3) * d.mT + damping[:, None, None] * torch.eye(6).double()
    expected = d * torch.linalg.solve(A, R.unsqueeze(-1))
    torch.testing.assert_close(X, expected.squeeze(-1))
    assert not info.any()


@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
def test_spd_solve_above_the_kernels_order_goes_to_the_library(kernels, monkeypatch, dtype, budget):
    """By order alone: failures, neighbours and damping as the kernel has them."""
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", budget)
    monkeypatch.setattr(spd, "CUDA_KERNEL_SIDE", 8)
    A, B = lc.spd(6, 9, dtype=dtype), lc.normal(6, 9, 2, dtype=dtype, seed=1)
    A = A.tril() + torch.full((9, 9), torch.nan, dtype=dtype).triu(1)  # read by nobody
    A[1, 4, :5], A[3, 8, 0] = 0, torch.nan
    A[1, 4, 4] = -1
    damping = torch.tensor([0.0, 0.0, 0.5, 0.0, torch.nan, torch.inf], dtype=dtype)
    before = A.clone()
    X, info = linalg.spd_solve_ex(A, B, damping=damping)
    assert kernels.launched == []
    assert info.tolist() == [0, 5, 0, 9, 1, 1]
    assert info.dtype == torch.int32
    assert X[[1, 3, 4, 5]].isnan().all()
    torch.testing.assert_close(A, before, equal_nan=True)
    lower = A.tril()
    full = lower + lower.tril(-1).mT + damping[:, None, None] * torch.eye(9, dtype=dtype)
    for j in (0, 2):
        torch.testing.assert_close(X[j], torch.linalg.solve(full[j], B[j]))
        alone, _ = linalg.spd_solve_ex(A[j], B[j], damping=damping[j])
        torch.testing.assert_close(alone, X[j])
    for part, count in ((A[:0], 0), (A, 6)):  # no systems, no right-hand sides
        X, info = linalg.spd_solve_ex(part, B[:count, :, :0], damping=damping[:count])
        assert (X.shape, info.tolist()) == ((count, 9, 0), [0, 5, 0, 9, 1, 1][:count])
    linalg.spd_solve_ex(A[:, :8, :8], B[:, :8], damping=damping)
    assert sum(kernels.launched) == 6


@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
def test_scaled_gram_solve_above_the_kernels_order_goes_to_the_library(
    kernels, monkeypatch, dtype, budget
):
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", budget)
    Z, D = lc.normal(9, 10, dtype=dtype), lc.relu_like(6, 9, dtype=dtype, seed=1)
    R, damping = lc.normal(6, 9, dtype=dtype, seed=2), lc.normal(6, dtype=dtype, seed=3).abs() + 1
    K = (Z @ Z.mT).tril() + torch.full((9, 9), torch.nan, dtype=dtype).triu(1)
    K[2] = torch.nan  # row 2 is active in system 1 alone
    D[:, 2], D[1, 2], D[3], D[5, 4] = 0, 1, 0, torch.nan
    R[3, 2] = damping[3] = torch.nan  # no active row: nothing to fail
    expected = linalg.scaled_gram_solve_ex(K, D, R, damping=damping)
    assert sum(kernels.launched) == 6
    monkeypatch.setattr(scaled_gram, "CUDA_KERNEL_SIDE", 8)
    X, info = linalg.scaled_gram_solve_ex(K, D, R, damping=damping)
    assert sum(kernels.launched) == 6
    assert (info != 0).tolist() == [False, True, False, False, False, True]
    torch.testing.assert_close(info, expected[1])
    torch.testing.assert_close(X, expected[0], equal_nan=True)
    assert (X[0] == 0)[D[0] == 0].all()


def test_empty_problems_launch_nothing(kernels):
    zero = torch.zeros(())
    for batch, n in ((0, 3), (2, 0), (0, 0)):
        X, info = spd._solve(torch.empty(batch, n, n), torch.empty(batch, n, 2), zero, True)
        assert (X.shape, info.tolist()) == ((batch, n, 2), [0] * batch)
        X, info = scaled_gram._solve(
            torch.eye(n), torch.empty(batch, n), torch.empty(batch, n), zero, False
        )
        assert (X.shape, info.tolist()) == ((batch, n), [0] * batch)
    assert kernels.launched == []


@pytest.mark.parametrize("lead", [(), (2,)])
def test_weighted_gram_launches(kernels, lead):
    Z, w = lc.normal(*lead, 6, 4), lc.relu_like(3, 6, seed=1)
    damping = torch.tensor([0.1, 0.2, 0.0]).double()
    expected = linalg.weighted_gram(Z, w, damping=damping)
    assert torch.equal(weighted_gram_on_cuda(Z, w, damping, True), expected)
    assert kernels.launched == [3] * (2 if lead else 1)
    by_columns = Z.mT.contiguous().mT
    assert torch.equal(weighted_gram_on_cuda(by_columns, w.expand(*lead, 3, 6), damping), expected)
    for batch, m, n in ((0, 3, 4), (2, 3, 0), (2, 0, 3)):
        G = weighted_gram_on_cuda(torch.empty(m, n), torch.empty(batch, m), torch.ones(()))
        assert torch.equal(G, torch.eye(n).expand(batch, n, n))


@pytest.mark.parametrize("shape", [(), (5,)])
def test_ridge_primal_launches(kernels, shape):
    Z, S, R = lc.normal(9, 4), lc.relu_like(5, 9, seed=1), lc.normal(5, 9, seed=2)
    damping = lc.normal(*shape, seed=3).abs() + 0.1
    d, info = _ridge_routes.primal_on_chip(Z, R, S, damping)
    assert kernels.launched == [5]
    torch.testing.assert_close(d, primal(Z, R, S, damping)[0])
    assert not info.any()


@pytest.mark.parametrize(
    ("n", "active", "damping", "route"),
    [
        (8, 20, 1.0, primal),  # by cost
        (30, 36, 10.0, dual),  # by cost
        (30, 36, 1e-4, primal),  # the dual form would be ill-conditioned
        (30, 25, 1e-4, dual),  # no more rows than columns
    ],
)
def test_the_choice_on_the_device_is_that_on_the_host(n, active, damping, route):
    """In float64, where the host has no route that the device lacks."""
    Z, S = lc.normal(40, n), lc.normal(200, 40, seed=1).abs() + 0.5
    S[lc.normal(200, 40, seed=2).argsort(-1) >= active] = 0
    for shift in (torch.tensor(damping).double(), torch.full((200,), damping).double()):
        assert choose_on_device(Z, S, shift) is route
        assert choose(Z, S, shift) is route


def test_generic_loop():
    """What CUDA does without a kernel of its own: plain torch code, so it runs here as well."""
    damping = torch.tensor([0.1, 0.2, 0.0]).double()
    A, B = lc.spd(3, 9), lc.normal(3, 9, 2, seed=1)
    by_loop = dense_cg._cuda(A, B, damping, 1e-10, 90)
    for mine, native in zip(by_loop, linalg.cg(A, B, damping=damping), strict=True):
        torch.testing.assert_close(mine, native, rtol=1e-7, atol=1e-9)


@needs_gpu
@pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 33, 65, 129])
def test_cuda_agrees_with_the_cpu(n, dtype):
    A, B = lc.spd(6, n, dtype=dtype), lc.normal(6, n, 2, dtype=dtype, seed=1)
    D, R = lc.relu_like(5, n, dtype=dtype), lc.normal(5, n, dtype=dtype, seed=2)
    calls = [
        lambda A, B, D, R: linalg.spd_solve(A, B, damping=0.1),
        lambda A, B, D, R: linalg.scaled_gram_solve(A[0], D, R, damping=0.5),
        lambda A, B, D, R: linalg.scaled_gram_solve(A[0], D, R, damping=0.0),
        lambda A, B, D, R: linalg.min_norm_solve(A, B),
        lambda A, B, D, R: linalg.weighted_gram(A[0], D, damping=0.5),
        lambda A, B, D, R: linalg.ridge(A[0], R, slopes=D, damping=0.5),
        lambda A, B, D, R: linalg.ridge(A[0], R, damping=0.5),
        lambda A, B, D, R: linalg.cg(A, B, damping=0.1).x,
        lambda A, B, D, R: linalg.scaled_gram_cg(A[0], D, R, damping=0.5).x,
    ]
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    for call in calls:
        on_gpu = call(*(value.cuda() for value in (A, B, D, R)))
        assert on_gpu.is_cuda
        torch.testing.assert_close(on_gpu.cpu(), call(A, B, D, R), rtol=tolerance, atol=tolerance)


@needs_gpu
def test_ex_forms_do_not_synchronise():
    A, B = lc.spd(6, 9).cuda(), lc.normal(6, 9, 2, seed=1).cuda()
    D = torch.ones(4, 9, dtype=A.dtype, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linalg.spd_solve_ex(A, B, damping=0.5)
        linalg.scaled_gram_solve_ex(A[0], D, D, damping=0.5)
        weighted_gram_unchecked(A[0], D)
        primal(A[0], D, D, torch.full((), 0.5, dtype=A.dtype, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_mixed_devices():
    A, B = lc.spd(3, 4), lc.normal(3, 4, 1)
    with pytest.raises(ValueError, match=r"B must be on the device of A \(cpu\), got cuda:0"):
        linalg.spd_solve(A, B.cuda())
    with pytest.raises(ValueError, match=r"B must be on the device of A \(cuda:0\), got cpu"):
        linalg.spd_solve(A.cuda(), B)
