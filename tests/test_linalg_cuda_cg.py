"""Conjugate gradient on CUDA: the loop that never waits, and the calls of the kernels.

On a GPU against the CPU; without one the host side (looks, rounds, chunks of steps, pointers) with
kernels that hand over to the CPU's and events that arrive late.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from types import SimpleNamespace

import linalg_cases as lc
import numpy as np
import pytest
import torch

from backmatch import linalg
from backmatch.linalg import _cuda_cg, _library, dense_cg
from backmatch.linalg.krylov import conjugate_gradient

# The package's attribute of this name is the function.
family_cg = importlib.import_module("backmatch.linalg.scaled_gram_cg")

STREAM = 77
LARGEST = 40

dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(_library.native(), "cuda")),
    reason="no GPU, or a build without CUDA kernels",
)


class LateEvent:
    """Arrives at the query after ``late`` ones that were in vain."""

    late = 0

    def record(self, stream) -> None:
        assert stream.cuda_stream == STREAM
        self.left = self.late

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def array_at(address: int, shape, strides, dtype) -> np.ndarray:
    kind = np.dtype(dtype)
    reach = sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
    memory = (ctypes.c_char * (reach * kind.itemsize)).from_address(address)
    return np.ndarray(shape, kind, memory, strides=[step * kind.itemsize for step in strides])


def family_stand_in(calls: list):
    """Solves directly; notes the preconditioner, which would only change the course."""

    def call(dtype, batch, n, *arguments):
        *given, _rtol, _cap, X, iterations, residual, converged, stream = arguments
        assert stream == STREAM
        K = array_at(given[0], (n, n), given[1:3], dtype)
        D = array_at(given[3], (batch, n), given[4:6], dtype)
        R = array_at(given[6], (batch, n), given[7:9], dtype)
        damping = array_at(given[9], (batch,), given[10:11], dtype)
        factors = [array_at(f, (n, n), (n, 1), dtype).copy() if f else None for f in given[11:]]
        calls.append((batch, *factors))
        A = D[:, :, None] * K * D[:, None, :] + damping[:, None, None] * np.eye(n)
        x = D * np.linalg.solve(A, R[:, :, None])[:, :, 0]
        array_at(X, (batch, n), (n, 1), dtype)[...] = x
        array_at(iterations, (batch,), (1,), np.int64)[...] = 1
        array_at(residual, (batch,), (1,), dtype)[...] = 0
        array_at(converged, (batch,), (1,), np.bool_)[...] = True

    return call


@pytest.fixture
def device(monkeypatch):
    """A device that is the CPU: CPU tensors take the CUDA path."""
    native, calls = _library.native(), []

    def handed_over(kernel, tail):
        def call(*arguments):
            assert arguments[-1] == STREAM
            kernel(*arguments[:-tail])
            calls.append(kernel.__name__)

        return call

    fake = SimpleNamespace(
        cg=handed_over(native.cg, 1),
        cg_step=handed_over(native.cg_step, 2),
        cg_direction=handed_over(native.cg_direction, 2),
        scaled_gram_cg=family_stand_in(calls),
        cg_step_workspace=lambda dtype, systems, n: 48,
        cg_largest_order=lambda dtype: LARGEST,
        scaled_gram_cg_largest_order=lambda dtype: LARGEST,
        calls=calls,
    )
    for module in (_cuda_cg, dense_cg, family_cg):
        monkeypatch.setattr(module, "native_cuda", lambda: fake)
    monkeypatch.setattr(_cuda_cg, "on_cuda", lambda value: True)
    monkeypatch.setattr(_cuda_cg, "capturing", lambda value: False)
    monkeypatch.setattr(_cuda_cg, "pinned_flag", lambda: torch.empty((), dtype=torch.bool))
    monkeypatch.setattr(_cuda_cg, "new_event", LateEvent)
    monkeypatch.setattr(LateEvent, "late", 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    return fake


def systems(n: int, batch: int, k: int, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Condition numbers that grow along the batch, one matrix singular, one b = 0."""
    A = torch.stack([lc.spd(n, condition=10.0 ** (1 + i % 3), seed=i) for i in range(batch)])
    B = lc.normal(batch, n, k, seed=99)
    A[batch // 2], B[batch // 3] = 0, 0
    return A.to(dtype), B.to(dtype)


# ---- the loop without a GPU ---------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("late", [0, 1, 5])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 1), (33, 1), (16, 3)])
def test_loop_on_the_device_is_the_loop_on_the_cpu(
    device, monkeypatch, n, k, preconditioned, late, dtype
):
    monkeypatch.setattr(LateEvent, "late", late)
    A, B = systems(n, 9, k, dtype)
    diagonal = A.diagonal(dim1=1, dim2=2).unsqueeze(-1).clamp_min(1e-3)
    options = {
        "rtol": 1e-4 if dtype == torch.float32 else 1e-9,
        "max_steps": 7 * n,
        "preconditioner": (lambda R: R / diagonal) if preconditioned else None,
    }
    mine = conjugate_gradient(A.matmul, B, **options)
    assert set(device.calls) <= {"cg_step", "cg_direction"}
    monkeypatch.setattr(_cuda_cg, "on_cuda", lambda value: False)
    wanted = conjugate_gradient(A.matmul, B, **options)
    assert torch.equal(mine.converged, wanted.converged)
    assert (mine.iterations - wanted.iterations).abs().max() <= 2 + wanted.iterations.max() // 20
    good = mine.converged
    residual = torch.linalg.vector_norm(B - A @ mine.x, dim=-2)[good]
    size = torch.linalg.vector_norm(B, dim=-2)[good]
    assert (residual <= 1.5 * options["rtol"] * size).all()
    if k == 1:
        assert torch.equal(mine.x, wanted.x)  # the same kernels: steps too many change no bit
        assert torch.equal(mine.iterations, wanted.iterations)


def counted(A):
    def apply(P):
        apply.calls += 1
        return A @ P

    apply.calls = 0
    return apply


@pytest.mark.parametrize("late", [0, 3, 100])
def test_few_steps_are_enqueued_in_vain(device, monkeypatch, late):
    monkeypatch.setattr(LateEvent, "late", late)
    A, B = lc.spd(4, 30, condition=100.0), lc.normal(4, 30, 1, seed=1)
    apply = counted(A)
    result = conjugate_gradient(apply, B, rtol=1e-6, max_steps=10**6)
    assert result.converged.all()
    # One round, its residuals, and at most two looks in vain.
    most = int(result.iterations.max()) + 1 + _cuda_cg.LOOKS_AHEAD * _cuda_cg.STEPS_PER_LOOK
    assert apply.calls <= most
    assert device.calls.count("cg_step") == apply.calls - 1


def test_exact_step_counts_enqueue_exactly_those(device):
    A, B = lc.spd(4, 30, condition=1e4), lc.normal(4, 30, 1, seed=1)
    for steps in (1, 4, 7, 8, 21):
        apply = counted(A)
        result = conjugate_gradient(apply, B, rtol=0, max_steps=steps)
        assert (result.iterations == steps).all()
        assert apply.calls == steps + 1


def test_restarts_go_on_from_the_true_residual(device):
    """An operator that is wrong for 6 products: the recursion is misled, the outcome is not."""
    A, B = lc.spd(3, 12, condition=30.0), lc.normal(3, 12, 1, seed=1)
    calls = []

    def apply(P):
        calls.append(0)
        return A @ P * (1 + 1e-3 * (len(calls) < 6))

    result = conjugate_gradient(apply, B, rtol=1e-10, max_steps=200)
    assert result.converged.all()
    torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=1e-8, atol=1e-8)


