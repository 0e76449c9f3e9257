"""Fixtures: native kernels and threads, kernels compiled for CUDA, a GPU to pretend with."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported, which reads them once; child processes inherit them. A thread that spins
# until the next parallel loop takes the core from whoever works on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: see `two_threads`
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cuda_resources
import nvcc_once
import pytest
import torch
from cuda_host_library import CudaHost, build


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """One SIMD level after the other; the setting is process-wide and put back afterwards."""
    from backmatch import _C  # here: other tests run without the module

    active = _C.build_info()["simd_active"]
    try:
        _C.set_simd_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_simd_level(active)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests of our kernels: they divide their work, whatever the machine and the worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine one thread is faster than waiting for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """See tests/pretend_device.py; the names of the CUDA kernels, as they are called."""
    import pretend_device

    return pretend_device.install(monkeypatch)


@pytest.fixture(scope="session")
def cuda(request: pytest.FixtureRequest) -> CudaHost:
    """The CUDA kernels on the host, built by the first worker that needs them."""
    return CudaHost(build(request.config.cache.mkdir("cuda_host")))


@pytest.fixture(scope="session")
def compiled_kernels(request: pytest.FixtureRequest) -> dict[str, cuda_resources.Compiled]:
    """Every CUDA source by its file name, compiled once for all tests; needs nvcc."""
    done = nvcc_once.compiled(request.config.cache.mkdir("nvcc"))
    return {one.source: one for one in done}
