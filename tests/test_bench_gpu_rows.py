"""What benchmarks/gpu.py times in its own way on CUDA, and what it writes; on stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_cases
import gpu_graphs
import gpu_groups
import gpu_json
import gpu_tables
import pytest
import stored
import torch

from backmatch.bench import machine, options, timing
from backmatch.bench.case import OURS, Settings
from backmatch.linalg import _library

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = timing.Effort(repeats=2, seconds=1e-3, fewest=1, fewest_of_peers=1)


def tiny_settings(**changes: Any) -> Settings:
    chosen = {"quick": True, "sizes": (8,), "batch": 9, "dtypes": ("float32",), "device": "cpu"}
    return Settings(options.BenchOptions(**{**chosen, **changes}), CPU, TINY)


def never() -> None:
    """Time is never up."""


# ---- what only CUDA takes ------------------------------------------------------------------------


def test_cuda_samples_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            assert self.at == clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def call() -> None:
        clock[0] += 3.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    effort = timing.Effort(repeats=4, seconds=1.0, fewest=4, fewest_of_peers=4)
    found = timing.interleave({"a": call}, {"a": 1e-3}, {"a": 4}, effort, device="cuda")["a"]
    assert found.number_per_run == 2
    assert found.times == pytest.approx([3e-3] * 4)


def test_rates_of_a_gpu_are_those_of_the_native_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[object, ...]] = []

    def fma_rate(dtype: str, repeats: int, workspace: int, stream: int) -> float:
        called.append((dtype, repeats, stream))
        return 2.0 * repeats

    def matrix_rate(repeats: int, workspace: int, stream: int) -> float:
        called.append(("matrix", repeats, stream))
        return 512.0 * repeats

    native = SimpleNamespace(
        fma_rate=fma_rate,
        matrix_rate=matrix_rate,
        fma_rate_workspace=lambda dtype: 24,
        matrix_rate_workspace=lambda: 48,
    )
    cuda = SimpleNamespace(type="cuda")
    empty: Callable[..., torch.Tensor] = torch.empty
    monkeypatch.setattr(_library, "native_cuda", lambda: native)
    monkeypatch.setattr(machine, "_copy", lambda device: machine.Rate(never, 1.0))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    assert set(machine.rates(cuda, torch.float32)) == {"fma", "copy"}  # type: ignore[arg-type]
    rates = machine.rates(cuda, torch.float64)  # type: ignore[arg-type]
    steps = machine._CUDA_FMA_STEPS
    assert (rates["fma"].work, rates["matrix"].work) == (2.0 * steps, 512.0 * steps)
    rates["fma"].run()
    assert called == [
        ("float32", steps, 5),
        ("float64", steps, 5),
        ("matrix", steps, 5),
        ("float64", steps, 5),
    ]


def test_a_loop_with_a_graph_has_one_for_every_set_of_inputs() -> None:
    case = next(iter(gpu_cases.conv_cg(tiny_settings())))
    first, second = case.inputs[:2]
    loop = case.candidates[gpu_cases.GRAPH]
    answer = loop(*first).clone()
    assert case.error(second, loop(*second)) <= case.bound
    assert torch.equal(loop(*first), answer)


def test_a_loop_that_cannot_be_captured_is_a_peer_that_fails() -> None:
    def problem(B: torch.Tensor) -> Any:
        raise RuntimeError("operation not permitted")

    loop = gpu_graphs.loop_of(problem, [(torch.ones(1, 2, 1),)], 1e-3)
    with pytest.raises(RuntimeError, match="not captured: operation not permitted"):
        loop(torch.ones(1, 2, 1))


def test_a_group_may_take_its_own_effort() -> None:
    settings_of = gpu_groups.settings_of
    vgg = gpu_groups.GROUPS["vgg"]
    full = settings_of(vgg, quick=False, device="cpu", check_stop=never)
    assert full.effort is vgg.effort
    assert settings_of(vgg, quick=True, device="cpu", check_stop=never).effort is timing.QUICK
    spd = settings_of(gpu_groups.GROUPS["cg"], quick=False, device="cpu", check_stop=never)
    assert spd.effort is timing.FULL


# ---- tables --------------------------------------------------------------------------------------


def test_the_readme_says_what_is_known() -> None:
    """The section is what ``gpu.py --readme`` writes today."""
    result = json.loads(gpu.RESULT.read_text()) if gpu.RESULT.exists() else None
    text = stored.README.read_text()
    section = text.partition("<!-- gpu: begin -->\n")[2].partition("\n<!-- gpu: end -->")[0]
    assert section == gpu_tables.gpu(result)
    if result is None:
        assert "has not run on a GPU" in section


def test_tables_of_a_gpu() -> None:
    times = {"median_seconds": 1e-3, "iqr_seconds": 1e-5, "repeats": 25}
    row = {
        "question": "scaled_gram",
        "case": {"n": 64, "batch": 10_000, "slopes": "relu", "dtype": "float64"},
        "times": {OURS: times, "cholesky": times, "cupy": times},
        "ratios": {"cholesky": 22.0, "linalg.solve": 31.0, "cupy": 40.0},
        "fraction_of_fma": 0.5,
        "fraction_of_copy": 0.031,
    }
    rates = {"fma_gflops": 30e3, "matrix_gflops": 60e3, "copy_gbytes_per_second": 2900.0}
    kernels = {"status": "passed", "elapsed_seconds": 3.0, "rows": [row]}
    sanitizer = {"status": "failed", "elapsed_seconds": 9.0, "reason": "race |\ncheck failed"}
    head = {"date": "2026-01-02", "gpu": "H100", "driver": "1.2", "cuda": "13", "cpu": "x"}
    text = gpu_tables.gpu(
        {
            "machine": {**head, "torch": "2", "commit": "abc"},
            "stages": {
                "sanitizer": sanitizer,
                "kernels": {**kernels, "rates": {"float64": rates}},
            },
        }
    )
    assert "| sanitizer | failed | race / check failed | 9 s |" in text
    assert (
        "| `scaled_gram_solve`, half active | 64 | 10000 | float64 | 1 ms | 10 us | 22 x | 40 x |"
        " 50% | 3% |"
    ) in text
    assert "float64 30.0 TF/s, float64 on the matrix units 60.0 TF/s; copy: 2900 GB/s" in text
    assert "H100, driver 1.2, CUDA 13, torch 2, commit abc." in text


def test_json_files_are_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b.json"
    gpu_json.write_json(out, {"x": (1.0, float("inf"), [float("nan")])})
    assert json.loads(out.read_text()) == {"x": [1.0, None, [None]]}
    assert [path.name for path in out.parent.iterdir()] == ["b.json"]
