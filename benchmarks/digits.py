"""Back-propagation, back-matching and what lies between them on the digits: stored comparisons.

    python benchmarks/digits.py              # run all, store results/digits_*.json and .png
    python benchmarks/digits.py mlp          # one of them
    python benchmarks/digits.py --readme     # put the stored tables into README.md, run nothing

Each comparison is one call of ``backmatch compare`` (docs/compare.md says what is the same for all
methods); the stored file is its ``compare.json`` without the curves of the tuning runs, whose
scores stand beside the methods.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import stored

from backmatch.cli import main as backmatch
from backmatch.comparing import figure, table

#: Plain SGD needs more seeds than the default to find its rate, and one between 0.2 and 0.5.
_TUNING = ["--tuning-seeds", "8", "--rates", "bp-sgd=0.1,0.2,0.3,0.5,1"]
COMPARISONS = {
    "mlp": ["--threads", "1", *_TUNING],
    "undamped": ["--threads", "1", "--methods", "exact,exact-undamped", "--rates", "1"],
    "cnn": ["--model", "cnn", "--epochs", "3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)}")
    parser.add_argument("--readme", action="store_true", help="put stored tables into README.md")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(COMPARISONS)
    if unknown:
        parser.error(f"expected names of {', '.join(COMPARISONS)}, got {', '.join(unknown)}")
    for name in arguments.names or COMPARISONS:
        if arguments.readme:
            stored.insert(readme(json.loads(path(name).read_text())), f"digits_{name}")
        else:
            measure(name)


def path(name: str) -> Path:
    return stored.RESULTS / f"digits_{name}.json"


def measure(name: str) -> None:
    """Run one comparison and store it with its figure."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if backmatch(["compare", *COMPARISONS[name], "--out", str(out)]) != 0:
            raise SystemExit(f"{name}: not stored")
        result = json.loads((out / "compare.json").read_text())
    result["runs"] = [run for run in result["runs"] if run["kind"] == "final"]
    path(name).write_text(json.dumps(result) + "\n")
    path(name).with_suffix(".png").write_bytes(figure.draw(result))


def readme(result: dict[str, Any]) -> str:
    """The table and its notes, without what docs/compare.md explains."""
    notes = [f"- {note}" for note in (*table.notes(result), table.TUNED)]
    return "\n".join([*table.markdown_rows(result), "", *notes])


if __name__ == "__main__":
    main()
