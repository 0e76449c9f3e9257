"""The dry run of launches, the arithmetic of occupancy, and the page that is made of both."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cuda_host_library
import cuda_launches
import cuda_report
import cuda_resources
import pytest
from cuda_resources import A100, H100, Instance, ToolError, occupancy

from backmatch import _C

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: CUDA is not compiled here")
needs_cuda_build = pytest.mark.skipif(
    not hasattr(_C, "cuda"), reason="backmatch is built without CUDA kernels"
)

LIMITS = (232448, 132)
#: dtype, batch, n, k, and addresses and strides of spd_solve, all 0.
SPD_SOLVE = ("float32", 10_000, 20, 1, *[0] * 14)


# ---- dry run -------------------------------------------------------------------------------------


@needs_cuda_build
def test_dry_run_returns_the_launches() -> None:
    def twice() -> None:
        _C.cuda.spd_solve(*SPD_SOLVE)
        _C.cuda.spd_solve(*SPD_SOLVE)

    launches = _C.cuda.dry_run(*LIMITS, twice)
    assert len(launches) == 2
    assert launches[0] == launches[1]
    name, blocks, threads, shared = launches[0]
    assert re.fullmatch(r"spd_solve_\w+_kernel<float.*>", name)
    assert blocks > 0
    assert threads % 32 == 0
    assert 0 <= shared <= LIMITS[0]
    assert _C.cuda.dry_run(*LIMITS, lambda: None) == []


@needs_cuda_build
def test_dry_run_has_the_limits_that_it_is_given() -> None:
    def bytes_on(*limits: int) -> int:
        found: list[int] = []
        call = lambda: found.append(_C.cuda.fma_rate_workspace("float32"))  # noqa: E731
        assert _C.cuda.dry_run(*limits, call) == []
        return found[0]

    assert bytes_on(1024, 6) == 2 * bytes_on(1024, 3)


@needs_cuda_build
def test_dry_run_ends_with_an_exception() -> None:
    def fails() -> None:
        _C.cuda.spd_solve(*SPD_SOLVE)
        raise KeyError("mine")

    def fails_within() -> None:
        _C.cuda.spd_solve(*SPD_SOLVE)
        with pytest.raises(KeyError, match="mine"):
            _C.cuda.dry_run(*LIMITS, fails)
        _C.cuda.spd_solve(*SPD_SOLVE)

    with pytest.raises(KeyError, match="mine"):
        _C.cuda.dry_run(*LIMITS, fails)
    assert len(_C.cuda.dry_run(*LIMITS, fails_within)) == 2  # the outer one goes on, with its own
    with pytest.raises(ValueError, match="n must be at most"):
        _C.cuda.dry_run(*LIMITS, lambda: _C.cuda.spd_solve("float32", 1, 2_000_000, 1, *[0] * 14))
    if _C.cuda.device_count() == 0:  # launches are real again, and say that there is no device
        with pytest.raises(RuntimeError, match="backmatch CUDA: spd_solve_"):
            _C.cuda.spd_solve(*SPD_SOLVE)


@needs_cuda_build
def test_launchers_are_discovered() -> None:
    launchers = cuda_launches.launchers(_C.cuda)
    assert {"spd_solve", "scaled_gram_solve", "fma_rate"} <= set(launchers)
    assert "dry_run" not in launchers
    assert not [name for name in launchers if name.endswith("_workspace")]
    assert list(launchers["spd_solve"])[:4] == ["dtype", "batch", "n", "k"]
    calls = [call for device in (H100, A100) for call in cuda_launches.calls(_C.cuda, device)]
    assert all(call.launches for call in calls if not call.error)
    assert {call.launcher for call in calls if not call.error} == set(launchers)
    for call in calls:
        limit = {d.name: d.shared_per_block for d in (H100, A100)}[call.device]
        assert all(each.shared_bytes <= limit for each in call.launches), call


# ---- occupancy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "threads", "registers", "shared", "blocks", "limits"),
    [
        # 64 registers: 2048 a warp, 8 warps a partition, 32 in all, 8 blocks of 4.
        (H100, 128, 64, 0, 8, ("registers",)),
        (H100, 128, 32, 0, 16, ("registers", "threads")),
        (H100, 32, 16, 0, 32, ("blocks",)),
        # 65 registers are 2080, rounded up to 2304: 7 warps a partition.
        (H100, 128, 65, 0, 7, ("registers",)),
        # 28 warps hold 9 blocks of 3, though 4 of them would not fit one partition evenly.
        (H100, 96, 65, 0, 9, ("registers",)),
        # 227 KB and the system's 1 KB are all that there is.
        (H100, 256, 32, 227 * 1024, 1, ("shared",)),
        (H100, 256, 32, 227 * 1024 + 1, 0, ("shared",)),
        (H100, 64, 32, 56 * 1024, 4, ("shared",)),  # 57 KB each of 228
        (A100, 64, 32, 56 * 1024, 2, ("shared",)),  # 57 KB each of 164
        (A100, 256, 128, 40 * 1024, 2, ("registers",)),
        (A100, 1024, 64, 0, 1, ("registers",)),
        (A100, 1024, 65, 0, 0, ("registers",)),  # too many for one block
    ],
)
def test_occupancy_by_hand(
    device: Any, threads: int, registers: int, shared: int, blocks: int, limits: tuple[str, ...]
) -> None:
    found = occupancy(device, threads, registers, shared)
    assert (found.blocks, found.limits) == (blocks, limits)
    assert found.warps == blocks * -(-threads // 32)


CALCULATOR = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, threads, registers;
  unsigned long shared, most;
  while (std::scanf("%d %d %d %lu %lu", &major, &threads, &registers, &shared, &most) == 5) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = 0;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = most + 1024;
    device.numSms = 100;
    device.sharedMemPerBlockOptin = most;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared))
      return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_nvcc
def test_occupancy_agrees_with_the_toolkit(tmp_path: Path) -> None:
    """With the calculator that comes with nvcc as a header, over a grid of launches."""
    include = Path(str(NVCC)).resolve().parent.parent / "include"
    if not (include / "cuda_occupancy.h").exists():
        pytest.skip("this toolkit has no cuda_occupancy.h")
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    compile_it = [*cuda_host_library.compiler(), f"-I{include}", str(source), "-o", str(program)]
    subprocess.run(compile_it, check=True)
    cases = [
        (device, threads, registers, shared)
        for device in (A100, H100)
        for threads in (32, 64, 96, 128, 192, 256, 512, 1024)
        for registers in (16, 24, 32, 33, 40, 63, 64, 65, 80, 96, 97, 128, 168, 255)
        for shared in (0, 16, 5000, 11792, 49152, 50000, 83456, 115000, device.shared_per_block)
    ]
    lines = [
        f"{device.architecture // 10} {threads} {registers} {shared} {device.shared_per_block}"
        for device, threads, registers, shared in cases
    ]
    run = subprocess.run(
        [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = [int(line) for line in run.stdout.split()]
    assert [occupancy(*case).blocks for case in cases] == expected


# ---- what nvcc says ------------------------------------------------------------------------------


def test_plain_names() -> None:
    plain = cuda_resources.plain_name
    prefix = "void backmatch::cuda::"
    assert plain(f"{prefix}a_kernel<float, 8>(backmatch::Args<float>)") == "a_kernel<float, 8>"
    assert plain(f"{prefix}a_kernel(long, double*)") == "a_kernel"
    assert plain(f"{prefix}a_kernel<(int)8, true, 4l>(int)") == "a_kernel<8, true, 4>"
    assert plain(f"{prefix}a_kernel<Op<double, 2> >(void (*)(int))") == "a_kernel<Op<double, 2> >"


SPILLING = """
extern "C" __global__ void spill(const float* in, float* out, int n) {
  __shared__ float shared[7];
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = in[i * n];
  shared[threadIdx.x % 7] = kept[n];
  __syncthreads();
  for (int i = 0; i < n; ++i) kept[(i * 7) % 64] += in[i];
  for (int i = 0; i < 64; ++i) out[i * n] = kept[i] + shared[i % 7];
}
namespace backmatch::cuda {
template <class T, int N> __global__ void good_kernel(T* out) { out[threadIdx.x] = T(N); }
template __global__ void good_kernel<double, 3>(double*);
}
"""


@needs_nvcc
def test_parsing_what_nvcc_prints(tmp_path: Path) -> None:
    source = tmp_path / "spill.cu"
    source.write_text(SPILLING)
    compiled = cuda_resources.compile_one(source, tmp_path / "kept")
    assert len(compiled.ptx) == 2
    assert [(each.name, each.architecture) for each in compiled.instances] == [
        ("good_kernel<double, 3>", 80),
        ("good_kernel<double, 3>", 90),
        ("spill", 80),
        ("spill", 90),
    ]
    good, _, bad, _ = compiled.instances
    assert good.in_registers
    assert 0 < good.registers < 32
    assert bad.stack >= 256  # an array with a computed index
    assert bad.static_shared == 28
    lines = cuda_resources.in_local_memory(compiled.instances, {})
    assert len(lines) == 2
    assert lines[0].startswith(f"spill (sm_80): stack {bad.stack}, ")
    assert cuda_resources.in_local_memory(compiled.instances, {"spill": "a test"}) == []

    source.write_text("__global__ void broken( {}")
    with pytest.raises(ToolError, match=r"(?s)^nvcc failed:\n.*error"):
        cuda_resources.compile_one(source, tmp_path / "kept")


# ---- the page ------------------------------------------------------------------------------------


@pytest.fixture
def one_instance(monkeypatch: pytest.MonkeyPatch) -> Instance:
    """Stands in for nvcc and the build: one instance, launched by a launcher of every order."""
    instance = Instance("f_kernel<float>", 90, 64, 0, 0, 0)
    both = [instance, Instance("f_kernel<float>", 80, 40, 0, 0, 0)]
    call = cuda_launches.Call(
        *("f", H100.name, "float32", 8, cuda_launches.PLAIN),
        (cuda_launches.Launch("f_kernel<float>", 5, 128, 100),),
    )
    monkeypatch.setattr(cuda_report, "compiled", lambda: (both, "1.2"))
    monkeypatch.setattr(cuda_report, "native_cuda", lambda: None)
    monkeypatch.setattr(cuda_report, "all_calls", lambda module: [call])
    return instance


def test_the_page_is_written_and_compared(
    one_instance: Instance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    assert cuda_report.main(["--out", str(page)]) == 0
    text = page.read_text()
    assert "| `f_kernel<float>` | 40 / 64 | 0 | 0 / 0 | 0 | - / - | `f`, n 8 |" in text
    line = (
        "| H100 SXM | float32 | 8 | `f_kernel<float>` | 5 | 128 | 100 | 64 | 8 | 32 | registers |"
    )
    assert line in text
    assert "Nothing on this page was measured" in text
    assert cuda_report.main(["--check", "--out", str(page)]) == 0
    page.write_text(text + "more")
    capsys.readouterr()
    assert cuda_report.main(["--check", "--out", str(page)]) == 1
    assert "is not what this code gives" in capsys.readouterr().err


def test_a_spill_fails_unless_it_has_a_reason(
    one_instance: Instance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spilled = [Instance("f_kernel<float>", a, 255, 16, 8, 4) for a in (80, 90)]
    monkeypatch.setattr(cuda_report, "compiled", lambda: (spilled, "1.2"))
    page = tmp_path / "page.md"
    assert cuda_report.main(["--out", str(page)]) == 1
    assert not page.exists()
    assert "f_kernel<float> (sm_80): stack 16, spill stores 8" in capsys.readouterr().err
    monkeypatch.setitem(cuda_report.REASONS, "f_kernel<float>", "runs once a day")
    assert cuda_report.main(["--out", str(page)]) == 0
    assert "- `f_kernel<float>`: runs once a day" in page.read_text()


def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert cuda_report.main([]) == 2
    assert capsys.readouterr().err == "cuda_report.py: nvcc is not on PATH\n"
    monkeypatch.setattr(cuda_report, "compiled", lambda: ([], "1.2"))
    monkeypatch.delattr(_C, "cuda", raising=False)
    assert cuda_report.main([]) == 2
    assert capsys.readouterr().err.startswith("cuda_report.py: this build has no CUDA kernels; ")


def test_floors_by_hand() -> None:
    # 2208 entries of 4 bytes at 3.35 TB/s take longer than 95,573 operations at 66.9 TF/s.
    cells = cuda_report.floor_cells(H100, 64**3 / 3 + 2 * 64**2, 64 * 65 / 2 + 2 * 64)
    assert cells == ["26.4", "memory", "52.7", "memory"]
    assert "`spd_solve` | 64 | 26.4 | memory |" in cuda_report.floors(["spd_solve", "unheard of"])


@needs_nvcc
@needs_cuda_build
@pytest.mark.slow
def test_the_page_is_current(compiled_kernels: dict[str, cuda_resources.Compiled]) -> None:
    """Instances and launches of the sources; registers where the compiler is the page's."""
    instances = [each for one in compiled_kernels.values() for each in one.instances]
    version = cuda_resources.nvcc_version()
    fresh = cuda_report.page(instances, cuda_report.all_calls(_C.cuda), version)
    stored = cuda_report.PAGE.read_text()
    rerun = "run `make cuda-report`"
    if f"nvcc {version}." in stored:
        assert stored == fresh, rerun
    kernels = re.compile(r"^\| (`\w+_kernel[^|]*`) \|", re.MULTILINE)
    assert kernels.findall(stored) == kernels.findall(fresh), rerun
    launched = re.compile(r"^\| \w.* \| (float\d\d) \| ([^|]*) \| (`[^|]*`) \| .*$", re.MULTILINE)
    assert {row[2] for row in launched.findall(stored)} == {
        row[2] for row in launched.findall(fresh)
    }, rerun
    assert "none of the cases tried" not in fresh