def test_a_graph_holds_the_cap_and_one_restart(device, monkeypatch):
    monkeypatch.setattr(_cuda_cg, "capturing", lambda value: True)
    monkeypatch.setattr(_cuda_cg, "new_event", None)  # nothing may be looked at
    A, B = systems(20, 5, 1, torch.float64)
    for cap in (3, 40):
        apply = counted(A)
        result = conjugate_gradient(apply, B, rtol=1e-8, max_steps=cap)
        assert apply.calls == cap + 1 + min(cap, _cuda_cg.STEPS_OF_RESTART) + 1
        assert (result.iterations <= cap).all()
    monkeypatch.setattr(_cuda_cg, "on_cuda", lambda value: False)
    monkeypatch.setattr(_cuda_cg, "capturing", lambda value: False)
    wanted = conjugate_gradient(A.matmul, B, rtol=1e-8, max_steps=40)
    assert torch.equal(result.converged, wanted.converged)
    assert torch.equal(result.x, wanted.x)


@pytest.mark.parametrize("spoil", [lambda v: v.float(), lambda v: v[:, :5], lambda v: v.mT])
@pytest.mark.parametrize("who", ["operator A", "preconditioner"])
def test_a_callable_that_returns_another_kind_of_tensor_is_refused(device, who, spoil):
    B = lc.normal(4, 7, 2)
    apply = (lambda P: spoil(2 * P)) if who == "operator A" else (lambda P: 2 * P)
    other = (lambda R: spoil(0.7 * R)) if who == "preconditioner" else None
    with pytest.raises(TypeError, match=f"the {who} must return shape"):
        conjugate_gradient(apply, B, rtol=1e-3, max_steps=9, preconditioner=other)


