"""What the benchmarks share: the head of a stored result, README tables, and kernels' runs."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from backmatch.bench.machine import cpu_name
from backmatch.training.loop import versions

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results", HERE.parent / "README.md"
PERFORMANCE = HERE.parent / "docs" / "performance.md"

Result = dict[str, Any]


def machine() -> dict[str, Any]:
    """Processor, threads, date and versions."""
    date, threads = datetime.date.today().isoformat(), torch.get_num_threads()
    python = platform.python_version()
    return {"cpu": cpu_name(), "threads": threads, "date": date, "python": python, **versions()}


def insert(text: str, name: str, document: Path = README) -> None:
    """Put text between the markers of that name in a document."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document}: the markers {begin} and {end} are missing")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation and the values themselves."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values), "runs": values}


def run(
    name: str,
    questions: Sequence[str],
    tables: Callable[[Result], str],
    about: str,
    document: Path = README,
) -> None:
    """The command line of kernels.py, step.py and scaling.py.

    Args:
        name: stem of the stored file and name of the markers.
        questions: of ``backmatch bench``.
        tables: stored result -> Markdown.
        about: the file's docstring.
        document: where ``--readme`` puts the tables.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's number")
    parser.add_argument("--quick", action="store_true", help="a small trial; stores nothing")
    parser.add_argument(
        "--readme", action="store_true", help=f"put the stored tables into {document.name}"
    )
    arguments = parser.parse_args()
    path = RESULTS / f"{name}.json"
    if arguments.readme:
        insert(tables(json.loads(path.read_text())), name, document)
        return
    result = measure(questions, threads=arguments.threads, quick=arguments.quick)
    if arguments.quick:
        print(tables(result))
        return
    store(result, path)


def measure(questions: Sequence[str], *, threads: int | None, quick: bool) -> Result:
    """All cases of the questions on the CPU, in both dtypes; tables are printed on the way."""
    from backmatch.bench import options, report, run

    chosen = options.BenchOptions(quick=quick, only=tuple(questions), threads=threads, device="cpu")
    result, failure = run.collect(run.settle(chosen), report.show)
    if failure is not None:
        raise SystemExit(f"not stored: {failure}")
    print(report.summary(result["machine"]))
    return result


def store(result: Result, path: Path) -> None:
    """Write the result, and the figure beside it if the result has one."""
    from backmatch.bench import figure, run

    path.write_bytes(run.to_json(result))
    curves = [row for row in result["rows"] if row["question"] in run.SIZED]
    if curves and (content := figure.draw(curves)) is not None:
        path.with_suffix(".png").write_bytes(content)
