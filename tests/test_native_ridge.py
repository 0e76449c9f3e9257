"""The fused kernels of the family, ridge_dual and ridge_error, at every SIMD level."""

from __future__ import annotations

import pytest
import torch
from native_calls import DTYPES, name, random_slopes, random_tensor
from torch import Tensor

from backmatch.linalg._normal import _composed, ridge_error
from backmatch.linalg._ridge_routes import dual

# (m, n, batch): panels and row tiles cut everywhere, none cut, more tasks than threads.
SHAPES = [
    (1, 1, 1),
    (3, 2, 5),
    (7, 40, 33),
    (33, 31, 17),
    (32, 64, 16),
    (65, 129, 70),
    (130, 20, 9),
]


def family(m: int, n: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Z, R, slopes (half of them 0) and one damping per system."""
    Z, R = random_tensor(m, n, dtype=dtype), random_tensor(batch, m, dtype=dtype)
    return Z, R, random_slopes(batch, m, dtype), random_tensor(batch, dtype=dtype).abs() + 0.5


def least_squares(Z: Tensor, R: Tensor, slopes: Tensor, damping: Tensor) -> Tensor:
    """The augmented systems [S Z; sqrt(damping) I] d = [R; 0], in float64."""
    J = slopes.double().unsqueeze(-1) * Z.double()
    n = Z.shape[1]
    rest = damping.double().sqrt()[:, None, None] * torch.eye(n, dtype=torch.float64)
    rhs = torch.cat([R.double(), torch.zeros(len(R), n, dtype=torch.float64)], 1)
    return torch.linalg.lstsq(torch.cat([J, rest], 1), rhs.unsqueeze(-1)).solution.squeeze(-1)


def tolerance(dtype: torch.dtype, m: int, n: int) -> float:
    """The condition number is at most 1 + |Z|^2 / 0.5, and |Z|^2 about (sqrt m + sqrt n)^2."""
    return 4 * torch.finfo(dtype).eps * (1 + 2 * (m**0.5 + n**0.5) ** 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("m", "n", "batch"), SHAPES)
def test_ridge_dual_minimises(level: str, m: int, n: int, batch: int, dtype: torch.dtype) -> None:
    Z, R, slopes, damping = family(m, n, batch, dtype)
    d, info = dual(Z, R, slopes, damping)
    assert info.tolist() == [0] * batch
    want = least_squares(Z, R, slopes, damping)
    error = torch.linalg.vector_norm(d - want, dim=-1)
    size = torch.linalg.vector_norm(want, dim=-1).clamp_min(1e-300)
    assert (error <= tolerance(dtype, m, n) * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("sloped", [True, False])
@pytest.mark.parametrize(("m", "n", "batch"), SHAPES)
def test_ridge_error_measures(
    level: str, sloped: bool, m: int, n: int, batch: int, dtype: torch.dtype
) -> None:
    """Of any d, solution or not, in float64 by plain products."""
    Z, R, slopes, damping = family(m, n, batch, dtype)
    weights = slopes if sloped else None
    d = random_tensor(batch, n, dtype=dtype)
    measured = ridge_error(Z, R, weights, damping, d)
    exact = _composed(
        Z.double(), R.double(), None if weights is None else weights.double(), damping.double(),
        d.double(),
    )  # fmt: skip
    close = 100 * torch.finfo(dtype).eps * (m + n)
    for mine, want in zip(measured, exact, strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, want, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_any_strides_give_equal_bits(level: str, dtype: torch.dtype) -> None:
    Z, R, slopes, damping = family(33, 40, 21, dtype)
    d, _ = dual(Z, R, slopes, damping)
    measured = ridge_error(Z, R, slopes, damping, d)
    wide = Z.new_zeros(66, 120)[::2, ::3]
    wide.copy_(Z)
    columns = R.t().contiguous().t(), slopes.t().contiguous().t()
    for matrix in (wide, Z.t().contiguous().t()):
        again, _ = dual(matrix, *columns, damping)
        assert torch.equal(again, d)
        for mine, want in zip(
            ridge_error(matrix, *columns, damping, d.t().contiguous().t()), measured, strict=True
        ):
            assert torch.equal(mine, want)
    one = damping[:1].expand(21)
    assert torch.equal(dual(Z, R, slopes, one)[0], dual(Z, R, slopes, damping[0])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_ignore_batch_and_threads(level: str, threads: int, dtype: torch.dtype) -> None:
    Z, R, slopes, damping = family(70, 90, 75, dtype)
    d, _ = dual(Z, R, slopes, damping)
    error, size = ridge_error(Z, R, slopes, damping, d)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part in (slice(0, 1), slice(1, 40), slice(40, 75)):
            arguments = Z, R[part], slopes[part], damping[part]
            assert torch.equal(dual(*arguments)[0], d[part])
            again = ridge_error(*arguments, d[part])
            assert torch.equal(again[0], error[part])
            assert torch.equal(again[1], size[part])
    finally:
        torch.set_num_threads(before)


def test_a_failed_system_is_nan_and_leaves_its_neighbours(level: str) -> None:
    Z, R, slopes, damping = family(9, 6, 5, torch.float64)
    clean, _ = dual(Z, R, slopes, damping)
    slopes[2, 4] = torch.nan
    d, info = dual(Z, R, slopes, damping)
    assert (info != 0).tolist() == [False, False, True, False, False]
    assert d[2].isnan().all()
    kept = [0, 1, 3, 4]
    assert torch.equal(d[kept], clean[kept])


def test_large_numbers_do_not_overflow_the_check(level: str) -> None:
    Z, R, slopes, damping = (value * 1e18 for value in family(4, 3, 2, torch.float32))
    slopes = torch.ones_like(slopes)
    error, size = ridge_error(Z, R, slopes, damping, torch.zeros(2, 3))
    assert error.isfinite().all()
    torch.testing.assert_close(error, size)
    assert (size > 3.5e38).any()
