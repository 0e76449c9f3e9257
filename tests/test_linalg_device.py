"""The operators on a GPU, as far as that can be seen without one.

Tensors only say that they are on a GPU (tests/pretend_device.py): the branches that a device
chooses are executed, nothing may mix devices, the host must not wait where that is promised, and
the answers are those of the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import linalg_cases as lc
import pytest
import torch
from pretend_device import PretendCuda, pretend, pretends
from torch import Tensor
from torch.utils._pytree import tree_leaves

from backmatch import errors, linalg
from backmatch.linalg import _library
from backmatch.linalg._ridge_routes import primal
from backmatch.linalg.krylov import conjugate_gradient
from backmatch.linalg.weighted_gram import weighted_gram_unchecked

# The package's attribute of this name is the function, for some.
dense_cg, min_norm, ridge, scaled_gram, spd = (
    importlib.import_module(f"backmatch.linalg.{name}")
    for name in ("dense_cg", "min_norm", "ridge", "scaled_gram", "spd")
)

BATCH, ROWS, COLUMNS = 5, 8, 3


@pytest.fixture
def device(pretend_cuda, monkeypatch):
    """torch's dispatcher does not see what tensors only say: it is passed by."""
    monkeypatch.setattr(ridge, "_op", ridge._checked)
    monkeypatch.setattr(min_norm, "_op", min_norm._solve)
    by_device = lambda A, B, *rest: (dense_cg._cuda if B.is_cuda else dense_cg._cpu)(A, B, *rest)  # noqa: E731
    monkeypatch.setattr(dense_cg, "_op", by_device)
    return pretend_cuda


class Problem:
    """Arguments of every public function, for one order."""

    def __init__(self, n: int, k: int = COLUMNS, batch: int = BATCH, rows: int = ROWS) -> None:
        self.A, self.B = lc.spd(batch, n), lc.normal(batch, n, k, seed=1)
        self.K = lc.spd(n)
        self.D, self.R = lc.relu_like(batch, n, seed=2), lc.normal(batch, n, seed=3)
        self.Z, self.S = lc.normal(rows, n, seed=4), lc.relu_like(batch, rows, seed=5)
        self.T = lc.normal(batch, rows, seed=6)
        self.mu = lc.normal(batch, seed=7).abs() + 0.1


def per_family(p: Problem) -> tuple[Tensor, ...]:
    """K, D, R, Z, S, T and mu for two matrices; D and S are the same for both."""
    K, Z = torch.stack([p.K, 2 * p.K]), torch.stack([p.Z, -p.Z])
    return K, p.D, torch.stack([p.R, p.R + 1]), Z, p.S, torch.stack([p.T, p.T - 1]), p.mu


CALLS: dict[str, Callable[[Problem], object]] = {
    "spd_solve": lambda p: linalg.spd_solve(p.A, p.B, damping=0.3),
    "spd_solve, dampings": lambda p: linalg.spd_solve_ex(p.A, p.B, damping=p.mu),
    "spd_solve, leading dimensions": lambda p: linalg.spd_solve(
        p.A.unsqueeze(1), p.B, damping=p.mu
    ),
    "spd_solve, one matrix": lambda p: linalg.spd_solve(p.A[0], p.B),
    "spd_solve, expanded": lambda p: linalg.spd_solve(
        p.A[:1].expand(p.A.shape), p.B.mT.contiguous().mT
    ),
    "scaled_gram_solve": lambda p: linalg.scaled_gram_solve(p.K, p.D, p.R, damping=p.mu),
    "scaled_gram_solve, one system": lambda p: linalg.scaled_gram_solve_ex(
        p.K, p.D[:1].expand(p.D.shape), p.R, damping=0.3
    ),
    "scaled_gram_solve, no damping": lambda p: linalg.scaled_gram_solve(
        p.K, p.D, p.R, damping=p.mu * (torch.arange(len(p.mu), device=p.mu.device) % 2)
    ),
    "scaled_gram_solve, families": lambda p: linalg.scaled_gram_solve(
        *per_family(p)[:3], damping=p.mu
    ),
    "weighted_gram": lambda p: linalg.weighted_gram(p.Z, p.S, damping=p.mu),
    "weighted_gram, by columns": lambda p: linalg.weighted_gram(p.Z.mT.contiguous().mT, p.S),
    "weighted_gram, families": lambda p: linalg.weighted_gram(*per_family(p)[3:5], damping=0.5),
    "ridge": lambda p: linalg.ridge(p.Z, p.T, damping=0.3),
    "ridge, dampings": lambda p: linalg.ridge(p.Z, p.T, damping=p.mu),
    "ridge, slopes": lambda p: linalg.ridge(p.Z, p.T, slopes=p.S, damping=0.3),
    "ridge, all active": lambda p: linalg.ridge(p.Z, p.T, slopes=p.S + 1, damping=1e-4),
    "ridge, no damping": lambda p: linalg.ridge(p.Z, p.T, slopes=p.S, damping=0.0),
    "ridge, some damping": lambda p: linalg.ridge(
        p.Z, p.T, slopes=p.S, damping=p.mu * (torch.arange(len(p.mu), device=p.mu.device) % 2)
    ),
    "ridge, families": lambda p: linalg.ridge(
        per_family(p)[3], per_family(p)[5], slopes=p.S, damping=p.mu
    ),
    "min_norm_solve": lambda p: linalg.min_norm_solve(p.A, p.B),
    "min_norm_solve, one matrix": lambda p: linalg.min_norm_solve(p.A[0], p.B),
    "cg": lambda p: linalg.cg(p.A, p.B, damping=p.mu).x,
    "cg, started": lambda p: linalg.cg(p.A, p.B, x0=p.B[0]).x,
    "cg, callable": lambda p: linalg.cg(lambda P: p.A @ P, p.B, damping=0.5).x,
    "cg, preconditioned": lambda p: linalg.cg(p.A, p.B, preconditioner=lambda V: V / 2).x,
    "scaled_gram_cg": lambda p: linalg.scaled_gram_cg(p.K, p.D, p.R, damping=p.mu).x,
    "scaled_gram_cg, shared": lambda p: (
        linalg.scaled_gram_cg(p.K, p.D, p.R, damping=0.5, preconditioner="shared").x
    ),
    "scaled_gram_cg, families": lambda p: (
        linalg.scaled_gram_cg(*per_family(p)[:3], damping=0.5, preconditioner="shared").x
    ),
}

