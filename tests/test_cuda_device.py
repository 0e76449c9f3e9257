"""The operators among torch's own machinery: streams, graphs, devices, memory, torch.compile.

What makes sense without a GPU runs on the CPU too, so that the tests themselves are executed.
"""

from __future__ import annotations

import linalg_cases as lc
import pytest
import torch
from torch import Tensor

from backmatch import linalg
from backmatch.linalg import _library

HAS_GPU = torch.cuda.is_available() and hasattr(_library.native(), "cuda")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a build without CUDA kernels")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]

#: One order for each band of the kernels.
ORDERS = (1, 5, 8, 13, 32, 40, 64, 65, 100, 129, 257, 400, 513)


class Problem:
    """Arguments of every operator that reports failures on the device, for one order."""

    def __init__(self, n: int, batch: int, device: str, dtype: torch.dtype) -> None:
        self.A = lc.spd(batch, n, dtype=dtype).to(device)
        self.B = lc.normal(batch, n, 3, dtype=dtype, seed=1).to(device)
        Z = lc.normal(n, n + 2, dtype=dtype, seed=2) / n**0.5
        self.K = (Z @ Z.mT).to(device)
        self.D = lc.relu_like(batch, n, dtype=dtype, seed=3).to(device)
        self.R = lc.normal(batch, n, dtype=dtype, seed=4).to(device)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.A, self.B, self.K, self.D, self.R

    def solve(self) -> tuple[Tensor, ...]:
        """X and info of both kernels."""
        dense = linalg.spd_solve_ex(self.A, self.B, damping=0.1)
        family = linalg.scaled_gram_solve_ex(self.K, self.D, self.R, damping=0.1)
        return (*dense, *family)


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left.isnan(), right.isnan())
        assert torch.equal(left.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
def test_bits_repeat_and_a_bad_matrix_leaves_its_neighbours_alone(device, dtype):
    for n in ORDERS:
        problem = Problem(n, 5, device, dtype)
        good = problem.solve()
        for _ in range(100 if n < 129 else 3):
            assert_same_bits(problem.solve(), good)
        problem.A[2, n - 1, n - 1] = -1e3
        problem.R[2], problem.D[2] = torch.nan, 1
        bad = problem.solve()
        assert bad[1].tolist() == [0, 0, n, 0, 0]
        assert bad[0][2].isnan().all()
        keep = [0, 1, 3, 4]
        assert_same_bits(tuple(v[keep] for v in bad), tuple(v[keep] for v in good))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [3, 20, 70])
def test_bits_do_not_depend_on_the_split_of_the_batch(device, n):
    problem = Problem(n, 37, device, torch.float32)
    whole = problem.solve()
    for part in (slice(0, 1), slice(1, 20), slice(20, 37)):
        few = Problem(n, 37, device, torch.float32)
        few.A, few.B, few.D, few.R = (v[part] for v in (few.A, few.B, few.D, few.R))
        assert_same_bits(few.solve(), tuple(value[part] for value in whole))


@pytest.mark.parametrize("device", DEVICES)
def test_batch_beyond_every_grid_dimension(device):
    """More systems than 65,535 and than 2^19; each has an answer of its own."""
    batch = (1 << 19) + 3
    scale = torch.arange(1, batch + 1, dtype=torch.float64, device=device)
    for n in (1, 2, 9):
        eye = torch.eye(n, dtype=torch.float64, device=device)
        X, info = linalg.spd_solve_ex(eye * scale[:, None, None], eye[:1].T.expand(batch, n, 1))
        assert not info.any()
        torch.testing.assert_close(X[:, 0, 0], 1 / scale)
        D = torch.ones(batch, n, dtype=torch.float64, device=device)
        Y, info = linalg.scaled_gram_solve_ex(eye, D, scale[:, None] * D, damping=scale)
        assert not info.any()
        torch.testing.assert_close(Y, (scale / (1 + scale))[:, None].expand(batch, n))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_functions_call_the_kernels(device):
    problem = Problem(12, 4, device, torch.float64)

    def step(A, B, K, D, R):
        X, info = linalg.spd_solve_ex(2 * A, B, damping=0.1)
        Y, status = linalg.scaled_gram_solve_ex(K, D, R + 1, damping=0.1)
        return X.sum() + Y.sum(), info.sum() + status.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*problem.tensors()), step(*problem.tensors())
    torch.testing.assert_close(got[0], expected[0])
    assert got[1] == expected[1] == 0


# ---- a GPU ---------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("n", ORDERS[:-1])
def test_inside_a_captured_graph(n):
    """Recorded once, replayed on new values of the same tensors."""
    problem = Problem(n, 6, "cuda", torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.solve()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = problem.solve()
    for factor in (1.0, 2.0, 0.5):
        for value in (problem.B, problem.R):
            value.mul_(factor)
        graph.replay()
        assert_same_bits(recorded, problem.solve())


@needs_gpu
@pytest.mark.parametrize("n", ORDERS[:-1])
def test_work_goes_to_the_current_stream(n):
    """A side stream that is held back delays the solve; the result is that of the late input."""
    problem = Problem(n, 6, "cuda", torch.float32)
    expected = problem.solve()
    late = [torch.full_like(value, torch.nan) for value in problem.tensors()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # clock cycles: tens of milliseconds
        for target, value in zip(late, problem.tensors(), strict=True):
            target.copy_(value)
        problem.A, problem.B, problem.K, problem.D, problem.R = late
        got = problem.solve()
    assert not side.query()
    side.synchronize()
    assert_same_bits(got, expected)


@needs_gpu
def test_streams_do_not_disturb_each_other():
    """Kernels with a workspace in flight on several streams at once."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    problems = [Problem(n, 40, "cuda", torch.float64) for n in (300, 400, 420, 512)]
    expected = [problem.solve() for problem in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                got.append(problem.solve())
        torch.cuda.synchronize()
        for mine, right in zip(got, expected, strict=True):
            assert_same_bits(mine, right)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_tensors_decide_about_the_device():
    problem = Problem(70, 5, "cuda:1", torch.float32)
    with torch.cuda.device(0):
        X, info, Y, status = problem.solve()
        assert torch.cuda.current_device() == 0
    assert {v.device.index for v in (X, info, Y, status)} == {1}
    assert_same_bits(
        tuple(v.cpu() for v in (X, Y)),
        tuple(v.cpu() for v in Problem(70, 5, "cuda:0", torch.float32).solve()[::2]),
    )


@needs_gpu
def test_scarce_memory_makes_smaller_chunks_and_the_same_bits():
    """The workspace does not fit at first; halved chunks give the same result."""
    problem = Problem(500, 300, "cuda", torch.float32)
    expected = problem.solve()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + (24 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        got = linalg.scaled_gram_solve_ex(problem.K, problem.D, problem.R, damping=0.1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same_bits(got, expected[2:])


@needs_gpu
def test_more_than_two_to_the_31_elements():
    """Offsets beyond 32 bits: the last systems of a batch of 9.7 GB."""
    n, batch = 33, 2_230_000
    A = torch.zeros(batch, n, n, device="cuda")
    assert A.numel() > 1 << 31
    A.diagonal(dim1=-2, dim2=-1).fill_(2)
    A[-1].diagonal().fill_(4)
    X, info = linalg.spd_solve_ex(A, torch.ones(1, n, 1, device="cuda"))
    assert not info.any()
    torch.testing.assert_close(X[:-1].amax(), X.new_tensor(0.5))
    torch.testing.assert_close(X[:-1].amin(), X.new_tensor(0.5))
    torch.testing.assert_close(X[-1], torch.full_like(X[-1], 0.25))
