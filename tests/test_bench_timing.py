"""The machinery of ``backmatch bench``: turns, checks before timing, rates, memory. No times."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from backmatch import _C, linalg
from backmatch.bench import (
    accuracy,
    conjugate_gradient,
    machine,
    memory,
    run,
    scaled_gram,
    spd_solve,
    timing,
    weighted_gram,
)
from backmatch.bench.accuracy import WrongAnswerError
from backmatch.bench.case import OURS, Case, Settings
from backmatch.bench.measure import measure
from backmatch.bench.options import BenchOptions

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = timing.Effort(repeats=3, seconds=1e-3, fewest=2, fewest_of_peers=1)


def settings(**options: Any) -> Settings:
    chosen = BenchOptions(**{"quick": True, "dtypes": ("float32",), "batch": 20, **options})
    return Settings(chosen, CPU, TINY)


def small_case(**changes: Any) -> Case:
    return next(iter(spd_solve.cases(settings(sizes=(9,), **changes))))


def replaced(case: Case, **changes: Any) -> Case:
    return Case(**{**vars(case), **changes})


def test_candidates_take_turns_and_slow_ones_take_part_in_fewer_rounds() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "slow")}
    effort = timing.Effort(repeats=6, seconds=1.0, fewest=6, fewest_of_peers=2)
    estimates = {"a": 0.05, "b": 0.05, "slow": 0.5}
    found = timing.interleave(calls, estimates, {"a": 6, "b": 6, "slow": 2}, effort)
    assert {name: len(one.raw_times) for name, one in found.items()} == {"a": 6, "b": 6, "slow": 2}
    first, second = (i for i, name in enumerate(order) if name == "slow")
    assert order[first:second].count("a") in (2, 3, 4)
    starts = [order[0], *(order[i] for i in range(3, len(order)))]
    assert {"a", "b"} <= set(starts)


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = itertools.count()
    effort = timing.Effort(repeats=2, seconds=1.0, fewest=2, fewest_of_peers=2)
    found = timing.interleave({"a": lambda: next(count)}, {"a": 1e-4}, {"a": 2}, effort)["a"]
    assert found.number_per_run == 20
    assert next(count) == 2 * (20 + 1)  # one call before each sample does not count


def test_a_request_to_stop_ends_the_measurement() -> None:
    def stop() -> None:
        raise timing.InterruptedBenchError

    with pytest.raises(timing.InterruptedBenchError):
        timing.interleave({"a": lambda: None}, {"a": 1.0}, {"a": 1}, TINY, stop)


def test_inputs_rotate_over_all_candidates_and_are_sliced() -> None:
    sets = [(torch.full((1,), float(i)), torch.arange(4.0) + 10 * i) for i in range(3)]
    inputs, seen = timing.Inputs(sets), []
    a = inputs.bind(lambda shared, x: seen.append(("a", shared.item(), x.numel())))
    b = inputs.bind(lambda shared, x: seen.append(("b", shared.item(), x.numel())), 2, shared=1)
    for call in (a, b, a, b):
        call()
    assert seen == [("a", 0, 4), ("b", 1, 2), ("a", 2, 4), ("b", 0, 2)]


def test_a_row_holds_what_the_package_documents() -> None:
    row = measure(small_case(), settings())
    json.dumps(row, allow_nan=False)
    assert row["case"] == {"n": 9, "batch": 20, "k": 1, "dtype": "float32"}
    assert set(row["times"]) == {OURS, "linalg.solve", "cholesky", "scipy"}
    ours, peers = row["times"][OURS], set(row["times"]) - {OURS}
    assert ours["repeats"] >= TINY.fewest
    assert set(row["ratios"]) == peers
    assert row["best_peer"] == min(peers, key=lambda name: row["times"][name]["median_seconds"])
    for name in peers:
        ratio = row["times"][name]["median_seconds"] / ours["median_seconds"]
        assert row["ratios"][name] == pytest.approx(ratio)
    rate = 20 * (9**3 / 3 + 2 * 81) / ours["median_seconds"] / 1e9
    assert row["gflops"][OURS] == pytest.approx(rate)
    assert row["fraction_of_fma"] == pytest.approx(rate / row["fma_gflops"])
    moved = 4 * 20 * (45 + 18) / 1e9 / ours["median_seconds"]
    assert row["fraction_of_copy"] == pytest.approx(moved / row["copy_gbytes_per_second"])
    assert all(0 <= error < accuracy.WORST for error in row["worst_scaled_residual"].values())
    assert row["failed"] == {}


def test_a_wrong_answer_of_ours_is_not_timed() -> None:
    case = small_case()
    wrong = {**case.candidates, OURS: lambda A, B: 1.001 * linalg.spd_solve(A, B)}
    row = measure(replaced(case, candidates=wrong), settings())
    assert "times" not in row
    assert row["error"].startswith("backmatch: error ")


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        (lambda A, B: 1.001 * torch.linalg.solve(A, B), "error"),
        (lambda A, B: torch.full_like(B, torch.nan), "error inf"),
        (lambda A, B: torch.linalg.cholesky(-A), "LinAlgError"),
    ],
    ids=["wrong", "nan", "raises"],
)
def test_a_peer_that_fails_is_recorded_and_left_out(peer: Callable[..., Tensor], told: str) -> None:
    case = small_case()
    row = measure(replaced(case, candidates={**case.candidates, "cholesky": peer}), settings())
    assert told in row["failed"]["cholesky"]
    assert "cholesky" not in row["times"]
    assert "cholesky" not in row["worst_scaled_residual"]
    assert "linalg.solve" in row["ratios"]


def test_a_peer_that_fails_while_it_is_timed_has_no_time() -> None:
    count = itertools.count()

    def late(A: Tensor, B: Tensor) -> Tensor:
        if next(count) > 3:
            raise RuntimeError("now\nand then")
        return torch.linalg.solve(A, B)

    case = small_case()
    row = measure(replaced(case, candidates={**case.candidates, "late": late}), settings())
    assert row["failed"] == {"late": "RuntimeError: now and then"}
    assert "late" not in row["times"]


def test_a_slow_peer_works_on_a_slice() -> None:
    sizes = []

    def slow(A: Tensor, B: Tensor) -> Tensor:
        sizes.append(len(A))
        if len(A) > 8:
            torch.linalg.solve(torch.eye(500), torch.eye(500))
        return torch.linalg.solve(A, B)

    case = small_case(batch=200)
    effort = timing.Effort(repeats=2, seconds=1e-6, fewest=2, fewest_of_peers=2)
    row = measure(
        replaced(case, candidates={**case.candidates, "slow": slow}),
        Settings(settings().options, CPU, effort),
    )
    assert set(sizes) == {200, 8}
    assert row["times"]["slow"]["systems_timed"] == 8
    assert row["times"][OURS]["systems_timed"] == 200


def test_a_kernel_that_spoils_the_neighbours_of_a_bad_system_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = linalg.spd_solve_ex

    def spoiled(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        X, info = right(A, B)
        return (X * (1 + 1e-6) if bool(info.any()) else X), info

    monkeypatch.setattr(linalg, "spd_solve_ex", spoiled)
    row = measure(small_case(), settings())
    assert row["error"] == "spd_solve: the neighbours of a failed system lost their bits"
    monkeypatch.setattr(linalg, "spd_solve_ex", lambda A, B: (right(A, B)[0], right(A, B)[1] * 0))
    assert "info [0, 0" in measure(small_case(), settings())["error"]


def test_residuals_equal_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 5, 5, generator=generator)
    A, B = A @ A.mT + torch.eye(5), torch.randn(3, 5, 1, generator=generator)
    X = torch.linalg.solve(A, B) * 1.01
    worst = max(
        np.abs(a @ x - b).max() / (np.linalg.norm(a, np.inf) * np.abs(x).max())
        for a, b, x in zip(*(v.double().numpy() for v in (A, B, X)), strict=True)
    )
    expected = worst / (5 * torch.finfo(torch.float32).eps)
    assert accuracy.spd_residual(A, B, X, 0.0) == pytest.approx(expected)
    assert accuracy.spd_residual(A, B, X * torch.nan, 0.0) == math.inf
    K, D, R = A[0], torch.tensor([[1.0, 0, 2, 0, 1]]), B[1:2, :, 0]
    right = linalg.scaled_gram_solve(K, D, R, damping=0.5)
    assert accuracy.scaled_gram_residual(K, D, R, right, 0.5) < 1
    assert accuracy.scaled_gram_residual(K, D, R, right * 1.001, 0.5) > 10
    Z, w = A[0], torch.rand(4, 5, generator=generator)
    assert accuracy.gram_error(Z, w, linalg.weighted_gram(Z, w)) < 1
    assert accuracy.gram_error(Z, w, linalg.weighted_gram(Z, w, damping=0.01)) > 10
    with pytest.raises(WrongAnswerError, match=r"x: error nan, at most 1\.00e"):
        accuracy.require("x", math.nan, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kernel_case_is_right(dtype: str) -> None:
    """Ours and all peers, on awkward sizes; SciPy stands behind the peers' code."""
    chosen = settings(sizes=(7, 33), dtypes=(dtype,), batch=9)
    for module in (spd_solve, scaled_gram, weighted_gram, conjugate_gradient):
        for case in module.cases(chosen):
            assert next(iter(case.candidates)) == OURS
            for name, candidate in case.candidates.items():
                for inputs in (case.inputs[0], case.inputs[-1]):
                    error = case.error(inputs, candidate(*inputs))
                    assert error <= case.bound, (case.about, name)
            for check in case.more_checks:
                check()
    A, B = case_inputs = spd_solve.systems(chosen, 7, 9, torch.float64)
    assert case_inputs[0].dtype == torch.float64
    want = np.stack([scipy.linalg.solve(a, b) for a, b in zip(A.numpy(), B.numpy(), strict=True)])
    np.testing.assert_allclose(spd_solve.by_scipy(A, B), want, rtol=1e-10)


