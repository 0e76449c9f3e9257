"""The fused inner loop of conjugate gradient against the plain one, and who leaves when."""

from __future__ import annotations

import linalg_cases as lc
import pytest
import torch
from torch import Tensor

from backmatch import linalg
from backmatch.linalg import krylov
from backmatch.linalg._normal import cholesky_inverse, ridge_normal
from backmatch.linalg.krylov import conjugate_gradient

pytestmark = pytest.mark.usefixtures("two_threads")

dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
SIZES = [1, 3, 16, 33, 130]


def systems(n: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices whose condition numbers grow along the batch, one of them singular, one b = 0."""
    A = torch.stack([lc.spd(n, condition=10.0 ** (1 + i % 3), seed=i) for i in range(batch)])
    B = lc.normal(batch, n, 1, seed=99)
    A[batch // 2], B[batch // 3] = 0, 0
    return A.to(dtype), B.to(dtype)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the loop of torch operations for systems of one column as well."""

    class Plain:
        def __init__(self, *arguments) -> None:
            self.arguments = arguments[:-1]

        def __call__(self) -> None:
            krylov._plain_run(*self.arguments)

    monkeypatch.setattr(krylov, "FusedRun", Plain)


@dtypes
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_fused_is_plain(n, preconditioned, dtype, monkeypatch):
    A, B = systems(n, 20, dtype)
    diagonal = A.diagonal(dim1=1, dim2=2).unsqueeze(-1).clamp_min(1e-3)
    options = {
        "rtol": 1e-4 if dtype == torch.float32 else 1e-9,
        "max_steps": 7 * n,
        "preconditioner": (lambda R: R / diagonal) if preconditioned else None,
    }
    fused = conjugate_gradient(A.matmul, B, **options)
    plain(monkeypatch)
    wanted = conjugate_gradient(A.matmul, B, **options)
    assert torch.equal(fused.converged, wanted.converged)
    assert fused.converged.sum() == 19  # all but the singular one
    # Past n steps it is rounding that decides, and the product's depends on the threads.
    assert (fused.iterations - wanted.iterations).abs().max() <= 2 + wanted.iterations.max() // 8
    good = fused.converged[:, 0]
    residual = torch.linalg.vector_norm(B - A @ fused.x, dim=-2)[good]
    size = torch.linalg.vector_norm(B, dim=-2)[good]
    assert (residual <= 1.5 * options["rtol"] * size).all()
    assert torch.equal(fused.x[10], torch.zeros_like(fused.x[10]))


@dtypes
@pytest.mark.parametrize("choice", [None, "jacobi"])
def test_finished_systems_leave_the_products(choice, dtype):
    """The rows that the operator sees shrink, and the answers are those without restriction."""
    A, B = systems(24, 64, dtype)
    seen = []

    def among(index):
        part = A if index is None else A[index]
        inverse = part.diagonal(dim1=1, dim2=2).unsqueeze(-1).clamp_min(1e-3).reciprocal()

        def apply(P):
            assert P.shape == (len(part), 24, 1)
            seen.append(len(part))
            return part @ P

        return apply, None if choice is None else inverse.mul

    apply, preconditioner = among(None)
    options = {"rtol": 1e-5, "max_steps": 200, "preconditioner": preconditioner}
    narrowed = conjugate_gradient(apply, B, restrict=among, **options)
    assert min(seen) <= 32
    assert seen[-1] == 64  # the residuals are recomputed for all
    whole = conjugate_gradient(apply, B, **options)
    assert torch.equal(narrowed.converged, whole.converged)
    torch.testing.assert_close(narrowed.iterations, whole.iterations, rtol=0, atol=3)
    torch.testing.assert_close(narrowed.x, whole.x, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("spoil", [lambda v: v.double(), lambda v: v[:, :5], lambda v: v.mT])
@pytest.mark.parametrize("who", ["operator A", "preconditioner"])
def test_a_callable_that_returns_another_kind_of_tensor_is_refused(who, spoil):
    """The native step writes through addresses: nothing may reach it unchecked."""
    B = lc.normal(40, 64, 1, dtype=torch.float32)
    apply = (lambda P: spoil(2 * P)) if who == "operator A" else (lambda P: 2 * P)
    other = (lambda R: spoil(0.7 * R)) if who == "preconditioner" else None
    with pytest.raises(TypeError, match=f"the {who} must return shape"):
        conjugate_gradient(apply, B, rtol=1e-3, max_steps=9, preconditioner=other)


@dtypes
def test_exact_step_counts_survive_the_narrowing(dtype):
    A, B = systems(30, 40, dtype)
    result = conjugate_gradient(
        A.matmul, B, rtol=0, max_steps=4, restrict=lambda index: (A[index].matmul, None)
    )
    expected = torch.full((40, 1), 4)
    expected[40 // 2], expected[40 // 3] = 0, 0
    assert torch.equal(result.iterations, expected)


@dtypes
@pytest.mark.parametrize(("n", "batch"), [(1, 1), (5, 40), (40, 33), (130, 70)])
@pytest.mark.parametrize("preconditioner", [None, "shared"])
def test_scaled_gram_cg_is_the_direct_solve(preconditioner, n, batch, dtype):
    Z = lc.normal(n, n + 3, dtype=dtype)
    D, R = lc.relu_like(batch, n, dtype=dtype), lc.normal(batch, n, dtype=dtype, seed=2)
    damping = torch.logspace(-2, 1, batch, dtype=dtype) * n
    result = linalg.scaled_gram_cg(
        Z @ Z.mT, D.t().contiguous().t(), R, damping=damping, preconditioner=preconditioner
    )
    assert result.converged.all()
    wanted = linalg.scaled_gram_solve(Z @ Z.mT, D, R, damping=damping)
    close = 1e-2 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(result.x, wanted, rtol=close, atol=close * float(wanted.abs().max()))


@dtypes
@pytest.mark.parametrize(("m", "n", "batch"), [(1, 1, 1), (7, 40, 33), (65, 33, 70)])
def test_ridge_normal_is_two_products(m, n, batch, dtype):
    Z, w = lc.normal(m, n, dtype=dtype), lc.normal(batch, m, dtype=dtype, seed=1)
    step = lc.normal(n, batch, dtype=dtype, seed=2).t()
    wanted = ((step.double() @ Z.double().mT) * w.double()) @ Z.double()
    mine = ridge_normal(Z, w, step)
    size = float(wanted.abs().max())
    torch.testing.assert_close(
        mine.double(), wanted, rtol=0, atol=1e2 * torch.finfo(dtype).eps * size
    )
    scalar = ridge_normal(Z.mT.contiguous().mT, w[:1, :1].expand(batch, m), step)
    torch.testing.assert_close(scalar, (step @ Z.mT * w[0, 0]) @ Z, rtol=1e-4, atol=1e-4 * size)


@dtypes
def test_cholesky_inverse_solves(dtype):
    A, rows = lc.spd(33, dtype=dtype), lc.normal(5, 33, dtype=dtype, seed=1)
    mine = cholesky_inverse(torch.linalg.cholesky(A))(rows)
    wanted = torch.linalg.solve(A, rows.mT).mT
    close = 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine, wanted, rtol=close, atol=close * float(wanted.abs().max()))
