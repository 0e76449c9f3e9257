"""The CUDA build: what nvcc makes of the kernels, and the real thing where there is a GPU."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cuda_report
import cuda_resources
import pytest
import torch
from cuda_host_library import KERNEL_SOURCES

from backmatch import _C, linalg
from backmatch.linalg._ridge_routes import primal

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: CUDA is not compiled here")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.build_info()["cuda"]),
    reason="no GPU, or torch or backmatch built without CUDA; test_cuda_host runs the same kernels",
)
DTYPES = [torch.float32, torch.float64]
GPU_SIZES = [
    1,
    7,
    8,
    9,
    16,
    17,
    24,
    25,
    32,
    33,
    40,
    48,
    49,
    64,
    65,
    97,
    129,
    200,
    256,
    321,
    400,
    512,
    513,
]


# ---- nvcc ----------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", KERNEL_SOURCES)
def test_kernels_compile_without_spills(
    source: str, compiled_kernels: dict[str, cuda_resources.Compiled]
) -> None:
    """Every kernel, sm_80 and sm_90: no spills, no stack, no unresolved memory space."""
    compiled = compiled_kernels[source]
    assert "warning" not in compiled.output
    found = {each.architecture for each in compiled.instances}
    assert found == set(cuda_resources.ARCHITECTURES)
    for each in compiled.instances:
        print(f"sm_{each.architecture} {each.registers:>4} registers  {each.name}")
    assert not cuda_resources.in_local_memory(compiled.instances, cuda_report.REASONS)

    # Shared memory reached through generic addresses would work, but slowly.
    assert len(compiled.ptx) == len(cuda_resources.ARCHITECTURES)
    for ptx in compiled.ptx:
        assert not re.findall(r"^\s*(?:ld|st)\.(?:v\d\.)?[fbsu]\d+.*$", ptx, re.MULTILINE)


def test_failures_to_launch_are_errors_that_name_the_kernel() -> None:
    if not _C.build_info()["cuda"]:
        assert not hasattr(_C, "cuda")
        return
    with pytest.raises(ValueError, match="n must be at most 262144, got 2000000"):
        _C.cuda.spd_solve_workspace("float32", 1, 2_000_000, 1)
    with pytest.raises(ValueError, match="expected 'float32' or 'float64', got 'int8'"):
        _C.cuda.scaled_gram_solve_workspace("int8", 1, 4)
    if _C.cuda.device_count() == 0:
        with pytest.raises(RuntimeError, match="backmatch CUDA: spd_solve_thread_kernel<float, 4>"):
            _C.cuda.spd_solve("float32", 1, 4, 1, *[0] * 14)
        with pytest.raises(RuntimeError, match="backmatch CUDA: weighted_gram_kernel<float, 16>: "):
            _C.cuda.weighted_gram("float32", 1, 4, 9, *[0] * 10)


# ---- a GPU ---------------------------------------------------------------------------------------


def same_on_both_devices(solve: Callable[..., tuple], *arguments: torch.Tensor, **dampings) -> None:
    """CPU and CUDA agree to rounding where solved, and exactly on what failed."""
    move = [a.cuda() for a in arguments]
    on_gpu = solve(*move, **{k: v.cuda() for k, v in dampings.items()})
    on_cpu = solve(*arguments, **dampings)
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1])
    tolerance = 2000 * torch.finfo(on_cpu[0].dtype).eps
    torch.testing.assert_close(
        on_gpu[0].cpu(), on_cpu[0], rtol=tolerance, atol=tolerance, equal_nan=True
    )
    again = solve(*move, **{k: v.cuda() for k, v in dampings.items()})
    assert torch.equal(again[0].isnan(), on_gpu[0].isnan())
    assert torch.equal(again[0].nan_to_num(), on_gpu[0].nan_to_num())


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", GPU_SIZES)
def test_spd_solve_on_the_gpu(dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    factor = torch.randn(20, n, n + 4, generator=generator, dtype=dtype)
    A = factor @ factor.mT / n
    A[3, n // 2, : n // 2 + 1] = 0
    A[3, n // 2, n // 2] = -1
    damping = torch.full((20,), 0.5, dtype=dtype)
    for k in (0, 1, 5, 33):
        B = torch.randn(20, k, n, generator=generator, dtype=dtype).mT
        same_on_both_devices(linalg.spd_solve_ex, A, B, damping=damping)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", GPU_SIZES)
def test_scaled_gram_solve_on_the_gpu(dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    factor = torch.randn(n, n + 4, generator=generator, dtype=dtype)
    K = factor @ factor.T / n
    R = torch.randn(20, n, generator=generator, dtype=dtype)
    damping = torch.full((20,), 0.5, dtype=dtype)
    damping[3] = torch.nan
    for density in (0.0, 0.5, 1.0):
        D = torch.rand(20, n, generator=generator, dtype=dtype) + 0.5
        D[torch.rand(20, n, generator=generator) >= density] = 0
        same_on_both_devices(linalg.scaled_gram_solve_ex, K, D, R, damping=damping)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200, 257, 400])
@pytest.mark.parametrize("m", [1, 40, 300])
def test_weighted_gram_and_ridge_primal_on_the_gpu(dtype: torch.dtype, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    Z = torch.randn(m, n, generator=generator, dtype=dtype) / m**0.5
    slopes, R = torch.randn(2, 20, m, generator=generator, dtype=dtype)
    slopes[torch.rand(20, m, generator=generator) < 0.5] = 0
    damping = torch.full((20,), 0.5, dtype=dtype)
    on_device = [a.cuda() for a in (Z, slopes, R, damping)]
    tolerance = 2000 * torch.finfo(dtype).eps
    for rows in (on_device[0], on_device[0].mT.contiguous().mT):
        G = linalg.weighted_gram(rows, on_device[1], damping=on_device[3])
        expected = linalg.weighted_gram(Z, slopes, damping=damping)
        torch.testing.assert_close(G.cpu(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(G, G.mT)
        assert torch.equal(G[7], linalg.weighted_gram(rows, on_device[1][7], damping=0.5))
        d, info = primal(rows, on_device[2], on_device[1], on_device[3])
        expected = primal(Z, R, slopes, damping)[0]
        torch.testing.assert_close(d.cpu(), expected, rtol=tolerance, atol=tolerance)
        assert not info.any()


@needs_gpu
def test_batch_larger_than_any_grid_dimension_but_the_first() -> None:
    A = torch.rand(70_000, 2, 2) / 4 + torch.eye(2)
    A[65_536, 0, 0] = -1
    B = torch.rand(70_000, 2, 1)
    same_on_both_devices(linalg.spd_solve_ex, A, B, damping=torch.zeros(70_000))


@needs_gpu
def test_threads_that_need_different_shared_memory_launch_at_the_same_time() -> None:
    """One kernel for both orders: a thread must not take back what the other one opted in to."""
    generator = torch.Generator().manual_seed(0)
    systems = []
    for n in (176, 204):
        factor = torch.randn(4, n, n + 4, generator=generator, dtype=torch.float64)
        A = factor @ factor.mT / n
        B = torch.randn(4, n, 1, generator=generator, dtype=torch.float64)
        systems.append((A.cuda(), B.cuda()))

    def solve(system: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        for _ in range(500):
            X = linalg.spd_solve_ex(*system, damping=0.5)[0]
        return X

    expected = [linalg.spd_solve_ex(*system, damping=0.5)[0] for system in systems]
    with ThreadPoolExecutor(2) as pool:
        for X, alone in zip(pool.map(solve, systems), expected, strict=True):
            assert torch.equal(X, alone)
