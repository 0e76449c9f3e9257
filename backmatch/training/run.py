"""``backmatch train``: put a run together, train, and leave its results in the folder."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, data, methods, models, optimizers, probes, progress
from .config import TrainConfig
from .failures import RunError, UsageError, show
from .files import write_atomic
from .interrupts import Interrupts
from .loop import Trainer, versions
from .rundir import CURVES, METRICS, RunFolder, default_folder


def start(config: TrainConfig, out: Path | None, *, quiet: bool) -> int:
    """Train from step 0 in ``out`` (``None``: a new one in ``runs``); returns the exit code."""
    with Interrupts() as interrupts:
        trainer = create_trainer(settle(config))
        path = default_folder(config) if out is None else out
        with RunFolder.create(path, trainer.config) as folder:
            return _run(trainer, folder, progress.create(quiet), interrupts)


def resume(config: TrainConfig, path: Path, *, quiet: bool) -> int:
    """Train on from the newest checkpoint in ``path``; returns the exit code."""
    with Interrupts() as interrupts:
        trainer = create_trainer(settle(config))
        with RunFolder.reopen(path) as folder:
            shown = progress.create(quiet)
            with _writing(path, _CONTINUE):
                state = checkpoint.load(path, shown.note)
                folder.cut(0 if state is None else trainer.restore(state, f"--resume {path}"))
            return _run(trainer, folder, shown, interrupts)


def settle(config: TrainConfig) -> TrainConfig:
    """Choose device and threads as the machine has them.

    Raises:
        UsageError: ``--device cuda`` without a CUDA device.
    """
    device = config.device
    if device != "cpu":
        found = torch.cuda.is_available()
        if device == "cuda" and not found:
            raise UsageError("--device cuda: torch finds no CUDA device; use --device cpu")
        device = "cuda" if found else "cpu"
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return dataclasses.replace(config, device=device, threads=torch.get_num_threads())


def create_trainer(config: TrainConfig) -> Trainer:
    """Data, model, optimizer and method of a run at step 0.

    Raises:
        UsageError: the data is unusable, smaller than one batch, or none that the model takes.
    """
    return assemble(config, load_data(config))


def load_data(config: TrainConfig) -> data.Dataset:
    """The run's data set on the CPU, in the shape that the model takes.

    Raises:
        UsageError: the data is unusable, or none that the model takes.
    """
    dataset = data.load(config.data, getattr(torch, config.dtype), config.data_dir)
    dataset = models.fitted(config.model, config.data, dataset)
    if config.augment == "standard":
        _check_images(config, dataset)
    return dataset


def assemble(config: TrainConfig, dataset: data.Dataset) -> Trainer:
    """Model, optimizer and method of a run at step 0 on data that is loaded already.

    Raises:
        UsageError: the data is smaller than one batch.
    """
    samples = len(dataset.x_train)
    if samples < config.batch_size:
        raise UsageError(
            f"--batch-size {config.batch_size} is larger than the {samples} training samples; "
            "lower it"
        )
    # Initial weights are drawn on the CPU, so that every device starts from the same ones.
    torch.manual_seed(config.seed)
    model = create_model(config, dataset)
    looking = probes.create(model, config)  # first, so that no optimizer's hook is copied
    optimizer = optimizers.OPTIMIZERS[config.optimizer](model, config)
    dataset = dataset.to(torch.device(config.device))
    return Trainer(config, dataset, model, optimizer, methods.create(model, config), looking)


def _check_images(config: TrainConfig, dataset: data.Dataset) -> None:
    shape = tuple(dataset.x_train.shape[1:])
    if len(shape) != 3:
        raise UsageError(
            "--augment standard: expected images of shape (channels, height, width), got samples "
            f"of shape {shape} from --data {show(config.data, 200)}; drop it"
        )


def create_model(config: TrainConfig, dataset: data.Dataset) -> nn.Sequential:
    """The network for a data set, on the run's device and in its dtype."""
    model = models.create(config.model, dataset, config.hidden, config.activation)
    return model.to(torch.device(config.device), getattr(torch, config.dtype))


_CONTINUE = "the last checkpoint is intact, make room and continue"
_FINISH = "training is complete, make room and write the results"


@contextmanager
def _writing(path: Path, advice: str) -> Iterator[None]:
    """Tell a disk that takes no more as a failed run, with the way on from there."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write in {path}: {error.strerror}; {advice} with --resume {path}"
        ) from None


def _run(
    trainer: Trainer, folder: RunFolder, shown: progress.Progress, interrupts: Interrupts
) -> int:
    config, done = trainer.config, trainer.position.step
    place = config.device + (f", {config.threads} threads" if config.device == "cpu" else "")
    shown.note(
        f"{config.method} in {folder.path}: step {done} of {trainer.total}, {place}, {config.dtype}"
    )
    if trainer.data.note:
        shown.note(f"note: {trainer.data.note}")
    shown.start(trainer.total, done, config.epochs)
    try:
        with _writing(folder.path, _CONTINUE):
            finished = trainer.train(folder, shown, interrupts)
    finally:
        shown.stop()
        optimizers.close(trainer.optimizer)
    if not finished:
        shown.note(
            f"stopped after step {trainer.position.step} of {trainer.total}, state saved; "
            f"continue with --resume {folder.path}"
        )
        return interrupts.exit_code
    _finish(trainer, folder, shown)
    return 0


def _finish(trainer: Trainer, folder: RunFolder, shown: progress.Progress) -> None:
    rows = folder.rows()
    with _writing(folder.path, _FINISH):
        drawn = _draw_curves(rows, trainer.config, folder)
        folder.write_summary(_summarize(trainer, rows))
    last = rows[-1]
    _note_failed_probes(rows, shown)
    shown.note(
        f"test accuracy {last['test_accuracy']:.4f} after {trainer.total} steps "
        f"in {trainer.position.elapsed_seconds:.2f} s"
    )
    shown.note(f"table   {folder.path / METRICS}")
    shown.note(f"curves  {folder.path / CURVES if drawn else 'none: matplotlib is not installed'}")


def _draw_curves(rows: list[dict[str, Any]], config: TrainConfig, folder: RunFolder) -> bool:
    try:
        from . import curves
    except ImportError:
        return False
    write_atomic(folder.path / CURVES, curves.draw(rows, config))
    return True


def _summarize(trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    last = rows[-1]
    steps = [row["step_ms"] for row in rows if row["kind"] == "step"]
    return {
        **{
            key: last[key] for key in ("test_accuracy", "test_loss", "train_loss", "train_accuracy")
        },
        "steps": trainer.total,
        "epochs": trainer.config.epochs,
        "seed": trainer.config.seed,
        "method": trainer.config.method,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "elapsed_seconds": round(trainer.position.elapsed_seconds, 3),
        "median_step_ms": round(statistics.median(steps), 3),
        **_probe_summary(trainer, rows),
        "versions": versions(),
    }


def _probe_summary(trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Nothing for a run without probes."""
    if trainer.probes is None:
        return {}
    probed = [row for row in rows if row["kind"] == "probe"]
    return {
        "probes": len(probed),
        "failed_probes": sum("error" in row for row in probed),
        "probe_seconds": round(trainer.position.probe_seconds, 3),
    }


def _note_failed_probes(rows: list[dict[str, Any]], shown: progress.Progress) -> None:
    failed = [row for row in rows if "error" in row]
    if failed:
        shown.note(
            f"{len(failed)} probes failed, the first at step {failed[0]['step']}: "
            f"{failed[0]['error']}"
        )
