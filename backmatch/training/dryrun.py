"""``--dry-run``: one batch, and what each block's two problems cost. Writes nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import BackMatchError
from ..matching import BackMatching
from ..partitioning import partition
from ..solvers import Gradient, SolveRecord
from . import methods
from .config import TrainConfig
from .data import batches
from .failures import RunError
from .loop import Trainer
from .peak_memory import peak_bytes
from .progress import say
from .run import create_trainer, settle

#: A time is the median over this many repeats, after one that is not counted.
REPEATS = 5

_HEAD = ("block", "parameters", "side", "solver", "systems", "unknowns", "time", "peak memory")


def show_step(config: TrainConfig) -> int:
    """Print the table of one step; returns the exit code."""
    trainer = create_trainer(settle(config))
    config, data = trainer.config, trainer.data
    x, y = next(batches(data, batch_size=config.batch_size, seed=config.seed, epoch=0, start=0))
    say(
        f"{config.method}, {config.model} on {config.data}: batch {config.batch_size}, "
        f"{trainer.total // config.epochs} steps an epoch, {config.device}, {config.dtype}"
    )
    try:
        if config.method == "backmatch":
            _show_table([_HEAD, *_rows(trainer, x, y)])
        milliseconds, size = _measure(lambda: trainer.method(x, y), x.device)
    except BackMatchError as error:
        raise RunError(f"the step failed: {error}") from error
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(f"whole step: {parameters} parameters, {milliseconds:.2f} ms, {_size(size)} at peak")
    return 0


def _rows(trainer: Trainer, x: Tensor, y: Tensor) -> Iterator[tuple[str, ...]]:
    config = trainer.config
    step = methods.create_matcher(trainer.model, config).backward(
        x, lambda output: cross_entropy(output, y), keep=True
    )
    weights, inputs = methods.solvers(config)
    blocks = partition(trainer.model, by=methods.settled(config.blocks))
    z = x
    for block, report in zip(blocks, step.blocks, strict=True):
        target = report.displacement
        assert target is not None
        own = sum(p.numel() for p in block.parameters())
        if report.weight is not None:
            alone = BackMatching([block], weights=weights, inputs=Gradient())
            cost = _cost(alone, z, target)
            yield report.name, str(own), "weights", *_solve(report.weight), *cost
        if report.input is not None:
            with _frozen(block):
                alone = BackMatching([nn.Identity(), block], weights=Gradient(), inputs=inputs)
                cost = _cost(alone, z, target)
            yield report.name, str(own), "inputs", *_solve(report.input), *cost
        with torch.no_grad():
            z = block(z)


def _cost(alone: BackMatching, z: Tensor, target: Tensor) -> tuple[str, str]:
    # A loss whose gradient asks for just this displacement: one problem of one block remains.
    def loss(output: Tensor) -> Tensor:
        return -(target * output).sum() / len(output)

    milliseconds, size = _measure(lambda: alone.backward(z, loss), z.device)
    return f"{milliseconds:.2f} ms", _size(size)


def _measure(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    size = peak_bytes(work, device)  # first: it warms up, and takes no time that counts
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times), size


@contextmanager
def _frozen(block: nn.Module) -> Iterator[None]:
    trainable = [p for p in block.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _solve(record: SolveRecord) -> tuple[str, str, str]:
    name = record.solver
    if record.iterations:
        name += f" ({record.iterations} iterations)"
    return name, f"{record.systems} x {record.structure}", str(record.unknowns)


def _size(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _show_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
