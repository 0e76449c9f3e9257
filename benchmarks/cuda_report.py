"""Registers, launches and occupancy of every CUDA kernel, without a GPU: docs/cuda-resources.md.

    python benchmarks/cuda_report.py            # compile, write the page, print a summary
    python benchmarks/cuda_report.py --check    # compile, compare with the page, write nothing

Needs nvcc and a build with CUDA kernels, whose launchers are called in a dry run. The exit code is
1 if a kernel has a stack or spills (unless ``REASONS`` names it), 2 if something needed is missing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cuda_launches
import cuda_resources
from cuda_launches import BATCH, BETWEEN, PLAIN, ROWS, Call, Launch
from cuda_resources import DEVICES, Device, Instance, Occupancy, ToolError, occupancy

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cuda-resources.md"
#: Instance -> why its stack or spills are accepted.
REASONS: dict[str, str] = {}
#: Orders of the table of floors.
FLOOR_ORDERS = (8, 16, 32, 64, 128, 256, 512)

#: Launcher -> what one system of order n needs: (label, operations, entries read and written).
Work = Callable[[int], list[tuple[str, float, float]]]
WORK: dict[str, Work] = {
    "spd_solve": lambda n: [("", n**3 / 3 + 2 * n**2, n * (n + 1) / 2 + 2 * n)],
    "scaled_gram_solve": lambda n: [
        ("all active", n**3 / 3 + 2 * n**2, 3 * n),
        ("half active", (n / 2) ** 3 / 3 + 2 * (n / 2) ** 2, 3 * n),
    ],
    "weighted_gram": lambda n: [(f"m = {ROWS}, all weights", ROWS * n * (n + 1), ROWS + n * n)],
    "ridge_primal": lambda n: [
        (
            f"m = {ROWS}, half active",
            ROWS / 2 * n * (n + 1) + n**3 / 3 + 2 * n**2 + 2 * ROWS * n,
            2 * ROWS + n,
        )
    ],
    "cg": lambda n: [("one step, matrix from memory", 2 * n**2 + 10 * n, n * n)],
    "scaled_gram_cg": lambda n: [("one step", 2 * n**2 + 10 * n, 0)],
    "cg_step": lambda n: [("", 10 * n, 7 * n)],
}

Row = Sequence[str]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the page only")
    parser.add_argument("--out", type=Path, default=PAGE, help="default: docs/cuda-resources.md")
    parsed = parser.parse_args(arguments)
    try:
        instances, version = compiled()
        text = page(instances, all_calls(native_cuda()), version)
    except ToolError as missing:
        print(f"cuda_report.py: {missing}", file=sys.stderr)
        return 2
    print(summary(instances))
    if bad := cuda_resources.in_local_memory(instances, REASONS):
        print("\n".join(["not in registers:", *bad]), file=sys.stderr)
        return 1
    if not parsed.check:
        parsed.out.write_text(text)
        print(f"written {parsed.out}")
    elif text != parsed.out.read_text():
        print(f"cuda_report.py: {parsed.out} is not what this code gives", file=sys.stderr)
        return 1
    return 0


def compiled() -> tuple[list[Instance], str]:
    """The instances of all sources, and the compiler's version."""
    version = cuda_resources.nvcc_version()
    with tempfile.TemporaryDirectory() as folder:
        done = cuda_resources.compile_all(cuda_resources.sources(), Path(folder))
    return [instance for one in done for instance in one.instances], version


def native_cuda() -> Any:
    """``backmatch._C.cuda``.

    Raises:
        ToolError: there is no build, or none with CUDA.
    """
    sys.path.insert(0, str(PAGE.parent.parent))  # a build in place need not be installed
    try:
        from backmatch import _C
    except ImportError as error:
        raise ToolError(f"backmatch is not built ({error})") from None
    if not hasattr(_C, "cuda"):
        raise ToolError("this build has no CUDA kernels; rebuild with BACKMATCH_CUDA=1")
    return _C.cuda


def all_calls(module: Any) -> list[Call]:
    """Every launcher on every device."""
    return [call for device in DEVICES for call in cuda_launches.calls(module, device)]


# ---- the page ------------------------------------------------------------------------------------