def test_empty_batches_enqueue_nothing(device):
    for shape in ((0, 4, 1), (3, 4, 0), (3, 0, 2)):
        result = conjugate_gradient(lambda P: P, torch.empty(shape), rtol=0.1, max_steps=5)
        assert result.x.shape == shape
    assert device.calls == []


# ---- the calls of the kernels without a GPU -----------------------------------------------------


@pytest.mark.parametrize(("n", "kernel"), [(5, "cg"), (LARGEST, "cg"), (LARGEST + 1, "cg_step")])
def test_dense_cg_takes_its_kernel_up_to_a_limit(device, n, kernel):
    A, B = lc.spd(3, n), lc.normal(2, 3, n, 2, seed=1)
    x0 = lc.normal(n, 2, seed=2)
    result = linalg.CGResult(*dense_cg._cuda(A, B, torch.tensor(0.3).double(), 1e-10, 400, x0))
    assert set(device.calls) - {"cg_direction"} == {kernel}
    assert result.converged.all()
    exact = torch.linalg.solve(A + 0.3 * torch.eye(n).double(), B)
    torch.testing.assert_close(result.x, exact, rtol=1e-5, atol=1e-7)  # rtol times the condition
    with pytest.raises(ValueError, match="damping must be finite"):
        dense_cg._cuda(A, B, torch.tensor(-1.0).double(), 1e-10, 400)


@pytest.mark.parametrize("preconditioner", [None, "shared"])
@pytest.mark.parametrize(
    ("k", "d", "r", "lead"),
    [((), (), (), ()), ((), (3, 1), (4,), (3, 4)), ((2,), (4,), (2, 4), (2, 4))],
)
def test_scaled_gram_cg_calls(device, k, d, r, lead, preconditioner):
    Z = lc.normal(*k, 5, 7)
    K, D, R = Z @ Z.mT, lc.normal(*d, 5, seed=1), lc.normal(*r, 5, seed=2)
    damping = torch.tensor(1.0).double()
    K = K.mT.contiguous().mT  # columns first
    result = linalg.scaled_gram_cg(K, D, R, damping=damping, preconditioner=preconditioner)
    assert result.iterations.shape == result.converged.shape == lead
    exact = linalg.scaled_gram_solve(K, D, R, damping=damping)
    torch.testing.assert_close(result.x, exact, rtol=1e-7, atol=1e-8)
    assert len(device.calls) == (2 if k else 1)
    for i, (_, upper, lower) in enumerate(device.calls):
        if preconditioner is None:
            assert upper is lower is None
            continue
        scale = D.expand(*lead, 5)[i if k else ...].square().reshape(-1, 5).mean(0).sqrt()
        A = scale[:, None] * K[i if k else ...] * scale + torch.eye(5).double()
        np.testing.assert_allclose(upper, lower.T)
        np.testing.assert_allclose(lower.T @ lower, torch.linalg.inv(A), rtol=1e-8, atol=1e-10)


def test_scaled_gram_cg_by_the_loop_where_it_has_no_kernel(device):
    for n, preconditioner in ((LARGEST + 1, "shared"), (6, lambda V: 0.5 * V)):
        Z, D = lc.normal(n, n), lc.relu_like(4, n, seed=1)
        K, R = Z @ Z.mT / n, lc.normal(4, n, seed=2)
        result = linalg.scaled_gram_cg(K, D, R, damping=0.5, preconditioner=preconditioner)
        assert set(device.calls) == {"cg_step", "cg_direction"}
        exact = linalg.scaled_gram_solve(K, D, R, damping=0.5)
        torch.testing.assert_close(result.x, exact, rtol=1e-7, atol=1e-8)


# ---- a GPU --------------------------------------------------------------------------------------


