"""The README's section on GPUs, from a stored result of gpu.py or without one."""

from __future__ import annotations

from typing import Any

from tables import markdown

from backmatch.bench.case import OURS
from backmatch.bench.report import ratio, seconds

Row = dict[str, Any]
Result = dict[str, Any]

NOTHING = """\
The CUDA path has been executed only on the host: the tests run the kernels' own source thread by
thread, and nvcc compiles it for sm_80 and sm_90 ([resources and
occupancy](docs/cuda-resources.md)). It has not run on a GPU, so there are no times.
`python benchmarks/gpu.py` builds, tests, sanitizes and times everything on a machine that has one,
`--readme` then puts the tables here."""

_TITLES = {
    "spd_solve": "`spd_solve`",
    "scaled_gram": "`scaled_gram_solve`",
    "weighted_gram": "`weighted_gram`",
    "cg": "`cg`",
    "conv_cg": "`cg`, matrix-free convolution",
    "overhead": "`spd_solve`, one system",
}
_DETAILS = {
    "relu": "half active",
    "tanh": "all active",
    "scaled": "scaled-Gram",
    "unchecked": "status not looked at",
}
_OTHERS = {"cupy": "CuPy", "warp tiles": "Warp tiles"}


def gpu(result: Result | None) -> str:
    """What was run and found, or that nothing was."""
    if result is None:
        return NOTHING
    stages = result["stages"]
    parts = [_stages(stages)]
    if rows := _timed(stages.get("kernels", {})):
        parts.append(_kernels(rows))
        parts += _cliffs(stages["kernels"])
    if rows := _timed(stages.get("steps", {})):
        parts.append(_steps(rows))
    if machine := result.get("machine"):
        parts.append(_where(machine, stages))
    return "\n\n".join(parts)


def _timed(stage: Row) -> list[Row]:
    return [row for row in stage.get("rows", ()) if "times" in row and row["question"] != "cliffs"]


def _stages(stages: dict[str, Row]) -> str:
    lines = [
        [name, stage["status"], _remark(stage), f"{stage['elapsed_seconds']:.0f} s"]
        for name, stage in stages.items()
    ]
    return markdown(["stage", "outcome", "", "took"], lines)


def _remark(stage: Row) -> str:
    if "reason" in stage:
        text = stage["reason"]
    elif "tools" in stage:
        text = "; ".join(f"{tool}: {said}" for tool, said in stage["tools"].items())
    else:
        text = stage.get("summary", "")
    return " ".join(text.split()).replace("|", "/")[:200]


def _kernels(rows: list[Row]) -> str:
    others = [name for name in _OTHERS if any(name in row["ratios"] for row in rows)]
    header = ["kernel", "n", "batch", "dtype", "one call", "spread", "best torch"]
    header += [*(_OTHERS[name] for name in others), "of FMA", "of copy"]
    return markdown(header, [_cells(row, others) for row in rows])


def _cells(row: Row, others: list[str]) -> list[str]:
    case, times = row["case"], row["times"][OURS]
    detail = _DETAILS.get(case.get("slopes", case.get("form", "")))
    torch = [value for name, value in row["ratios"].items() if name not in _OTHERS]
    return [
        _TITLES.get(row["question"], row["question"]) + (f", {detail}" if detail else ""),
        str(case["n"]),
        str(case["batch"]),
        case["dtype"],
        seconds(times["median_seconds"]),
        seconds(times["iqr_seconds"]),
        f"{ratio(min(torch))} x" if torch else "",
        *(f"{ratio(row['ratios'][name])} x" if name in row["ratios"] else "" for name in others),
        f"{row['fraction_of_fma']:.0%}" if "fraction_of_fma" in row else "",
        f"{row['fraction_of_copy']:.0%}" if "fraction_of_copy" in row else "",
    ]


def _cliffs(stage: Row) -> list[str]:
    sentences = []
    for dtype, found in stage.get("cliffs", {}).items():
        worst = sorted(found, key=lambda step: -found[step])[:3]
        listed = ", ".join(f"{ratio(found[step])} (n = {step})" for step in worst)
        sentences.append(f"Largest t(n + 1) / t(n) in {dtype}, of {len(found)}: {listed}.")
    return sentences


def _steps(rows: list[Row]) -> str:
    header = ["exact step", "batch", "one step", "back-propagation", "exact / back-propagation"]
    header += ["torch.linalg / exact", "most CG iterations"]
    lines = []
    for row in rows:
        times, ratios = row["times"], row["ratios"]
        peer = times.get("back-propagation", {}).get("median_seconds")
        plain = ratios.get("torch.linalg")
        lines.append(
            [
                row["case"]["net"],
                str(row["case"]["batch"]),
                seconds(times[OURS]["median_seconds"]),
                "failed" if peer is None else seconds(peer),
                "" if peer is None else ratio(times[OURS]["median_seconds"] / peer),
                "" if plain is None else f"{ratio(plain)} x",
                str(row.get("iterations", {}).get(OURS, "")),
            ]
        )
    return markdown(header, lines)


def _where(machine: Row, stages: dict[str, Row]) -> str:
    rates = {
        dtype: rate for stage in stages.values() for dtype, rate in stage.get("rates", {}).items()
    }
    limits = [f"{dtype} {rate['fma_gflops'] / 1e3:.1f} TF/s" for dtype, rate in rates.items()]
    limits += [
        f"{dtype} on the matrix units {rate['matrix_gflops'] / 1e3:.1f} TF/s"
        for dtype, rate in rates.items()
        if "matrix_gflops" in rate
    ]
    copies = [rate["copy_gbytes_per_second"] for rate in rates.values()]
    copy = f"; copy: {max(copies):.0f} GB/s" if copies else ""
    return (
        "Medians by events on the stream, spread: interquartile range; x: the peer's time over "
        f"ours. FMA loop: {', '.join(limits)}{copy}. {machine['date']}, "
        f"{machine.get('gpu', machine['cpu'])}, driver {machine.get('driver')}, CUDA "
        f"{machine.get('cuda')}, torch {machine['torch']}, commit {machine['commit']}."
    )
