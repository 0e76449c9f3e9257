"""One case of a question: inputs, candidates, and what a right answer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import timing
from .machine import last_level_cache
from .options import BenchOptions

Inputs = tuple[Any, ...]

#: The name of this package's candidate in every table.
OURS = "backmatch"
#: Bytes of matrices in one call, unless ``--batch`` says otherwise.
_BATCH_BYTES, _QUICK_BATCH_BYTES, _CUDA_BATCH_BYTES = 64 * 2**20, 8 * 2**20, 10 * 2**30
_MOST_SYSTEMS, _FEWEST_SYSTEMS = 10_000, 64
#: Most input sets, and bytes of all sets; but always two sets, unless one alone exceeds the caches
#: of a GPU: there a call goes over 10,000 systems of any order, and memory is short.
_MOST_SETS, _MOST_CUDA_SETS, _MOST_SET_BYTES = 16, 256, 2**30


@dataclass(frozen=True)
class Settings:
    """How a run measures; the questions choose their cases by it.

    Attributes:
        options: what was asked for.
        device: resolved.
        effort: repeats and time of every candidate.
        check_stop: raises :class:`timing.InterruptedBenchError` once the run was asked to stop.
    """

    options: BenchOptions
    device: torch.device
    effort: timing.Effort
    check_stop: Callable[[], None] = lambda: None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(getattr(torch, name) for name in self.options.dtypes)

    @property
    def quick(self) -> bool:
        return self.options.quick

    def sizes(self, full: Sequence[int], quick: Sequence[int]) -> tuple[int, ...]:
        """The n that were asked for, else the question's own."""
        return self.options.sizes or tuple(quick if self.quick else full)

    def batch(self, system_bytes: int) -> int:
        """The systems that were asked for, else as many as fill a memory of fixed size."""
        if self.options.batch is not None:
            return self.options.batch
        large = _BATCH_BYTES
        if self.device.type == "cuda":  # the peers and the checks need copies
            memory = torch.cuda.get_device_properties(self.device).total_memory
            large = min(_CUDA_BATCH_BYTES, memory // 8)
        most = _QUICK_BATCH_BYTES if self.quick else large
        fewest = _FEWEST_SYSTEMS // 4 if self.quick else _FEWEST_SYSTEMS
        return max(fewest, min(_MOST_SYSTEMS, most // max(1, system_bytes)))

    def generator(self, seed: int) -> torch.Generator:
        """Seeded; on the CPU, so that every device gets the same inputs."""
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """What is computed, by whom, and how an answer is judged.

    Attributes:
        question: its name.
        about: n, batch, m, dtype and the like, for tables and files.
        inputs: the input sets, all of the same shapes; candidates get one set as arguments.
        candidates: name -> how it is called; :data:`OURS` comes first.
        error: (inputs, answer) -> error in the unit of ``residual``.
        bound: errors above it are wrong answers.
        residual: the unit of the error.
        flops: operations that the problem needs, 0 if meaningless.
        bytes: what must be read and written once, 0 if meaningless.
        shared: leading inputs that belong to all systems.
        batch: systems in one call; ``None`` if a call cannot be cut into systems.
        own_errors: name -> error of a candidate that computes something else.
        threads: CPU threads of this case; ``None`` for those of the run.
        more_checks: further checks of ours, each raising :class:`accuracy.WrongAnswerError`.
        extra: names of the candidates that are right -> further fields of the row.
    """

    question: str
    about: Mapping[str, Any]
    inputs: Sequence[Inputs]
    candidates: Mapping[str, Callable[..., Any]]
    error: Callable[[Inputs, Any], float]
    bound: float
    residual: str
    flops: float = 0.0
    bytes: float = 0.0
    shared: int = 0
    batch: int | None = None
    own_errors: Mapping[str, Callable[[Inputs, Any], float]] = field(default_factory=dict)
    threads: int | None = None
    more_checks: Sequence[Callable[[], None]] = ()
    extra: Callable[[Sequence[str]], Mapping[str, Any]] = lambda right: {}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def rotated(shared: Inputs, systems: tuple[Tensor, ...], quick: bool = False) -> list[Inputs]:
    """Input sets that together exceed the caches: the batch rolled, the shared inputs copied.

    Args:
        shared: inputs of all systems.
        systems: tensors whose dimension 0 is the batch.
        quick: stop at the size of the last-level cache instead of twice that.
    """
    size = sum(value.numel() * value.element_size() for value in (*shared, *systems))
    device = systems[0].device
    wanted = last_level_cache(device) * (1 if quick else 2)
    most, fewest = (_MOST_CUDA_SETS, 1) if device.type == "cuda" else (_MOST_SETS, 2)
    enough = min(most, -(-wanted // max(1, size)), _MOST_SET_BYTES // max(1, size))
    count = max(fewest, enough)
    sets = [(*shared, *systems)]
    for turn in range(1, count):
        copies = (value.clone() for value in shared)
        # 37 is odd and prime to the batch sizes in use: every set starts elsewhere.
        sets.append((*copies, *(torch.roll(value, 37 * turn, 0) for value in systems)))
    return sets
