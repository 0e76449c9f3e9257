"""The training loop: steps, one evaluation and one checkpoint per epoch, and a clean stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .. import __version__
from ..errors import BackMatchError, NonFiniteError
from . import checkpoint, schedules
from .config import TrainConfig
from .data import Dataset, batches
from .failures import RunError, UsageError
from .interrupts import Interrupts
from .methods import Method
from .options import BY_NAME, SCALED_OPTIMIZERS
from .probes import Probes
from .progress import Progress
from .rundir import RunFolder

#: Test samples per forward pass, and numbers in them: bounds the memory of an evaluation.
EVALUATION_CHUNK, EVALUATION_NUMBERS = 4096, 2**20


@dataclass
class Position:
    """How far a run has come; together with the tensors it is all that a checkpoint needs.

    Attributes:
        step: optimizer steps taken.
        loss_sum: sum of the batch losses of the epoch in progress.
        correct: samples of that epoch that were classified rightly before their step.
        elapsed_seconds: training time so far, over all resumptions, without that of probes.
        probe_seconds: time of the probes.
    """

    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    elapsed_seconds: float = 0.0
    probe_seconds: float = 0.0


class Trainer:
    """One run in progress.

    Attributes:
        position: how far it has come.
        total: optimizer steps of the whole run.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        method: Method,
        probes: Probes | None = None,
    ) -> None:
        self.config, self.data = config, data
        self.model, self.optimizer, self.method = model, optimizer, method
        self.probes = probes
        self.position = Position()
        self._per_epoch = len(data.x_train) // config.batch_size
        self.total = self._per_epoch * config.epochs
        self._digest = data.digest()
        self._schedule = schedules.create(config.schedule, optimizer, self.total)

    def train(self, folder: RunFolder, progress: Progress, interrupts: Interrupts) -> bool:
        """Go on to the end, or to the first signal; returns whether the end was reached.

        Raises:
            RunError: a step failed, or the disk took no more.
        """
        while self.position.step < self.total and interrupts.received is None:
            began = self._training_clock() - self.position.elapsed_seconds
            self._epoch(folder, progress, interrupts)
            self.position.elapsed_seconds = self._training_clock() - began
            if self.position.step % self._per_epoch == 0:
                row = self._evaluate()
                self.position.elapsed_seconds = self._training_clock() - began
                row["elapsed_seconds"] = round(self.position.elapsed_seconds, 3)
                folder.log(row)
                # The time left is a matter of the wall clock, probes included.
                wall = self.position.elapsed_seconds + self.position.probe_seconds
                progress.evaluation(row["epoch"], row, wall)
            folder.sync()
            checkpoint.save(folder.path, self._state(folder.size))
        return self.position.step == self.total

    def _training_clock(self) -> float:
        """A clock that stands still while a step is probed."""
        return time.perf_counter() - self.position.probe_seconds

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the run sees in an epoch (counted from 0) from position ``start`` on."""
        return batches(
            self.data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            start=start,
            augment=self.config.augment == "standard",
        )

    def _epoch(self, folder: RunFolder, progress: Progress, interrupts: Interrupts) -> None:
        epoch, start = divmod(self.position.step, self._per_epoch)
        if start == 0:
            self.position.loss_sum, self.position.correct = 0.0, 0
        self.model.train()
        for x, y in self.batches(epoch, start):
            probed = self._probe(x, y, epoch + 1)
            row = self._step(x, y, epoch + 1)
            folder.log(row)
            if probed is not None:
                folder.log(probed)
            progress.step(row["step"], row["train_loss"])
            if interrupts.received is not None:
                return

    def _probe(self, x: torch.Tensor, y: torch.Tensor, epoch: int) -> dict[str, Any] | None:
        """What the probes say of the step to come; their time is none of the training's."""
        if self.probes is None:
            return None
        row = self.probes.look(self.position.step + 1, epoch, x, y)
        self.position.probe_seconds += self.probes.last_seconds
        return row

    def _step(self, x: torch.Tensor, y: torch.Tensor, epoch: int) -> dict[str, Any]:
        number = self.position.step + 1
        began = time.perf_counter()
        try:
            self.optimizer.zero_grad()
            result = self.method(x, y)
            rate = self._schedule.rate()
            self.optimizer.step()
        except (BackMatchError, torch.OutOfMemoryError) as error:
            raise RunError(
                f"step {number} (epoch {epoch}) failed: {self._advice(error)}"
            ) from error
        milliseconds = 1e3 * (time.perf_counter() - began)
        self._schedule.step()
        correct = int((result.output.argmax(1) == y).sum())
        self.position.step = number
        self.position.loss_sum += result.loss
        self.position.correct += correct
        return {
            "kind": "step",
            "step": number,
            "epoch": epoch,
            "train_loss": result.loss,
            "train_accuracy": correct / len(y),
            **rate,
            **result.log,
            "step_ms": round(milliseconds, 3),
        }

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test set; leaves the model in eval mode."""
        self.model.eval()
        loss, correct = 0.0, 0
        count = len(self.data.x_test)
        fitting = max(EVALUATION_NUMBERS // self.data.x_test[0].numel(), 1)
        chunk = min(EVALUATION_CHUNK, fitting)
        for start in range(0, count, chunk):
            x = self.data.inputs(self.data.x_test[start : start + chunk])
            y = self.data.y_test[start : start + chunk]
            output = self.model(x)
            loss += float(cross_entropy(output, y, reduction="sum"))
            correct += int((output.argmax(1) == y).sum())
        return loss / count, correct / count

    def _evaluate(self) -> dict[str, Any]:
        loss, accuracy = self.test()
        epoch = self.position.step // self._per_epoch
        if not abs(loss) < float("inf"):
            failed = self._advice(NonFiniteError("test loss", 1, 1))
            raise RunError(f"evaluation after epoch {epoch} failed: {failed}")
        return {
            "kind": "evaluation",
            "step": self.position.step,
            "epoch": epoch,
            "train_loss": self.position.loss_sum / self._per_epoch,
            "train_accuracy": self.position.correct / (self._per_epoch * self.config.batch_size),
            "test_loss": loss,
            "test_accuracy": accuracy,
        }

    def _advice(self, error: Exception) -> str:
        if isinstance(error, NonFiniteError):
            scaled = self.config.optimizer in SCALED_OPTIMIZERS
            return f"{error}; lower --lr or raise {'--scale-damping' if scaled else '--damping'}"
        if isinstance(error, torch.OutOfMemoryError):
            return "the device is out of memory; lower --batch-size"
        return str(error)

    def _state(self, metrics_bytes: int) -> dict[str, Any]:
        return {
            "config": self.config.as_dict(),
            "versions": versions(),
            "data": self._digest,
            "position": asdict(self.position),
            "metrics_bytes": metrics_bytes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "probes": None if self.probes is None else self.probes.state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.config.device == "cuda" else None,
        }

    def restore(self, state: dict[str, Any], where: str) -> int:
        """Take up a checkpoint; returns the bytes of ``metrics.jsonl`` that it covers.

        Raises:
            UsageError: it was written with other options, versions or data, or by another program.
        """
        try:
            _check_known(self.config, state["config"], where)
            changed = self._changes(state)
            if not changed:
                self._load(state)
            covered = int(state["metrics_bytes"])
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{where}: the checkpoint is none of this program ({type(error).__name__}); "
                "start a new run with --out"
            ) from error
        if changed:
            raise UsageError(
                f"{where}: cannot continue exactly ({'; '.join(changed)}); "
                "undo the change, or start a new run with --out"
            )
        return covered

    def _changes(self, state: dict[str, Any]) -> list[str]:
        changed = [
            f"{name}: the run has {state[part].get(name)}, now {value}"
            for part, now in (("config", self.config.as_dict()), ("versions", versions()))
            for name, value in now.items()
            if state[part].get(name) != value
        ]
        if state["data"] != self._digest:
            changed.append("data: the values are not those the run began with")
        return changed

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self.probes is not None:
            self.probes.restore(state["probes"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.position = Position(**state["position"])


def _check_known(config: TrainConfig, saved: dict[str, Any], where: str) -> None:
    """Refuse a run that was begun before an option existed: its checkpoint lacks that state."""
    missing = [BY_NAME[name].flag for name in config.as_dict() if name not in saved]
    if missing:
        raise UsageError(
            f"{where}: an earlier version of backmatch began this run, one without "
            f"{', '.join(missing[:4])}; finish it with that one, or start a new run with --out"
        )


def versions() -> dict[str, str]:
    """The versions on which a run's bits depend."""
    return {"backmatch": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
