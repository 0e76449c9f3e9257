"""The inner loop of :mod:`krylov` on CUDA: enqueued, never waited for.

Same rules as the plain loop there, its oracle. A step is the caller's operator and one native call
for all vector updates; which systems still run is known on the device, and a step does not touch
the others. So the host enqueues steps without knowing whether anybody needs them. After every
STEPS_PER_LOOK steps it has "does any system run" copied to pinned memory, and goes on as soon as
the look before that has arrived: it is at most two looks ahead of the device, which never idles
for it, and at most as many steps are in vain.

Between rounds (krylov recomputes the residuals there) the host polls for one look, the only one
that nothing is enqueued behind. While a CUDA graph is captured nothing can be looked at: the graph
holds ``max_steps`` steps and RESTARTS_IN_GRAPH restarts of at most STEPS_OF_RESTART steps each,
within every system's cap; what has not arrived by then is reported as not converged.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

from ._fused_cg import Apply, FusedRun
from ._library import DTYPE_NAMES, native_cuda

STEPS_PER_LOOK = 4
LOOKS_AHEAD = 2
RESTARTS_IN_GRAPH = 1
STEPS_OF_RESTART = 8


def on_cuda(value: Tensor) -> bool:
    """Whether the CUDA kernels take this tensor."""
    return value.is_cuda


def has_kernel(name: str, value: Tensor) -> bool:
    """Whether the kernel ``cg`` or ``scaled_gram_cg`` takes systems of the order of ``value``'s
    last dimension: on CUDA, up to a limit by dtype."""
    if not on_cuda(value) or not value.numel():
        return False
    with torch.cuda.device(value.device):  # the limit is that of the current device
        largest: int = getattr(native_cuda(), f"{name}_largest_order")(DTYPE_NAMES[value.dtype])
    return value.shape[-1] <= largest


def capturing(value: Tensor) -> bool:
    """Whether work on this tensor goes into a CUDA graph."""
    if not on_cuda(value):
        return False
    with torch.cuda.device(value.device):
        return torch.cuda.is_current_stream_capturing()


def pinned_flag() -> Tensor:
    return torch.empty((), dtype=torch.bool, pin_memory=True)


def new_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event


def _arrived(event: torch.cuda.Event) -> bool:
    arrived: bool = event.query()  # type: ignore[no-untyped-call]
    return arrived


class Looks:
    """Looks at "does any system run" that arrive later, in the order in which they were taken."""

    def __init__(self) -> None:
        self._free = [(pinned_flag(), new_event()) for _ in range(LOOKS_AHEAD)]
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def take(self, running: Tensor) -> None:
        """Enqueue a look; afterwards at most LOOKS_AHEAD are on their way."""
        flag, event = self._free.pop()
        flag.copy_(running.any(), non_blocking=True)
        event.record(torch.cuda.current_stream(running.device))
        self._pending.append((flag, event))

    def all_paused(self) -> bool:
        """Whether a look that has arrived saw no system run; leaves room for one more."""
        while self._pending:
            flag, event = self._pending[0]
            while not _arrived(event):
                if self._free:
                    return False
                time.sleep(0)
            self._free.append(self._pending.popleft())
            if not flag:
                return True
        return False

    def now(self, running: Tensor) -> bool:
        """Whether any system runs, as soon as the device knows."""
        self._free.extend(self._pending)  # older looks arrive before this one and are not read
        self._pending.clear()
        self.take(running)
        flag, event = self._pending[0]
        while not _arrived(event):
            time.sleep(0)
        return bool(flag)


class CudaRun(FusedRun):
    """The rows in the loop; a column of a right-hand side with several is a row of its own."""

    def __init__(
        self,
        apply: Apply,
        preconditioner: Apply | None,
        X: Tensor,
        R: Tensor,
        running: Tensor,
        alive: Tensor,
        steps: Tensor,
        target: Tensor,
        max_steps: int,
        most: int,
        looks: Looks | None,
    ) -> None:
        self.apply, self.preconditioner, self.looks = apply, preconditioner, looks
        self.most = most  # steps of this round; max_steps is the cap of a system over all rounds
        self.max_steps, self.shape = max_steps, X.shape
        self.columns = X
        self.X, self.R = self._as_rows(X), self._as_rows(R)
        self.steps, self.alive = steps.view(-1), alive.view(-1)
        self.target, self.running = target.reshape(-1), running.reshape(-1).clone()

    def __call__(self) -> None:
        """Iterate until every system pauses; updates X, steps and alive in place."""
        with torch.cuda.device(self.X.device):
            self.stream = torch.cuda.current_stream().cuda_stream
            size = native_cuda().cg_step_workspace(DTYPE_NAMES[self.X.dtype], *self.X.shape)
            self.workspace = torch.empty(size, dtype=torch.uint8, device=self.X.device)
            self._iterate()
        if self.shape[-1] > 1:
            self.columns.copy_(self._as_columns(self.X))

    def _iterate(self) -> None:
        # The first direction is Z: nothing before it, and an infinite rho makes beta 0.
        self.P = torch.zeros_like(self.R)
        self.rho = torch.full_like(self.target, torch.inf)
        self._turn(self._preconditioned())
        for taken in range(1, self.most + 1):
            self._enqueue_step()
            if taken == self.most:
                return
            if self.preconditioner is not None:
                self._turn(self._preconditioned())
            if self.looks is not None and taken % STEPS_PER_LOOK == 0:
                self.looks.take(self.running)
                if self.looks.all_paused():
                    return

    def _preconditioned(self) -> Tensor:
        if self.preconditioner is None:
            return self.R
        return self._rows("preconditioner", self.preconditioner(self._as_columns(self.R)))

    def _enqueue_step(self) -> None:
        Q = self._rows("operator A", self.apply(self._as_columns(self.P)))
        native_cuda().cg_step(
            *(DTYPE_NAMES[Q.dtype], *Q.shape, self.max_steps, self.preconditioner is not None),
            *(value.data_ptr() for value in (self.P, Q, self.X, self.R, self.rho, self.target)),
            *(value.data_ptr() for value in (self.running, self.alive, self.steps)),
            *(self.workspace.data_ptr(), self.stream),
        )

    def _turn(self, Z: Tensor) -> None:
        rows = (self.R, Z, self.P, self.rho, self.running, self.workspace)
        addresses = (value.data_ptr() for value in rows)
        native_cuda().cg_direction(DTYPE_NAMES[Z.dtype], *Z.shape, *addresses, self.stream)

    def _rows(self, name: str, value: Tensor) -> Tensor:
        self._require_same_kind(name, value)
        return self._as_rows(value)

    def _as_rows(self, value: Tensor) -> Tensor:
        """``(..., n, k)`` as contiguous rows (systems, n)."""
        n, k = self.shape[-2:]
        return (value if k == 1 else value.mT).reshape(-1, n).contiguous()

    def _as_columns(self, rows: Tensor) -> Tensor:
        """Rows as the contiguous ``(..., n, k)`` that callables see."""
        n, k = self.shape[-2:]
        if k == 1:
            return rows.view(self.shape)
        return rows.view(*self.shape[:-2], k, n).mT.contiguous()
