"""README tables from stored results of ``backmatch bench``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from backmatch.bench.case import OURS
from backmatch.bench.report import ratio, seconds

Row = dict[str, Any]
Result = dict[str, Any]

_TITLES = {
    "spd_solve": "`spd_solve`",
    "scaled_gram": "`scaled_gram_solve`",
    "weighted_gram": "`weighted_gram`",
    "cg": "`cg`",
}
_SLOPES = {"relu": ", half active", "tanh": ", all active"}
_FORMS = {"dense": "", "scaled": ", scaled-Gram"}


def kernels(result: Result) -> str:
    """Time per system, ratios and rates of every kernel, float32 and float64 side by side."""
    header = ["kernel", "n"]
    dtypes = list(dict.fromkeys(row["case"]["dtype"] for row in result["rows"]))
    for dtype in dtypes:
        header += [f"{dtype}: one system", "best torch", "SciPy", "of FMA"]
    groups: dict[str, dict[int, dict[str, Row]]] = {}
    for row in result["rows"]:
        by_size = groups.setdefault(_kernel(row), {})
        by_size.setdefault(row["case"]["n"], {})[row["case"]["dtype"]] = row
    lines = [
        [kernel, str(n), *(cell for dtype in dtypes for cell in _kernel_cells(by_dtype.get(dtype)))]
        for kernel, by_size in groups.items()
        for n, by_dtype in by_size.items()
    ]
    remarks = [*_peaks(result["rows"]), _residuals(result["rows"]), _where(result)]
    return "\n\n".join([markdown(header, lines), *remarks])


def step(result: Result) -> str:
    """The exact step in ms, beside back-propagation, torch.linalg and the layer-wise methods."""
    parts = []
    rows = [row for row in result["rows"] if row["question"] == "step"]
    if rows:
        header = ["net, batch", "exact step", "back-propagation", "exact / back-propagation"]
        header += ["the same step in torch.linalg", "torch.linalg / exact"]
        parts.append(markdown(header, [_step_cells(row) for row in rows]))
    rows = [row for row in result["rows"] if row["question"] == "peers"]
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row["times"] if name != OURS))
        header = ["net, batch", "exact step for", "ours", *names]
        lines = [
            [_net(row), row["case"]["ours"], *(_time(row, name) for name in (OURS, *names))]
            for row in rows
        ]
        parts.append(markdown(header, lines))
    return "\n\n".join([*parts, _where(result)])


def scaling(result: Result) -> str:
    """One table for every axis."""
    parts = []
    for axis in dict.fromkeys(row["case"]["over"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["case"]["over"] == axis]
        header = ["kernel", axis, "one call", "per system", "best torch / ours", "GF/s", "of FMA"]
        lines = [
            [
                _fixed(row, axis),
                str(row["case"][axis]),
                _time(row, OURS),
                seconds(row["times"][OURS]["median_seconds"] / row["case"]["batch"]),
                _ratio(row, _torch(row)),
                f"{row['gflops'][OURS]:.1f}",
                f"{row['fraction_of_fma']:.0%}",
            ]
            for row in rows
            if "times" in row
        ]
        parts.append(markdown(header, lines))
    return "\n\n".join([*parts, _where(result)])


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _kernel(row: Row) -> str:
    case = row["case"]
    title = _TITLES[row["question"]] + _SLOPES.get(case.get("slopes", ""), "")
    return title + _FORMS.get(case.get("form", ""), "")


def _kernel_cells(row: Row | None) -> list[str]:
    if row is None or "times" not in row:
        return [""] * 4
    return [
        seconds(row["times"][OURS]["median_seconds"] / row["case"]["batch"]),
        _ratio(row, _torch(row)),
        _ratio(row, ["scipy"]),
        f"{row['fraction_of_fma']:.0%}" if "fraction_of_fma" in row else "",
    ]


def _torch(row: Row) -> list[str]:
    return [name for name in row["ratios"] if name != "scipy"]


def _ratio(row: Row, names: Sequence[str]) -> str:
    """The fastest of ``names`` over ours."""
    found = [row["ratios"][name] for name in names if name in row["ratios"]]
    return f"{ratio(min(found))} x" if found else ""


def _time(row: Row, name: str) -> str:
    times = row.get("times", {})
    return seconds(times[name]["median_seconds"]) if name in times else "failed"


def _net(row: Row) -> str:
    return f"{row['case']['net']}, {row['case']['batch']}"


def _step_cells(row: Row) -> list[str]:
    ratios = row.get("ratios", {})
    cost = ratios.get("back-propagation")
    return [
        _net(row),
        _time(row, OURS),
        _time(row, "back-propagation"),
        "" if cost is None else ratio(1 / cost),
        _time(row, "torch.linalg"),
        _ratio(row, ["torch.linalg"]) if ratios else "",
    ]


def _fixed(row: Row, axis: str) -> str:
    """The kernel, and what is the same along the axis."""
    case = row["case"]
    same = [f"{key} {case[key]}" for key in ("n", "batch") if key in case and key != axis]
    if axis == "n":  # there the batch changes with n
        same = []
    return ", ".join([f"`{case['kernel']}`", *same])


def _peaks(rows: Sequence[Row]) -> list[str]:
    """One sentence per kernel on its peak memory, from the first row that has it."""
    found = {}
    for row in rows:
        if "tensor_peak_bytes" in row:
            found.setdefault(row["question"], row)
    sentences = []
    for question, row in found.items():
        process = row.get("process_peak_bytes", {})
        sizes = {name: process.get(name) or size for name, size in row["tensor_peak_bytes"].items()}
        listed = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.items())
        case = row["case"]
        about = ", ".join(f"{key} {case[key]}" for key in ("n", "m", "batch") if key in case)
        sentences.append(
            f"Peak memory of {_TITLES[question]} beyond its inputs ({about}, {case['dtype']}): "
            f"{listed}."
        )
    return sentences


def _residuals(rows: Sequence[Row]) -> str:
    """The worst of ours over all cases, in units of n eps."""
    worst: dict[str, float] = {}
    for row in rows:
        if "times" in row and "eps" in row["residual"]:
            title = _TITLES[row["question"]]
            error = row["worst_scaled_residual"][OURS]
            worst[title] = max(error, worst.get(title, 0.0))
    listed = ", ".join(f"{title} {error:.2g}" for title, error in worst.items())
    return f"Worst scaled residual over all systems (unit: n times eps): {listed}."


def _where(result: Result) -> str:
    m, rates = result["machine"], result["rates"]
    limits = ", ".join(f"{name} {rate['fma_gflops']:.0f} GF/s" for name, rate in rates.items())
    copy = next(iter(rates.values()))["copy_gbytes_per_second"] if rates else 0.0
    peers = [
        entry["repeats"]
        for row in result["rows"]
        for name, entry in row.get("times", {}).items()
        if name != OURS
    ]
    fewest = f", of slow peers at least {min(peers)}" if peers and min(peers) < 20 else ""
    ours = min(row["times"][OURS]["repeats"] for row in result["rows"] if "times" in row)
    return (
        f"Medians of at least {ours} repeats{fewest}, all in turn on rotating inputs; x: the "
        "peer's time over ours. FMA loop: "
        f"{limits}; copy: {copy:.0f} GB/s. {m['date']}, {m['cpu']}, threads: {m['threads']}, "
        f"{m['simd']}, torch {m['torch']}, Python {m['python']}."
    )
