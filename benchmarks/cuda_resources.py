"""What nvcc makes of the CUDA kernels, and how many blocks of that a multiprocessor holds.

Registers, stack, spills and shared memory are those that ptxas reports for each instance of each
kernel. Occupancy follows the allocation rules of the CUDA C++ programming guide for compute
capability 8.0 and 9.0; nothing here needs a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHITECTURES = (80, 90)


class ToolError(Exception):
    """A program that is needed is missing or failed; the text is the reason."""


# ---- compiling -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    """One kernel with its template arguments, compiled for one architecture; sizes in bytes."""

    name: str
    architecture: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int = 0
    constant: int = 0

    @property
    def in_registers(self) -> bool:
        """Whether nothing of a thread lies in local memory."""
        return self.stack == self.spill_stores == self.spill_loads == 0


@dataclass(frozen=True)
class Compiled:
    """What came of one source: its instances, all that nvcc printed, and its PTX."""

    source: str
    instances: tuple[Instance, ...]
    output: str
    ptx: tuple[str, ...] = field(repr=False, default=())


def sources() -> list[Path]:
    """Every CUDA source."""
    return sorted(KERNELS.glob("*.cu"))


def nvcc() -> str:
    """Path of nvcc.

    Raises:
        ToolError: it is not on PATH.
    """
    path = shutil.which("nvcc")
    if path is None:
        raise ToolError("nvcc is not on PATH")
    return path


def nvcc_version() -> str:
    """As ``13.0.88``."""
    text = run([nvcc(), "--version"])
    found = re.search(r"\bV(\d[\d.]*)", text)
    return found[1] if found else "unknown"


def compile_all(paths: Sequence[Path], folder: Path, processes: int = 2) -> list[Compiled]:
    """Compile for every architecture, a few sources at a time; PTX is kept in ``folder``."""
    with ThreadPool(processes) as pool:
        # One at a time: the slow ones are neighbours in the alphabet.
        return pool.map(lambda path: compile_one(path, folder / path.stem), paths, chunksize=1)


def compile_one(path: Path, folder: Path) -> Compiled:
    """One nvcc for all architectures; device code only.

    Raises:
        ToolError: nvcc failed; the text is what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [nvcc(), "-std=c++17", "-O3", f"-I{path.parent / 'device'}", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += ["--keep", "--keep-dir", str(folder), "-fatbin", str(path)]
    output = run([*command, "-o", str(folder / f"{path.stem}.fatbin")])
    ptx = tuple(file.read_text() for file in sorted(folder.glob("*.ptx")))
    return Compiled(path.name, tuple(parse(output)), output, ptx)


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)\w?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse(output: str) -> list[Instance]:
    """The instances that ``nvcc -Xptxas -v`` tells of, under their names in the source."""
    entries = [match.groupdict() for match in _ENTRY.finditer(output)]
    names = instance_names([entry.pop("name") for entry in entries])
    found = []
    for name, entry in zip(names, entries, strict=True):
        rest = entry.pop("rest")
        sizes = {key: int(value) for key, value in entry.items()}
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", rest)))
        constant = sum(map(int, re.findall(r"(\d+) bytes cmem", rest)))
        found.append(Instance(name, **sizes, static_shared=shared, constant=constant))
    return sorted(found, key=lambda each: (each.name, each.architecture))


def instance_names(mangled: Sequence[str]) -> list[str]:
    """``spd_solve_thread_kernel<float, 8>`` of the linker's names, as a launch names it.

    Raises:
        ToolError: there is no c++filt, which comes with every g++.
    """
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None:
        raise ToolError("neither cu++filt nor c++filt is on PATH (binutils has the latter)")
    if not mangled:
        return []
    return [plain_name(line) for line in run([program, *mangled]).splitlines()]


def plain_name(signature: str) -> str:
    """A demangled signature without result, namespace, casts and parameters.

    >>> plain_name("void backmatch::cuda::f_kernel<float, (int)8, true>(backmatch::FArgs<float>)")
    'f_kernel<float, 8, true>'
    """
    text = signature.removeprefix("void ").replace("backmatch::cuda::", "")
    depth, end = 0, len(text)
    for place, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        before_parameters = letter == "(" and depth == 0
        if before_parameters:
            end = place
            break
    text = re.sub(r"\([\w: ]+\)(?=[\w-])", "", text[:end])  # the cast of a number
    return re.sub(r"\b(\d+)[ul]+\b", r"\1", text)


def run(command: Sequence[str]) -> str:
    """What a program prints, both streams.

    Raises:
        ToolError: it failed.
    """
    done = subprocess.run(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise ToolError(f"{Path(command[0]).name} failed:\n{done.stdout[-3000:]}")
    return done.stdout


# ---- occupancy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A GPU as its vendor documents it; rates in operations and bytes per second."""

    name: str
    architecture: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    bytes_per_second: float
    float32: float
    float64: float


A100 = Device("A100 80 GB SXM", 80, 108, 163 * 1024, 164 * 1024, 2.04e12, 19.5e12, 9.7e12)
H100 = Device("H100 SXM", 90, 132, 227 * 1024, 228 * 1024, 3.35e12, 66.9e12, 33.5e12)
DEVICES = (H100, A100)

WARP = 32
_REGISTERS, _THREADS, _BLOCKS, _PARTITIONS = 64 * 1024, 2048, 32, 4
_REGISTER_UNIT = 256  # registers are given to a warp in these
_SHARED_UNIT, _SHARED_RESERVED = 128, 1024  # bytes; the second are the system's, in every block


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor holds at a time.

    Attributes:
        blocks: resident blocks.
        warps: their warps.
        limits: what allows no more: ``registers``, ``shared``, ``threads``, ``blocks``.
    """

    blocks: int
    warps: int
    limits: tuple[str, ...]


def occupancy(device: Device, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """By the rules of compute capability 8.0 and 9.0.

    Args:
        device: its shared memory counts.
        threads: of a block.
        registers: of a thread.
        shared_bytes: static and dynamic, of a block.
    """
    warps = -(-threads // WARP)
    per_warp = _rounded(registers * WARP, _REGISTER_UNIT)
    # A multiprocessor has four partitions with a quarter of the registers each.
    fitting = _REGISTERS // _PARTITIONS // per_warp * _PARTITIONS if per_warp else _REGISTERS
    if per_warp * _rounded(warps, _PARTITIONS) > _REGISTERS:
        fitting = 0  # what the hardware checks before a launch
    shared = _rounded(shared_bytes + _SHARED_RESERVED, _SHARED_UNIT)
    most = {
        "registers": fitting // warps,
        "shared": device.shared_per_multiprocessor // shared,
        "threads": _THREADS // (warps * WARP),
        "blocks": _BLOCKS,
    }
    if shared_bytes > device.shared_per_block:
        most["shared"] = 0
    blocks = min(most.values())
    return Occupancy(blocks, blocks * warps, tuple(k for k, v in most.items() if v == blocks))


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def in_local_memory(instances: Iterable[Instance], reasons: dict[str, str]) -> list[str]:
    """One line for every instance with a stack or spills that has no reason for it."""
    return [
        f"{each.name} (sm_{each.architecture}): stack {each.stack}, spill stores "
        f"{each.spill_stores}, spill loads {each.spill_loads} bytes"
        for each in instances
        if not each.in_registers and each.name not in reasons
    ]
