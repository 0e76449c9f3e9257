"""Test accuracy and step time of exact back-matching beside back-propagation, on the digits.

    python benchmarks/digits.py            # run, store results/digits.json, print the table
    python benchmarks/digits.py --readme   # put the stored table into README.md, run nothing

A 64-128-128-10 ReLU net, batch 128, 5 epochs of 11 steps, the test set that
``backmatch train --data digits`` uses. Every method sees the same initial weights and the same
batches for a seed. Methods with several learning rates choose theirs on 280 samples held out of
the training set (best mean accuracy after 5 epochs, seeds of their own); the test set is looked at
once, with that choice. Methods take turns within a seed, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backmatch.training.config import resolve
from backmatch.training.data import Dataset, batches
from backmatch.training.loop import Trainer, versions
from backmatch.training.run import create_trainer, settle

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results" / "digits.json", HERE.parent / "README.md"
BEGIN, END = "<!-- digits: begin -->", "<!-- digits: end -->"
SEEDS, TUNING_SEEDS = range(10), range(100, 103)
EPOCHS, HELD_OUT = 5, 280


@dataclass(frozen=True)
class Method:
    """One row of the table: options of ``backmatch train`` and the rates to choose from."""

    title: str
    options: dict[str, Any]
    rates: tuple[float, ...] = (1.0,)


SGD_RATES = (0.1, 0.2, 0.3, 0.5, 1.0)
METHODS = (
    Method("back-propagation, SGD", {"method": "bp", "momentum": 0.0}, SGD_RATES),
    Method(
        "back-propagation, SGD, momentum 0.9",
        {"method": "bp", "momentum": 0.9},
        (0.05, 0.1, 0.2, 0.3),
    ),
    Method(
        "back-propagation, Adam",
        {"method": "bp", "optimizer": "adam"},
        (0.003, 0.01, 0.03, 0.1),
    ),
    Method("**exact weights and inputs** (defaults)", {}),
    Method("exact weights only, inputs `Gradient`", {"inputs": "gradient"}, (0.03, 0.1, 0.3, 1.0)),
    Method("exact inputs only, weights `Gradient`", {"weights": "gradient"}, SGD_RATES),
    Method("exact both, damping `rel:1e-4`", {"damping": "rel:1e-4"}),
    Method(
        "`Scalar` on both sides", {"weights": "scalar", "inputs": "scalar"}, (1e-4, 1e-3, 1e-2, 0.1)
    ),
)


@dataclass(frozen=True)
class Run:
    """One training: test accuracy after each epoch, and the time of each warm step."""

    accuracy: list[float]
    step_ms: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--readme", action="store_true", help="put the stored table into README.md")
    arguments = parser.parse_args()
    if arguments.readme:
        insert(table(json.loads(RESULTS.read_text())))
        return
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def measure() -> dict[str, Any]:
    """Choose the rates, train every method with every seed, and summarise."""
    rates = [choose_rate(method) for method in METHODS]
    runs: list[list[Run]] = [[] for _ in METHODS]
    for seed in SEEDS:
        for i, method in enumerate(METHODS):
            trainer = create(method, rates[i], seed)
            runs[i].append(train(trainer, trainer.data))
        print(f"seed {seed} of {len(SEEDS)} done", flush=True)
    rows = [summarize(*row) for row in zip(METHODS, rates, runs, strict=True)]
    return {"machine": machine(), "epochs": EPOCHS, "seeds": list(SEEDS), "rows": rows}


def create(method: Method, rate: float, seed: int) -> Trainer:
    """A fresh net and optimizer; the seed fixes initial weights and sample order."""
    options = {"lr": rate, "seed": seed, "epochs": EPOCHS, "device": "cpu", **method.options}
    return create_trainer(settle(resolve(options)))


def choose_rate(method: Method) -> float:
    """The rate with the best mean accuracy on the held-out part of the training set."""
    if len(method.rates) == 1:
        return method.rates[0]
    scores = {rate: validate(method, rate) for rate in method.rates}
    print(method.title, {rate: round(score, 4) for rate, score in scores.items()}, flush=True)
    return max(scores, key=lambda rate: scores[rate])


def validate(method: Method, rate: float) -> float:
    """Mean held-out accuracy after the last epoch; 0 where a run leaves the finite numbers."""
    finals = []
    for seed in TUNING_SEEDS:
        trainer = create(method, rate, seed)
        try:
            finals.append(train(trainer, held_out(trainer.data)).accuracy[-1])
        except ArithmeticError:  # NonFiniteError
            finals.append(0.0)
    return statistics.fmean(finals)


def held_out(data: Dataset) -> Dataset:
    """The training set split in two; the test set takes no part."""
    x, y, cut = data.x_train, data.y_train, len(data.x_train) - HELD_OUT
    return dataclasses.replace(
        data, x_train=x[:cut], y_train=y[:cut], x_test=x[cut:], y_test=y[cut:]
    )


def train(trainer: Trainer, data: Dataset) -> Run:
    """All epochs; steps of the first one warm caches and threads up and are not timed."""
    config, accuracy, step_ms = trainer.config, [], []
    for epoch in range(EPOCHS):
        trainer.model.train()
        for x, y in batches(
            data, batch_size=config.batch_size, seed=config.seed, epoch=epoch, start=0
        ):
            began = time.perf_counter()
            trainer.optimizer.zero_grad()
            trainer.method(x, y)
            trainer.optimizer.step()
            if epoch > 0:
                step_ms.append(1e3 * (time.perf_counter() - began))
        accuracy.append(test_accuracy(trainer.model, data))
    return Run(accuracy, step_ms)


@torch.no_grad()
def test_accuracy(model: torch.nn.Module, data: Dataset) -> float:
    model.eval()
    return float((model(data.x_test).argmax(1) == data.y_test).double().mean())


def summarize(method: Method, rate: float, runs: list[Run]) -> dict[str, Any]:
    times = [ms for run in runs for ms in run.step_ms]
    deciles = statistics.quantiles(times, n=10)
    return {
        "method": method.title,
        "options": {"lr": rate, **method.options},
        "rates_tried": list(method.rates),
        "epoch_1": spread([run.accuracy[0] for run in runs]),
        "epoch_5": spread([run.accuracy[-1] for run in runs]),
        "step_ms": dict(zip(("decile_1", "median", "decile_9"), deciles[::4], strict=True)),
    }


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values), "runs": values}


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **versions(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The model name where Linux tells it, else the architecture."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def table(results: dict[str, Any]) -> str:
    """The Markdown table and one line on where it was measured."""
    lines = [
        "| method | lr | after 1 epoch | after 5 epochs | ms per step |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        one, five, ms = row["epoch_1"], row["epoch_5"], row["step_ms"]
        accuracies = " | ".join(f"{e['mean']:.3f} ± {e['sd']:.3f}" for e in (one, five))
        times = f"{ms['median']:.1f} ({ms['decile_1']:.1f} to {ms['decile_9']:.1f})"
        lines.append(f"| {row['method']} | {row['options']['lr']:g} | {accuracies} | {times} |")
    m = results["machine"]
    where = (
        f"Mean ± standard deviation over seeds {results['seeds'][0]} to {results['seeds'][-1]}; "
        f"median step (first to ninth decile). {m['date']}, {m['cpu']}, {m['threads']} threads, "
        f"torch {m['torch']}, Python {m['python']}, float32."
    )
    return "\n".join([*lines, "", where])


def insert(text: str) -> None:
    """Replace what stands between the markers in README.md."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README}: markers {BEGIN} and {END} not found")
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
