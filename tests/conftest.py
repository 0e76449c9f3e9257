"""Fixtures: native kernels and threads, kernels compiled for CUDA, a GPU to pretend with."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_resources
import pytest
import torch


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
    """Puts the number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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
def compiled_kernels(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, cuda_resources.Compiled]:
    """Every CUDA source by its file name, compiled once for all tests; needs nvcc."""
    folder = tmp_path_factory.mktemp("nvcc")
    done = cuda_resources.compile_all(cuda_resources.sources(), folder)
    return {one.source: one for one in done}
