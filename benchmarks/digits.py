"""Test accuracy and step time of exact back-matching beside back-propagation, on the digits.

    python benchmarks/digits.py            # run, store results/digits.json, print the table
    python benchmarks/digits.py --readme   # put the stored table into README.md, run nothing

A 64-128-128-10 ReLU net, batch 128, 5 epochs of 11 steps, data as ``backmatch train`` has them. A
seed gives every method the same initial weights and batches. Where there are several learning
rates, the one with the best mean accuracy after 5 epochs on 280 samples held out of the training
set is taken, with seeds of its own; the test set is looked at once, with that choice. Methods
take turns within a seed, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import stored
import torch

from backmatch.errors import NonFiniteError
from backmatch.training.config import resolve
from backmatch.training.data import Dataset, batches
from backmatch.training.loop import Trainer
from backmatch.training.run import create_trainer, settle

RESULTS = stored.RESULTS / "digits.json"
SEEDS, TUNING_SEEDS = range(10), range(100, 103)
EPOCHS, BATCH, HELD_OUT = 5, 128, 280


@dataclass(frozen=True)
class Method:
    """One row of the table: options of ``backmatch train`` and the rates to choose from."""

    title: str
    options: dict[str, Any]
    rates: tuple[float, ...] = (1.0,)


BP, ADAM = {"method": "bp"}, {"method": "bp", "optimizer": "adam"}
SCALAR = {"weights": "scalar", "inputs": "scalar"}
SGD_RATES = (0.1, 0.2, 0.3, 0.5, 1.0)
METHODS = (
    Method("back-propagation, SGD", {**BP, "momentum": 0.0}, SGD_RATES),
    Method("back-propagation, SGD, momentum 0.9", {**BP, "momentum": 0.9}, (0.05, *SGD_RATES)),
    Method("back-propagation, Adam", ADAM, (0.003, 0.01, 0.03, 0.1)),
    Method("**exact weights and inputs** (defaults)", {}),
    Method("exact weights only, inputs `Gradient`", {"inputs": "gradient"}),
    Method("the same, lr chosen", {"inputs": "gradient"}, (0.03, 0.1, 0.3, 1.0)),
    Method("exact inputs only, weights `Gradient`, lr chosen", {"weights": "gradient"}, SGD_RATES),
    Method("exact both, damping `rel:1e-4`", {"damping": "rel:1e-4"}),
    Method("`Scalar` on both sides, lr chosen", SCALAR, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
)


#: Test accuracy after each epoch of a training, and the milliseconds of each warm step.
Run = tuple[list[float], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--readme", action="store_true", help="put the stored table into README.md")
    arguments = parser.parse_args()
    if arguments.readme:
        stored.insert(table(json.loads(RESULTS.read_text())), "digits")
        return
    torch.set_num_threads(arguments.threads)
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def measure() -> dict[str, Any]:
    """Choose the rates, train every method with every seed, and summarise."""
    rates = [choose_rate(method) for method in METHODS]
    runs: list[list[Run]] = [[] for _ in METHODS]
    for seed in SEEDS:
        for method, rate, done in zip(METHODS, rates, runs, strict=True):
            trainer = create(method, rate, seed)
            done.append(train(trainer, trainer.data))
        print(f"seed {seed} of {len(SEEDS)} done", flush=True)
    rows = [summarize(*row) for row in zip(METHODS, rates, runs, strict=True)]
    return {"machine": stored.machine(), "epochs": EPOCHS, "seeds": list(SEEDS), "rows": rows}


def create(method: Method, rate: float, seed: int) -> Trainer:
    """A fresh net and optimizer; the seed fixes initial weights and sample order."""
    options = {"lr": rate, "seed": seed, "batch_size": BATCH, "device": "cpu", **method.options}
    return create_trainer(settle(resolve(options)))


def choose_rate(method: Method) -> float:
    """The rate with the best mean accuracy on the held-out part of the training set."""
    scores = dict.fromkeys(method.rates, 0.0)
    for rate, seed in itertools.product(method.rates if len(scores) > 1 else (), TUNING_SEEDS):
        trainer = create(method, rate, seed)
        with contextlib.suppress(NonFiniteError):  # a rate that diverges scores 0
            scores[rate] += train(trainer, held_out(trainer.data))[0][-1]
    return max(scores, key=lambda rate: scores[rate])


def held_out(data: Dataset) -> Dataset:
    """The training set split in two; the test set takes no part."""
    (x, x_test), (y, y_test) = (
        (part[:-HELD_OUT], part[-HELD_OUT:]) for part in (data.x_train, data.y_train)
    )
    return Dataset(x, y, x_test, y_test, data.classes)


def train(trainer: Trainer, data: Dataset) -> Run:
    """All epochs; steps of the first one warm caches and threads up and are not timed."""
    accuracy, step_ms, seed = [], [], trainer.config.seed
    for epoch in range(EPOCHS):
        trainer.model.train()
        for x, y in batches(data, batch_size=BATCH, seed=seed, epoch=epoch, start=0):
            began = time.perf_counter()
            trainer.optimizer.zero_grad()
            trainer.method(x, y)
            trainer.optimizer.step()
            if epoch > 0:
                step_ms.append(1e3 * (time.perf_counter() - began))
        accuracy.append(test_accuracy(trainer.model, data))
    return accuracy, step_ms


@torch.no_grad()
def test_accuracy(model: torch.nn.Module, data: Dataset) -> float:
    model.eval()
    return float((model(data.x_test).argmax(1) == data.y_test).double().mean())


def summarize(method: Method, rate: float, runs: list[Run]) -> dict[str, Any]:
    deciles = statistics.quantiles([ms for _, times in runs for ms in times], n=10)
    return {
        "method": method.title,
        "options": {"lr": rate, **method.options},
        "rates_tried": list(method.rates),
        "epoch_1": stored.spread([accuracy[0] for accuracy, _ in runs]),
        "epoch_5": stored.spread([accuracy[-1] for accuracy, _ in runs]),
        "step_ms": dict(zip(("decile_1", "median", "decile_9"), deciles[::4], strict=True)),
    }


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
        f"median step (first to ninth decile). {m['date']}, {m['cpu']}, threads: {m['threads']}, "
        f"torch {m['torch']}, Python {m['python']}, float32."
    )
    return "\n".join([*lines, "", where])


if __name__ == "__main__":
    main()
