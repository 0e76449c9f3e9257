"""The studies of ``backmatch analyze``, stored with their figure.

python benchmarks/analysis.py            # run, store results/analysis.json and .png
python benchmarks/analysis.py --readme   # put the table into README.md, run nothing
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import stored

from backmatch.cli import main as backmatch

RESULTS = stored.RESULTS / "analysis.json"
#: What a row of the README's table is called, and its block on the input and on the weight side:
#: study and what identifies the row there.
ROWS: tuple[tuple[str, dict[str, Any] | None, dict[str, Any] | None], ...] = (
    (
        "Wz, W Gaussian",
        {"study": "init", "scheme": "gaussian", "activation": "none"},
        {"study": "init", "scheme": "gaussian", "activation": "none"},
    ),
    (
        "Wz, W orthonormal",
        {"study": "init", "scheme": "orthonormal", "activation": "none"},
        {"study": "init", "scheme": "orthonormal", "activation": "none"},
    ),
    *(
        (
            f"z + {a}Wz",
            {"study": "skip", "block": "z + aWz", "weight": a},
            {"study": "skip", "block": "z + aWz", "weight": a} if a != 0.25 else None,
        )
        for a in (0.1, 0.25, 0.5)
    ),
    *(
        (title, None, {"study": "norm", "inputs": "uniform", "form": form, "bias": False})
        for title, form in (
            ("Wz on centred inputs", "centred"),
            ("Wz on batch-normalised inputs", "batch norm before"),
        )
    ),
    (
        "batch norm behind Wz",
        {"study": "norm", "form": "batch norm behind", "scheme": "gaussian", "inputs": "uniform"},
        {"study": "norm", "form": "batch norm behind", "scheme": "gaussian", "inputs": "uniform"},
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    if parser.parse_args().readme:
        stored.insert(table(json.loads(RESULTS.read_text())), "analysis")
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if backmatch(["analyze", "--out", str(out)]) != 0:
            raise SystemExit("not stored")
        for name in ("analysis.json", "analysis.png"):
            (stored.RESULTS / name).write_bytes((out / name).read_bytes())


def table(result: dict[str, Any]) -> str:
    """Median condition numbers of one block on both sides, and where they were computed."""
    lines = ["| block, n = 64 | input side, kappa | weight side, kappa |", "|---|---:|---:|"]
    for title, on_input, on_weight in ROWS:
        cells = [_median(result, on_input, "input"), _median(result, on_weight, "weight")]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    size = {result["studies"][name]["options"]["size"] for name in ("init", "skip", "norm")}
    if size != {64}:
        raise SystemExit(f"the table says n = 64, the stored studies have {size}")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"{versions}, threads: {result['threads']}, float64."])


def _median(result: dict[str, Any], case: dict[str, Any] | None, side: str) -> str:
    if case is None:
        return ""
    wanted = {**case, "side": side}
    rows = result["studies"][wanted.pop("study")]["rows"]
    found = [row for row in rows if wanted.items() <= row["case"].items()]
    if len(found) != 1:
        raise SystemExit(f"expected one row of {wanted}, found {len(found)}")
    value = found[0]["kappa"]["median"]
    return f"{value:.3g}" if value < 1000 else f"{value:.2e}".replace("e+0", "e")


if __name__ == "__main__":
    main()
