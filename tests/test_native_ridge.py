"""The fused kernels of the family, ridge_dual and ridge_error, at every SIMD level."""

from __future__ import annotations

import math

import pytest
import torch
from native_calls import DTYPES, name, random_slopes, random_tensor
from torch import Tensor

from backmatch.linalg._library import native
from backmatch.linalg._normal import _composed
from backmatch.linalg._normal import ridge_error as worst_residual
from backmatch.linalg._ridge_choice import _counts, choose
from backmatch.linalg._ridge_routes import call_family, complement, dual, primal, shared

pytestmark = pytest.mark.usefixtures("two_threads")

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


def ridge_error(Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, d: Tensor):
    """The squared norms of every system, and the worst ratio that comes with them."""
    error, size = torch.full((2, len(R)), -1.0, dtype=torch.float64)
    tail = (d.data_ptr(), *d.stride(), error.data_ptr(), size.data_ptr(), 1)
    worst = call_family(native().ridge_error, Z, slopes, R, damping, *tail)
    ratio = (error / size.masked_fill(size == 0, 1)).max().sqrt()
    torch.testing.assert_close(worst, float(ratio))
    return error, size


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


def on_and_off(batch: int, m: int, share: float) -> Tensor:
    """0/1 slopes of any share of ones, all and none of them included."""
    mean = torch.linspace(-1, 1, batch) * 3 + 6 * (share - 0.5)
    return (random_tensor(batch, m, dtype=torch.float32) < mean.unsqueeze(1)).float()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("m", "n", "batch"), SHAPES)
def test_complement_is_the_dual(level: str, m: int, n: int, batch: int, share: float) -> None:
    Z, R, _, _ = family(m, n, batch, torch.float32)
    slopes, damping = on_and_off(batch, m, share), torch.tensor(0.5)
    d, info = complement(Z, R, slopes, damping)
    assert info.tolist() == [0] * batch
    want = least_squares(Z, R, slopes, damping.expand(batch))
    error = torch.linalg.vector_norm(d - want, dim=-1)
    size = torch.linalg.vector_norm(want, dim=-1)
    assert (error <= 2 * tolerance(torch.float32, m, n) * size).all()


def test_complement_leaves_other_slopes_and_bad_systems_to_the_dual(level: str) -> None:
    m, n, batch = 40, 21, 12
    Z, R, _, _ = family(m, n, batch, torch.float32)
    slopes, damping = on_and_off(batch, m, 0.8), torch.tensor(0.5)
    slopes[3] = 0.25 + slopes[3]
    slopes[5, 7], R[8, 2] = torch.nan, torch.nan
    slopes[8] = 1
    d, info = complement(Z, R, slopes, damping)
    plain, plain_info = dual(Z, R, slopes, damping)
    assert (info != 0).nonzero().flatten().tolist() == [5]
    assert torch.equal(info, plain_info)
    assert torch.equal(d[3], plain[3])
    assert d[[5, 8]].isnan().all()
    good = [j for j in range(batch) if j not in (5, 8)]
    close = 2 * tolerance(torch.float32, m, n)
    torch.testing.assert_close(d[good], plain[good], rtol=close, atol=close)


@pytest.mark.parametrize("route", [dual, complement, primal])
def test_rows_that_are_off_count_for_nothing(level: str, route) -> None:
    Z, R, _, _ = family(40, 21, 12, torch.float32)
    slopes, damping = on_and_off(12, 40, 0.8), torch.tensor(0.5)
    d, _ = route(Z, R, slopes, damping)
    holes = R.masked_fill(slopes == 0, torch.nan)
    spoiled, info = route(Z, holes, slopes, damping)
    assert info.tolist() == [0] * 12
    torch.testing.assert_close(spoiled, d)
    assert worst_residual(Z, holes, slopes, damping, d) < 1e-4