def page(instances: Sequence[Instance], calls: Sequence[Call], version: str) -> str:
    """The whole document."""
    parts = [INTRODUCTION.format(nvcc=version), "## Instances", resources(instances, calls)]
    if REASONS:
        parts += ["Stack or spills that are accepted:"]
        parts += ["\n".join(f"- `{name}`: {reason}" for name, reason in REASONS.items())]
    parts += ["## Launches and occupancy", LAUNCHES.format(batch=f"{BATCH:,}", m=ROWS)]
    for launcher in dict.fromkeys(call.launcher for call in calls):
        own = [
            call
            for call in calls
            if call.launcher == launcher
            and call.variant == PLAIN
            and call.n not in BETWEEN
            and not any(dict(call.flags).values())
        ]
        parts += [f"### `{launcher}`", launch_table(own, instances)]
        parts += refusals(own)
    parts += [
        "## Floors",
        FLOORS.format(batch=f"{BATCH:,}"),
        floors({call.launcher for call in calls}),
    ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
# CUDA kernels: resources and occupancy

Written by `make cuda-report` (benchmarks/cuda_report.py); do not edit. Compiled by nvcc {nvcc}.

All of this is arithmetic on what the compiler reports and on the launch shapes that the launchers
choose, found in a dry run with the limits of each device. **Nothing on this page was measured on a
GPU.** How the kernels work stands in [kernels/index.md](kernels/index.md). Sizes are in bytes;
*constant* (parameters) is not told for every architecture."""

LAUNCHES = """\
One call of each launcher for {batch} systems, one right-hand side (m = {m} rows where there are
any), plain contiguous tensors. *Shared* is the dynamic shared memory of a block in bytes;
*blocks/SM* and *warps/SM* (of 64) are what a multiprocessor holds at a time, *limit* what allows no
more. Neighbouring orders with the same launch share a line; where the shared memory grows with n
its range is given. A factor in the workspace instead of shared memory shows as a launch with little
shared memory at a large n."""

FLOORS = """\
Least time of {batch} systems in microseconds: the larger of the bytes that must be read and written
at the device's memory rate, and of the operations at its peak (vector units; the matrix units of
double have twice that). Peaks are the vendor's. A bound on every implementation, not an estimate of
this one."""


def refusals(calls: Sequence[Call]) -> list[str]:
    """One sentence on the orders that a launcher does not take; ``linalg`` never asks for them."""
    refused = [call for call in calls if call.error]
    if not refused:
        return []
    orders = sorted({call.n for call in refused if call.n is not None})
    runs = [
        [str(n) for _, n in run]
        for _, run in itertools.groupby(enumerate(orders), lambda pair: pair[1] - pair[0])
    ]
    return [f"Refused: n = {', '.join(map(span, runs))}. The first: {refused[0].error}."]


def resources(instances: Sequence[Instance], calls: Sequence[Call]) -> str:
    """One line per instance, sm_80 and sm_90 side by side."""
    first: dict[str, Call] = {}
    for call in calls:
        for launch in call.launches:
            first.setdefault(launch.kernel, call)
    header = ["kernel", "registers sm_80 / sm_90", "stack", "spill stores / loads"]
    header += ["static shared", "constant", "first launched by"]
    lines = []
    for name, group in itertools.groupby(
        sorted(instances, key=lambda each: (each.name, each.architecture)), lambda each: each.name
    ):
        both = list(group)
        spills = max(each.spill_stores for each in both), max(each.spill_loads for each in both)
        lines.append(
            [
                f"`{name}`",
                " / ".join(str(each.registers) for each in both),
                str(max(each.stack for each in both)),
                f"{spills[0]} / {spills[1]}",
                str(max(each.static_shared for each in both)),
                " / ".join(str(each.constant or "-") for each in both),
                case_of(first[name]) if name in first else "none of the cases tried",
            ]
        )
    return markdown(header, lines)


def case_of(call: Call) -> str:
    """``spd_solve, n 33, k 8``: what sets the call apart from a plain one."""
    words = [f"`{call.launcher}`"]
    words += [f"n {call.n}"] if call.n is not None else []
    words += [f"{flag}" for flag, given in call.flags if given]
    variant = call.variant
    if variant.systems != PLAIN.systems:
        words.append(f"{variant.systems} systems")
    if variant.columns != PLAIN.columns:
        words.append(f"k {variant.columns}")
    if variant.layout != PLAIN.layout:
        words.append({"columns": "transposed", "odd": "odd strides"}[variant.layout])
    elif variant.address != PLAIN.address:
        words.append("with all that is optional")
    return ", ".join(words)


def launch_table(calls: Sequence[Call], instances: Sequence[Instance]) -> str:
    """One line per device, dtype, run of orders and launch."""
    header = ["device", "dtype", "n", "kernel", "blocks", "threads", "shared", "registers"]
    header += ["blocks/SM", "warps/SM", "limit"]
    lines: list[Row] = []
    groups = itertools.groupby(
        calls, lambda c: (c.device, c.dtype, [same(launch) for launch in held(c, instances)])
    )
    for (name, dtype, _), group in groups:
        run = list(group)
        for number in range(len(run[0].launches)):
            each = [held(call, instances)[number] for call in run]
            orders = [str(call.n) for call in run if call.n is not None]
            lines.append([name, dtype, *launch_cells(orders, each)])
    return markdown(header, lines)


Held = tuple[Launch, int, Occupancy]


def held(call: Call, instances: Sequence[Instance]) -> list[Held]:
    """Every launch of a call with its registers and occupancy."""
    device = device_named(call.device)
    by_name = {e.name: e for e in instances if e.architecture == device.architecture}
    found = []
    for launch in call.launches:
        instance = by_name.get(launch.kernel)
        if instance is None:
            raise ToolError(
                f"{launch.kernel} is launched, but no source defines it: the build is older than "
                "the sources"
            )
        shared = launch.shared_bytes + instance.static_shared
        found.append(
            (
                launch,
                instance.registers,
                occupancy(device, launch.threads, instance.registers, shared),
            )
        )
    return found


def same(one: Held) -> tuple[object, ...]:
    """What neighbouring orders must share to stand in one line."""
    launch, registers, occupied = one
    return launch.kernel, launch.threads, registers, occupied


def launch_cells(orders: Sequence[str], each: Sequence[Held]) -> list[str]:
    launch, registers, occupied = each[0]
    return [
        span(orders),
        f"`{launch.kernel}`",
        span([f"{one.blocks:,}" for one, *_ in each]),
        str(launch.threads),
        span([f"{one.shared_bytes:,}" for one, *_ in each]),
        str(registers),
        str(occupied.blocks),
        str(occupied.warps),
        ", ".join(occupied.limits),
    ]


def span(values: Sequence[str]) -> str:
    """``17 to 32``, or the one value."""
    if not values:
        return ""
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def device_named(name: str) -> Device:
    return next(device for device in DEVICES if device.name == name)


def floors(launchers: Iterable[str]) -> str:
    """The roofline of every launcher whose work is known."""
    known = [name for name in WORK if name in set(launchers)]
    header = ["operator", "n"]
    for device in DEVICES:
        header += [f"{device.name}: float32", "binds", "float64", "binds"]
    lines = []
    for name in known:
        for n in FLOOR_ORDERS:
            for label, flops, entries in WORK[name](n):
                title = f"`{name}`" + (f", {label}" if label else "")
                cells = [cell for device in DEVICES for cell in floor_cells(device, flops, entries)]
                lines.append([title, str(n), *cells])
    # All orders of one kind of work in a row.
    lines.sort(key=lambda line: (known.index(line[0].split("`")[1]), line[0]))
    rates = "; ".join(
        f"{d.name}: {d.bytes_per_second / 1e12:g} TB/s, {d.float32 / 1e12:g} TF/s in float32, "
        f"{d.float64 / 1e12:g} in float64"
        for d in DEVICES
    )
    return f"{rates}.\n\n{markdown(header, lines)}"


def floor_cells(device: Device, flops: float, entries: float) -> list[str]:
    cells = []
    for size, peak in ((4, device.float32), (8, device.float64)):
        memory = BATCH * entries * size / device.bytes_per_second
        compute = BATCH * flops / peak
        cells += [
            f"{1e6 * max(memory, compute):.3g}",
            "memory" if memory > compute else "compute",
        ]
    return cells


def summary(instances: Sequence[Instance]) -> str:
    """Two lines for the terminal."""
    most = max(instances, key=lambda each: each.registers)
    return (
        f"{len({each.name for each in instances})} kernel instances for "
        f"{', '.join(f'sm_{a}' for a in cuda_resources.ARCHITECTURES)}; most registers: "
        f"{most.registers} ({most.name}, sm_{most.architecture})"
    )


def markdown(header: Row, lines: Iterable[Row]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
