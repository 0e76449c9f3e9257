"""1, 2 and 8 threads give equal bits from every CPU kernel, at every SIMD level."""

from __future__ import annotations

from collections.abc import Callable

import native_calls as nc
import pytest
import torch
from native_calls import DTYPES, name, random_slopes, random_spd, random_tensor
from torch import Tensor

from backmatch import _C
from backmatch.linalg._library import native
from backmatch.linalg._ridge_routes import call_family, complement, dual, shared

BATCH, M, N = 67, 70, 49


def family(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Z, R = random_tensor(M, N, dtype=dtype), random_tensor(BATCH, M, dtype=dtype)
    return Z, R, random_slopes(BATCH, M, dtype), random_tensor(BATCH, dtype=dtype).abs() + 0.5


def gram(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K = random_spd(1, N, dtype)[0]
    R = random_tensor(BATCH, N, dtype=dtype)
    return K, random_slopes(BATCH, N, dtype), R, torch.full((1,), 0.5, dtype=dtype)


def binary(dtype: torch.dtype) -> tuple[Tensor, ...]:
    Z, R, slopes, _ = family(dtype)
    return complement(Z, R, (slopes != 0).to(dtype), torch.tensor(0.5, dtype=dtype))


def errors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    Z, R, slopes, damping = family(dtype)
    d = random_tensor(BATCH, N, dtype=dtype, seed=5)
    error, size = torch.zeros(2, BATCH, dtype=torch.float64)
    tail = (d.data_ptr(), *d.stride(), error.data_ptr(), size.data_ptr(), 1)
    call_family(native().ridge_error, Z, slopes, R, damping, *tail)
    return error, size


def normal(dtype: torch.dtype) -> tuple[Tensor, ...]:
    Z, _, slopes, _ = family(dtype)
    P = random_tensor(BATCH, N, dtype=dtype, seed=6)
    Q = torch.zeros_like(P)
    views = (Z.data_ptr(), *Z.stride(), slopes.data_ptr(), *slopes.stride())
    _C.ridge_normal(name(dtype), BATCH, M, N, *views, P.data_ptr(), Q.data_ptr())
    return (Q,)


def product(dtype: torch.dtype) -> tuple[Tensor, ...]:
    K, D, P, damping = gram(dtype)
    Q = torch.zeros_like(P)
    views = (K.data_ptr(), *K.stride(), D.data_ptr(), *D.stride(), damping.data_ptr(), 0)
    _C.scaled_gram_product(name(dtype), BATCH, N, *views, P.data_ptr(), Q.data_ptr())
    return (Q,)


def steps(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """cg_step, then cg_direction; long vectors, so that several threads have something to do."""
    systems, n = 24, 6001
    P, Q, X, R = (random_tensor(systems, n, dtype=dtype, seed=i) for i in range(4))
    Q = P + 0.1 * Q
    rho, target = R.square().sum(1), torch.zeros(systems, dtype=dtype)
    running, alive = torch.ones(2, systems, dtype=torch.uint8)
    count = torch.zeros(systems, dtype=torch.int64)
    vectors = [v.data_ptr() for v in (P, Q, X, R, rho, target, running, alive, count)]
    _C.cg_step(name(dtype), systems, n, 5, True, *vectors)
    tail = [v.data_ptr() for v in (R, Q, P, rho, running)]
    _C.cg_direction(name(dtype), systems, n, *tail)
    return P, X, R, rho, count


def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
    A, B = random_spd(BATCH, N, dtype), random_tensor(BATCH, N, 3, dtype=dtype)
    damping = torch.full((1,), 0.1, dtype=dtype)
    return (*nc.spd_solve(A, B, damping), *nc.cg(A, B, damping, 1e-4, 50))


def one_matrix(dtype: torch.dtype) -> tuple[Tensor, ...]:
    Z, R, _, _ = family(dtype)
    return shared(Z, R, torch.tensor(0.5, dtype=dtype))


KERNELS: dict[str, Callable[[torch.dtype], tuple[Tensor, ...]]] = {
    "spd_solve, cg": dense,
    "scaled_gram_solve": lambda dtype: nc.scaled_gram_solve(*gram(dtype)),
    "weighted_gram": lambda dtype: (
        nc.weighted_gram(family(dtype)[0], family(dtype)[2], family(dtype)[3]),
    ),
    "ridge_dual": lambda dtype: dual(*family(dtype)),
    "ridge_complement": binary,
    "ridge_shared": one_matrix,
    "ridge_error": errors,
    "ridge_normal": normal,
    "scaled_gram_product": product,
    "cg_step, cg_direction": steps,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_1_2_and_8_threads_give_equal_bits(
    level: str, kernel: str, dtype: torch.dtype, two_threads: None
) -> None:
    if kernel == "ridge_complement" and dtype == torch.float64:
        pytest.skip("a kernel for float32 only")
    torch.set_num_threads(1)
    one = KERNELS[kernel](dtype)
    for threads in (2, 8):
        torch.set_num_threads(threads)
        for a, b in zip(one, KERNELS[kernel](dtype), strict=True):
            assert torch.equal(a, b)


def test_every_kernel_is_looked_at() -> None:
    """What the module offers, but for what computes nothing or only counts."""
    offered = {
        attribute for attribute in dir(_C) if not attribute.startswith("_") and attribute != "cuda"
    }
    named = {part for entry in KERNELS for part in entry.split(", ")}
    assert offered - named == {"build_info", "set_simd_level", "fma_rate", "ridge_counts"}