@pytest.mark.parametrize("threads", [1, 2])
def test_complement_bits_ignore_batch_and_threads(level: str, threads: int) -> None:
    Z, R, _, _ = family(130, 70, 40, torch.float32)
    slopes, damping = on_and_off(40, 130, 0.7), torch.tensor(2.0)
    d, _ = complement(Z, R, slopes, damping)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part in (slice(0, 1), slice(1, 23), slice(23, 40)):
            assert torch.equal(complement(Z, R[part], slopes[part], damping)[0], d[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", [1, 3])
def test_the_worst_ratio_is_taken_over_groups(level: str, group: int) -> None:
    Z, R, slopes, damping = family(9, 7, 12, torch.float64)
    d, _ = dual(Z, R, slopes, damping)
    d[4] *= 1.5
    R[9:], d[9:] = 0, 0
    d[10] = 1e-9
    error, size = _composed(Z, R, slopes, damping, d)
    error, size = (v.reshape(-1, group).sum(-1) for v in (error, size))
    want = (error / size.masked_fill(size == 0, 1)).max().sqrt()
    got = worst_residual(Z, R, slopes, damping, d, group)
    assert got == pytest.approx(float(want), rel=1e-9)
    d[2, 0] = torch.nan
    assert math.isnan(worst_residual(Z, R, slopes, damping, d, group))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_counts_of_slopes(level: str, dtype: torch.dtype) -> None:
    slopes = on_and_off(9, 33, 0.6).to(dtype)
    on = slopes.double().sum(1)
    least = torch.minimum(on, 33 - on)
    want = [float((a * a * (a / 6 + 2)).sum()) for a in (on, least)]
    for rows in (slopes, slopes.t().contiguous().t()):
        assert _counts(rows) == pytest.approx((float(on.sum()), *want, int(on.max()), True))
    slopes[2, 3] = -1
    assert _counts(slopes)[-1] is False


def test_each_route_is_chosen_where_it_is_cheapest() -> None:
    Z = random_tensor(128, 129, dtype=torch.float32)
    half, mostly = on_and_off(512, 128, 0.5), (random_tensor(512, 128, dtype=torch.float32) < 1.5)
    large = torch.tensor(1e3)
    assert choose(Z, mostly.float(), large) is complement
    assert choose(Z, mostly.float(), torch.tensor(1e-3)) is dual  # ill-conditioned
    assert choose(Z, mostly.float(), large.expand(512)) is dual  # a damping per system
    assert choose(Z.double(), mostly.double(), large.double()) is dual
    assert choose(Z, mostly * 0.5, large) is dual
    assert choose(Z[:, :8], half, large) is primal
    assert choose(Z[:3], mostly[:, :3].float(), large) is dual


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("m", "n", "batch"), SHAPES)
def test_ridge_shared_minimises(level: str, m: int, n: int, batch: int, dtype: torch.dtype) -> None:
    Z, R, _, _ = family(m, n, batch, dtype)
    damping = torch.tensor(0.5, dtype=dtype)
    d, info = shared(Z, R, damping)
    assert info.tolist() == [0] * batch
    want = least_squares(Z, R, torch.ones_like(R), damping.expand(batch))
    error = torch.linalg.vector_norm(d - want, dim=-1)
    size = torch.linalg.vector_norm(want, dim=-1)
    assert (error <= tolerance(dtype, m, n) * size).all()
    again, _ = shared(Z.t().contiguous().t(), R.t().contiguous().t(), damping)
    assert torch.equal(again, d)


@pytest.mark.parametrize(("m", "n"), [(40, 90), (90, 40)])
def test_ridge_shared_bits_and_failures(level: str, m: int, n: int) -> None:
    Z, R, _, _ = family(m, n, 35, torch.float32)
    damping = torch.tensor(0.5)
    d, _ = shared(Z, R, damping)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for part in (slice(0, 1), slice(1, 35)):
                assert torch.equal(shared(Z, R[part], damping)[0], d[part])
    finally:
        torch.set_num_threads(threads)
    R[3, 1] = torch.nan
    spoiled, info = shared(Z, R, damping)
    assert info.tolist() == [0] * 35
    assert spoiled[3].isnan().all()
    assert torch.equal(spoiled[4:], d[4:])
    Z[5, 5] = torch.nan
    spoiled, info = shared(Z, R, damping)
    assert (info > 0).all()
    assert spoiled.isnan().all()