def test_fma_loop_counts_what_it_does() -> None:
    info = _C.build_info()
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16}[info["simd_active"]]
    one, two = _C.fma_rate("float32", 1), _C.fma_rate("float32", 3)
    assert two == 3 * one
    assert one % (2 * lanes * torch.get_num_threads()) == 0
    assert _C.fma_rate("float64", 1) == one / 2
    assert _C.fma_rate("float32", 0) == 0
    with pytest.raises(ValueError, match="fma_rate: expected sizes >= 0, got -1"):
        _C.fma_rate("float32", -1)


def test_the_machine_is_described() -> None:
    about = machine.describe(CPU)
    assert {"date", "cpu", "threads", "simd", "commit", "torch", "scipy", "backmatch"} <= set(about)
    json.dumps(about)
    rates = machine.rates(CPU, torch.float64)
    assert rates["copy"].work >= 2 * machine.last_level_cache(CPU)
    for rate in rates.values():
        rate.run()
    torch.set_num_threads(2)
    assert machine.rates(CPU, torch.float64)["fma"].work == 2 * rates["fma"].work


def test_peak_memory_sees_a_temporary() -> None:
    run_once = lambda: torch.ones(2**22).sum()  # noqa: E731 - 16 MiB that are free again
    assert 2**24 <= memory.tensor_peak(run_once, CPU) < 2**25
    peak = memory.process_peak(run_once)
    assert peak is None or 2**23 < peak < 2**27


def test_a_batch_beyond_the_memory_is_refused() -> None:
    with pytest.raises(run.UsageError, match=r"need about .* GiB with their copies"):
        run.settle(BenchOptions(batch=2**24, sizes=(512,), device="cpu"))


def test_threads_of_a_case_are_put_back() -> None:
    before, seen = torch.get_num_threads(), []
    case = small_case()

    def ours(A: Tensor, B: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return linalg.spd_solve(A, B)

    measure(replaced(case, candidates={OURS: ours}, threads=2), settings())
    assert set(seen) == {2}
    assert torch.get_num_threads() == before
