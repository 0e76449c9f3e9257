"""``--dry-run``: one batch, and what each block's two problems cost. Writes nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import BackMatchError
from ..partitioning import partition
from ..solvers import SolveRecord
from ..sweep import Step
from . import methods, optimizers
from .config import TrainConfig
from .data import batches
from .failures import RunError
from .loop import Trainer
from .methods import Method
from .peak_memory import PeakMemory
from .progress import say
from .run import create_trainer, settle
from .watched import Watch, span_name

#: A time is the median over this many repeats, after a first one that does not count.
REPEATS = 5
#: A first one that takes this many seconds counts, and is not repeated.
SLOW = 1.0

_HEAD = ("block", "parameters", "side", "solver", "systems", "unknowns", "time", "peak memory")


@dataclass(frozen=True)
class Cost:
    """Seconds of a whole step, how often it was timed, and its peak of memory in bytes."""

    seconds: float
    repeats: int
    peak: int


def show_step(config: TrainConfig) -> int:
    """Print the table of one step; returns the exit code."""
    trainer = create_trainer(settle(config))
    config, data = trainer.config, trainer.data
    x, y = next(batches(data, batch_size=config.batch_size, seed=config.seed, epoch=0, start=0))
    per_epoch = trainer.total // config.epochs
    say(
        f"{config.method}, {config.model} on {config.data}: batch {config.batch_size}, "
        f"{per_epoch} steps an epoch, {config.device}, {config.dtype}"
    )
    try:
        cost = _show_cost(trainer, x, y)
    except BackMatchError as error:
        raise RunError(f"the step failed: {error}") from error
    finally:
        optimizers.close(trainer.optimizer)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    how = "timed once" if cost.repeats == 1 else f"median of {cost.repeats}"
    say(
        f"whole step: {parameters} parameters, {_time(cost.seconds)} ({how}), "
        f"{_size(cost.peak)} of tensors at peak"
    )
    say(f"an epoch of {per_epoch} steps: about {_time(per_epoch * cost.seconds)}")
    return 0


def _show_cost(trainer: Trainer, x: Tensor, y: Tensor) -> Cost:
    watch = Watch(x.device)
    if trainer.config.method != "backmatch":
        return _cost(trainer, trainer.method, watch, x, y)
    matcher = methods.create_matcher(trainer.model, trainer.config, watch.choice)
    steps: list[Step] = []

    def method(x: Tensor, y: Tensor) -> methods.Result:
        steps.append(matcher.backward(x, lambda output: cross_entropy(output, y)))
        return methods.Result(float(steps[-1].loss), steps[-1].output)

    cost = _cost(trainer, method, watch, x, y)
    blocks = partition(trainer.model, by=methods.settled(trainer.config.blocks))
    _show_table([_HEAD, *_rows(blocks, steps[0], watch, cost.repeats)])
    return cost


def _cost(trainer: Trainer, method: Method, watch: Watch, x: Tensor, y: Tensor) -> Cost:
    """Time steps as a run takes them, then measure the memory of one more."""

    def run() -> float:
        began = time.perf_counter()
        watch.begin_step()
        trainer.optimizer.zero_grad()
        method(x, y)
        watch.synchronize()
        return time.perf_counter() - began

    times = [run()]
    if times[0] < SLOW:
        times = [run() for _ in range(REPEATS)]
    else:
        say(f"the first step took {_time(times[0])}; one more measures its memory")
    with PeakMemory(x.device) as watch.memory:
        run()
    again = run if optimizers.takes_scales(trainer.optimizer) else None
    seconds = statistics.median(times) + _optimizer_seconds(trainer, watch, again)
    return Cost(seconds, len(times), watch.memory.total)


def _optimizer_seconds(trainer: Trainer, watch: Watch, again: Callable[[], float] | None) -> float:
    """The update itself; last, as it moves the weights. ``again`` runs what it needs before it."""
    times = []
    for i in range(REPEATS):
        if again is not None and i:
            again()
        began = time.perf_counter()
        trainer.optimizer.step()
        watch.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _rows(
    blocks: list[nn.Module], step: Step, watch: Watch, repeats: int
) -> Iterator[tuple[str, ...]]:
    assert watch.memory is not None
    for block, report in zip(blocks, step.blocks, strict=True):
        parameters = str(sum(p.numel() for p in block.parameters()))
        for side, record in (("weights", report.weight), ("inputs", report.input)):
            if record is not None:
                problem = (report.name, side)
                # The last entry is of the step that measured memory, a cold first one the first.
                seconds = statistics.median(watch.seconds[problem][-1 - repeats : -1])
                peak = watch.memory.spans[span_name(problem)]
                cost = (_time(seconds), _size(peak))
                yield report.name, parameters, side, *_solve(record), *cost


def _solve(record: SolveRecord) -> tuple[str, str, str]:
    name = record.solver
    if record.iterations:
        name += f" ({record.iterations} iterations)"
    return name, f"{record.systems} x {record.structure}", str(record.unknowns)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _size(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _show_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