SHAPES = {
    "square": {"n": 8},
    "tall": {"n": 5},  # no kernel for the primal form: it is odd
    "wide": {"n": 12},
    "above the kernels": {"n": 10},
    "order 0": {"n": 0},
    "no columns": {"n": 4, "k": 0},
    "no systems": {"n": 4, "batch": 0},
    "no rows": {"n": 4, "rows": 0},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_answer_on_a_gpu_is_that_of_the_cpu(device, monkeypatch, call, shape):
    if shape == "above the kernels":
        for module in (spd, scaled_gram):
            monkeypatch.setattr(module, "CUDA_KERNEL_SIDE", 9)
    if shape == "no systems" and call in ("spd_solve, one matrix", "min_norm_solve, one matrix"):
        pytest.skip("no matrix to take")
    if shape == "no systems" and call == "cg, started":
        pytest.skip("no start to take")
    expected = tree_leaves(CALLS[call](Problem(**SHAPES[shape])))
    problem = Problem(**SHAPES[shape])
    pretend(*vars(problem).values())
    with PretendCuda():
        got = tree_leaves(CALLS[call](problem))
        assert all(value.is_cuda for value in got)
    for left, right in zip(got, expected, strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-8)


def test_all_kernels_are_reached(device):
    for n in (5, 8, 128):  # the last one is above the order of the stand-in for cg
        problem = Problem(n, rows=n + 4)
        pretend(*vars(problem).values())
        with PretendCuda():
            for call in CALLS.values():
                call(problem)
    kernels = {"spd_solve", "scaled_gram_solve", "weighted_gram", "ridge_primal"}
    assert set(device) == kernels | {"cg", "cg_step", "cg_direction"}


NEVER_WAIT: dict[str, Callable[[Problem], object]] = {
    "spd_solve_ex": lambda p: linalg.spd_solve_ex(p.A, p.B, damping=0.3),
    "spd_solve_ex, dampings": lambda p: linalg.spd_solve_ex(p.A, p.B, damping=p.mu),
    "spd_solve_ex, one matrix": lambda p: linalg.spd_solve_ex(p.A[0], p.B),
    "scaled_gram_solve_ex": lambda p: linalg.scaled_gram_solve_ex(p.K, p.D, p.R, damping=0.3),
    "scaled_gram_solve_ex, families": lambda p: linalg.scaled_gram_solve_ex(
        *per_family(p)[:3], damping=p.mu
    ),
    "weighted_gram_unchecked": lambda p: weighted_gram_unchecked(p.Z, p.S),
    "primal": lambda p: primal(p.Z, p.T, p.S, p.mu),
    "loop": lambda p: conjugate_gradient(lambda P: p.A @ P, p.B, rtol=1e-9, max_steps=40).x,
    "loop, preconditioned": lambda p: (
        conjugate_gradient(
            lambda P: p.A @ P, p.B, rtol=1e-9, max_steps=40, preconditioner=lambda V: V / 2
        ).x
    ),
}


@pytest.mark.parametrize("n", [5, 8, 10])
@pytest.mark.parametrize("call", NEVER_WAIT)
def test_the_host_does_not_wait(device, monkeypatch, call, n):
    for module in (spd, scaled_gram):
        monkeypatch.setattr(module, "CUDA_KERNEL_SIDE", 9)
    problem = Problem(n)
    pretend(*vars(problem).values())
    with PretendCuda(may_wait=False):
        got = tree_leaves(NEVER_WAIT[call](problem))
        assert all(value.is_cuda for value in got)


def test_what_waits_is_noticed():
    value = torch.ones(3)
    pretend(value)
    with PretendCuda(may_wait=False):
        for wait in (
            lambda: value.sum().item(),
            lambda: bool(value.any()),
            lambda: value.tolist(),
            lambda: value.nonzero(),
            lambda: value.cpu(),
            lambda: value[value > 0],
            lambda: torch.where(value > 0),
            lambda: torch.tensor(1.0, device="cuda"),
        ):
            with pytest.raises(RuntimeError, match=r"waits for the device|unpinned"):
                wait()
        assert pretends(torch.where(value > 0, value, 0.0))


def test_a_build_without_kernels_says_so(device, monkeypatch):
    monkeypatch.delattr(_library._extension, "cuda")
    p = Problem(6)
    pretend(*vars(p).values())
    calls = (
        "spd_solve",
        "scaled_gram_solve",
        "weighted_gram",
        "ridge, slopes",
        "cg",
        "cg, callable",
        "scaled_gram_cg",
    )
    with PretendCuda():
        for call in calls:
            with pytest.raises(errors.MissingExtensionError, match="no CUDA kernels"):
                CALLS[call](p)
