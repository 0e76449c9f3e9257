"""All runs of a comparison in turn: those that a folder holds are not done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..training.data import Dataset
from ..training.failures import RunError
from . import summary, trial
from .folder import CompareFolder
from .methods import find
from .options import CompareOptions
from .progress import Progress
from .tuning import MOST_ADDED, Choice, Score, choose

#: Evaluations per epoch where the user asks for nothing else.
PER_EPOCH = 20


class Comparison:
    """A comparison in progress.

    Attributes:
        steps_per_epoch: on the full training set.
        total_steps: of a final run.
    """

    def __init__(
        self,
        options: CompareOptions,
        data: Dataset,
        folder: CompareFolder,
        shown: Progress,
        check_stop: Callable[[], None],
    ) -> None:
        self.options, self.data, self.folder = options, data, folder
        self._shown, self._check_stop = shown, check_stop
        self._apart = trial.held_out(data)
        self._done = {_key(run): run for run in folder.runs}
        self.steps_per_epoch, self.total_steps = steps(options, data)

    def run(self) -> list[Choice]:
        """Choose all rates, then train every method with every seed; returns the choices.

        The methods take turns within a seed, and begin with another one in each, so that a machine
        that is busy for a while disturbs all alike.

        Raises:
            StoppedError: a signal came.
            RunError: memory or the disk is full.
        """
        names = self.options.methods
        choices = {name: self._choose(name) for name in names}
        for turn, seed in enumerate(self.options.seeds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                self._need("final", name, choices[name].lr, seed)
            self._shown.seed(seed, [self._get("final", n, choices[n].lr, seed) for n in names])
        return [choices[name] for name in names]

    def _choose(self, name: str) -> Choice:
        grid, extend = self.options.grid(name), self.options.may_extend(name)
        choice = choose(grid, lambda rate: self._score(name, rate), extend)
        if choice.scores:
            self._shown.chosen(name, choice)
        return choice

    def _score(self, name: str, rate: float) -> Score:
        runs = [self._need("tuning", name, rate, seed) for seed in self.options.tuning_seeds]
        sound = [run for run in runs if run["error"] is None]
        accuracy = (0.0 if run["error"] else run["accuracy"][-1] for run in runs)
        return Score(rate, tuple(accuracy), tuple(run["loss"][-1] for run in sound))

    def _get(self, *key: Any) -> dict[str, Any]:
        return self._done[key]

    def _need(self, kind: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        key = (kind, name, rate, seed)
        if key not in self._done:
            self._shown.begin(kind, name, rate, seed)
            self._done[key] = {"kind": kind, "method": name, **self._train(*key)}
            self.folder.add(self._done[key])
        self._shown.done(kind)
        return self._done[key]

    def _train(self, kind: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        final = kind == "final"
        data = self.data if final else self._apart
        try:
            return trial.run(
                self.options.config(name, rate, seed),
                data,
                evaluate_at=self._evaluations(data, final),
                timed=final,
                check_stop=self._check_stop,
            )
        except torch.OutOfMemoryError:
            raise RunError(
                f"{name}, lr {rate:g}, seed {seed}: the device is out of memory; "
                "lower --batch-size, or leave the method out with --methods"
            ) from None

    def _evaluations(self, data: Dataset, final: bool) -> set[int]:
        """Steps at which a run is evaluated: the held-out samples only count after the last."""
        per_epoch, total = steps(self.options, data)
        if not final:
            return {total}
        every = self.options.evaluate_every or max(1, per_epoch // PER_EPOCH)
        return {*range(0, total + 1, every), *range(0, total + 1, per_epoch)}


def steps(options: CompareOptions, data: Dataset) -> tuple[int, int]:
    """Steps of an epoch and of a whole run."""
    per_epoch = len(data.x_train) // int(options.shared["batch_size"])
    return per_epoch, per_epoch * int(options.shared["epochs"])


def count(options: CompareOptions) -> tuple[int, int, int]:
    """Tuning runs at least and at most, and final runs."""
    least = most = 0
    for name in options.methods:
        grid = len(options.grid(name))
        if grid > 1:
            added = MOST_ADDED if options.may_extend(name) else 0
            least += grid * len(options.tuning_seeds)
            most += (grid + added) * len(options.tuning_seeds)
    return least, most, len(options.methods) * len(options.seeds)


def plan(options: CompareOptions, data: Dataset) -> str:
    """``12 methods, 5 seeds: 72 to 144 tuning runs of 40 steps, 60 runs of 55 steps``."""
    least, most, final = count(options)
    tuning = f"{least} to {most}" if most > least else str(least)
    parts = [f"{final} runs of {steps(options, data)[1]} steps"]
    if most:
        parts.insert(0, f"{tuning} tuning runs of {steps(options, trial.held_out(data))[1]} steps")
    counted = [_counted(options.methods, "method"), _counted(options.seeds, "seed")]
    return f"{', '.join(counted)}: {', '.join(parts)}"


def _counted(things: list[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def collect(comparison: Comparison, choices: list[Choice]) -> dict[str, Any]:
    """The content of ``compare.json``, see :mod:`backmatch.comparing`."""
    options, runs = comparison.options, comparison.folder.runs
    head = {key: value for key, value in comparison.folder.head.items() if key != "kind"}
    goal = summary.target(options.as_dict(), runs, comparison.total_steps)
    rows = []
    for name, choice in zip(options.methods, choices, strict=True):
        config = options.config(name, choice.lr).as_dict()
        del config["seed"]
        final = sorted(summary.of(runs, name), key=lambda run: options.seeds.index(run["seed"]))
        rows.append(
            {
                "name": name,
                "title": find(name).title,
                "options": config,
                "lr": choice.lr,
                "edge": choice.edge,
                "tuning": [score.as_dict() for score in choice.scores],
                "tuning_runs": len(choice.scores) * len(options.tuning_seeds),
                "summary": summary.summarize(
                    final,
                    goal=goal["accuracy"],
                    epochs=options.report_epochs,
                    steps_per_epoch=comparison.steps_per_epoch,
                ),
            }
        )
    return {
        **head,
        "steps_per_epoch": comparison.steps_per_epoch,
        "total_steps": comparison.total_steps,
        "target": goal,
        "methods": rows,
        "runs": runs,
    }


def _key(run: dict[str, Any]) -> tuple[str, str, float, int]:
    return run["kind"], run["method"], run["lr"], run["seed"]