@needs_gpu
@dtypes
@pytest.mark.parametrize("n", [1, 5, 31, 33, 64, 65, 129, 200, 257, 512, 600])
def test_cg_on_the_gpu(n, dtype):
    A, B = systems(n, 9, 3, dtype)
    options = {"damping": 0.5, "rtol": 1e-4 if dtype == torch.float32 else 1e-9}
    for columns in (1, 3):
        cpu = linalg.cg(A, B[..., :columns], **options)
        mine = linalg.cg(A.cuda(), B[..., :columns].cuda(), **options)
        assert torch.equal(mine.converged.cpu(), cpu.converged)
        difference = (mine.iterations.cpu() - cpu.iterations).abs()
        assert (difference <= 2 + cpu.iterations // 20).all()
        close = 20 * options["rtol"]
        torch.testing.assert_close(
            mine.x.cpu(), cpu.x, rtol=close, atol=close * float(cpu.x.abs().max())
        )
        again = linalg.cg(A.cuda(), B[..., :columns].cuda(), **options)
        assert all(torch.equal(x, y) for x, y in zip(again, mine, strict=True))
        alone = linalg.cg(A[2:3].cuda(), B[2:3, :, :1].cuda(), **options)
        assert torch.equal(alone.x, mine.x[2:3, :, :1]) or n > 512


@needs_gpu
@dtypes
@pytest.mark.parametrize("preconditioner", [None, "shared"])
@pytest.mark.parametrize("n", [1, 5, 31, 33, 64, 65, 129, 200, 256, 257, 512, 600])
@pytest.mark.parametrize("batch", [1, 30, 1200])
def test_scaled_gram_cg_on_the_gpu(n, batch, preconditioner, dtype):
    Z = lc.normal(n, n + 4, dtype=dtype)
    K, D = Z @ Z.mT / n, lc.relu_like(batch, n, dtype=dtype, seed=1)
    R, damping = lc.normal(batch, n, dtype=dtype, seed=2), torch.linspace(0.5, 3, batch).to(dtype)
    options = {"rtol": 1e-4 if dtype == torch.float32 else 1e-9, "preconditioner": preconditioner}
    cpu = linalg.scaled_gram_cg(K, D, R, damping=damping, **options)
    gpu = [value.cuda() for value in (K, D, R)]
    mine = linalg.scaled_gram_cg(*gpu, damping=damping.cuda(), **options)
    assert mine.converged.all()
    difference = (mine.iterations.cpu() - cpu.iterations).abs()
    assert (difference <= 2 + cpu.iterations // 20).all()
    close = 20 * options["rtol"]
    torch.testing.assert_close(
        mine.x.cpu(), cpu.x, rtol=close, atol=close * float(cpu.x.abs().max())
    )
    again = linalg.scaled_gram_cg(*gpu, damping=damping.cuda(), **options)
    assert all(torch.equal(x, y) for x, y in zip(again, mine, strict=True))


@contextlib.contextmanager
def synchronisation_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("n", [40, 20_000])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_loop_does_not_synchronise(preconditioned, k, n):
    scale = torch.logspace(0, 2, n, dtype=torch.float64).view(n, 1)
    B = lc.normal(6, n, k)
    options = {"rtol": 1e-9, "max_steps": 300}
    inner = (lambda R: R / 2) if preconditioned else None
    cpu = conjugate_gradient(lambda P: scale * P, B, preconditioner=inner, **options)
    on_device, B = scale.cuda(), B.cuda()

    def run():
        return conjugate_gradient(lambda P: on_device * P, B, preconditioner=inner, **options)

    run()  # whatever initialises itself on first use
    with synchronisation_is_an_error():
        mine = run()
    assert torch.equal(mine.converged.cpu(), cpu.converged)
    assert (mine.iterations.cpu() - cpu.iterations).abs().max() <= 2
    torch.testing.assert_close(mine.x.cpu(), cpu.x, rtol=1e-6, atol=1e-8)


@needs_gpu
def test_the_loop_in_a_graph():
    """Captured once, replayed on other right-hand sides."""
    scale = torch.logspace(0, 1, 50, dtype=torch.float64, device="cuda").view(50, 1)
    B = lc.normal(6, 50, 1).cuda()

    def run():
        return conjugate_gradient(lambda P: scale * P, B, rtol=1e-8, max_steps=60)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        B.copy_(lc.normal(6, 50, 1, seed=seed))
        graph.replay()
        wanted = run()
        for mine, other in zip(captured, wanted, strict=True):
            assert torch.equal(mine, other)
        assert wanted.converged.all()
