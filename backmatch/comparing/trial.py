"""One net trained with one method, one rate and one seed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BackMatchError, ConvergenceWarning, NonFiniteError
from ..training import optimizers
from ..training.config import TrainConfig
from ..training.data import Dataset
from ..training.loop import Trainer
from ..training.run import assemble

#: Of the training set one sample in so many is held out while rates are chosen.
HELD_OUT = 5


class StoppedError(Exception):
    """A signal came: the run in progress is given up."""


def held_out(data: Dataset) -> Dataset:
    """The training set in two parts, the smaller one in the place of the test set.

    Every fifth sample of a class goes to the smaller part, whichever order the file has; the draw
    is the same for all seeds. The test set takes no part.
    """
    labels = data.y_train.cpu().numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    out = np.zeros(len(labels), dtype=bool)
    out[order[HELD_OUT // 2 :: HELD_OUT]] = True
    kept, apart = (
        torch.from_numpy(np.flatnonzero(part)).to(data.y_train.device) for part in (~out, out)
    )
    return dataclasses.replace(
        data,
        x_train=data.x_train[kept],
        y_train=data.y_train[kept],
        x_test=data.x_train[apart],
        y_test=data.y_train[apart],
    )


def run(
    config: TrainConfig,
    data: Dataset,
    *,
    evaluate_at: Collection[int],
    timed: bool,
    most_steps: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train from the seed's weights to the end, or until it diverges; the fields of one run.

    Args:
        config: all options, the rate and the seed among them.
        data: evaluated on its ``x_test``.
        evaluate_at: step numbers; 0 is before the first step.
        timed: take one step with another net first, so that caches and threads are warm.
        most_steps: end earlier; ``None``: at the end of the last epoch.
        check_stop: called after every step; raises to give the run up.
    """
    if timed:
        with _counted_warnings():
            _warm_up(config, data)
    with assembled(config, data) as trainer:
        return _run(trainer, evaluate_at, most_steps, check_stop)


@contextmanager
def assembled(config: TrainConfig, data: Dataset) -> Iterator[Trainer]:
    """A run at step 0; the hooks of its optimizer are off again afterwards."""
    trainer = assemble(config, data)
    try:
        yield trainer
    finally:
        optimizers.close(trainer.optimizer)


def _run(
    trainer: Trainer,
    evaluate_at: Collection[int],
    most_steps: int | None,
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    config = trainer.config
    row: dict[str, Any] = {
        "lr": config.lr,
        "seed": config.seed,
        "weights_sha256": digest(trainer.model),
        **{name: [] for name in ("train_loss", "steps", "accuracy", "loss")},
        **{name: [] for name in ("training_seconds", "step_ms")},
        "unconverged_steps": 0,
        "error": None,
    }
    try:
        if 0 in evaluate_at:
            _evaluate(trainer, row)
        with _counted_warnings():
            for x, y in itertools.islice(_batches(trainer), most_steps):
                _step(trainer, row, x, y)
                if len(row["step_ms"]) in evaluate_at:
                    _evaluate(trainer, row)
                check_stop()
    except BackMatchError as error:
        row["error"] = f"after {len(row['train_loss'])} steps: {error}"
    return row


@contextmanager
def _counted_warnings() -> Iterator[None]:
    """Solves that stop at their cap are counted in the row; a warning per run would bury all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _batches(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(trainer.config.epochs):
        yield from trainer.batches(epoch)


def _step(trainer: Trainer, row: dict[str, Any], x: Tensor, y: Tensor) -> None:
    trainer.model.train()
    began = time.perf_counter()
    trainer.optimizer.zero_grad()
    result = trainer.method(x, y)
    trainer.optimizer.step()
    _synchronize(x.device)
    row["step_ms"].append(round(1e3 * (time.perf_counter() - began), 4))
    row["train_loss"].append(result.loss)
    row["unconverged_steps"] += not result.log.get("converged", True)


def _evaluate(trainer: Trainer, row: dict[str, Any]) -> None:
    loss, accuracy = trainer.test()
    if not abs(loss) < float("inf"):
        raise NonFiniteError("loss on the samples for evaluation", 1, 1)
    row["steps"].append(len(row["step_ms"]))
    row["accuracy"].append(accuracy)
    row["loss"].append(loss)
    row["training_seconds"].append(round(sum(row["step_ms"]) / 1e3, 6))


def _warm_up(config: TrainConfig, data: Dataset) -> None:
    with assembled(config, data) as trainer, suppress(BackMatchError):  # the run will tell
        x, y = next(trainer.batches(0))
        trainer.method(x, y)
        trainer.optimizer.step()
        _synchronize(x.device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def digest(model: nn.Module) -> str:
    """SHA-256 over the parameters: equal for runs that begin with the same weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()
