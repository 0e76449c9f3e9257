"""The inner loop of :mod:`krylov` on the CPU, one native call per step for all vector updates.

Same rules and arguments as the plain loop there, its oracle. Besides, systems that are done leave:
where the operator can be restricted, the rest is gathered once half of the rows have stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._library import DTYPE_NAMES, native

Apply = Callable[[Tensor], Tensor]

#: Indices (rows,) -> operator and preconditioner of those systems alone, on (rows, n, 1).
Restrict = Callable[[Tensor], tuple[Apply, "Apply | None"]]

#: With fewer rows than this the products cost too little for a gather to pay.
FEWEST_ROWS = 16


class FusedRun:
    """The rows that are still in the loop, and the arrays of all systems that they came from."""

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
        restrict: Restrict | None,
    ) -> None:
        self.apply, self.preconditioner, self.restrict = apply, preconditioner, restrict
        self.max_steps, self.shape = max_steps, X.shape
        n = X.shape[-2]
        self.all = (X.view(-1, n), steps.view(-1), alive.view(-1))
        self.index: Tensor | None = None
        self.X, self.steps, self.alive = self.all
        self.R, self.target = R.reshape(-1, n), target.reshape(-1)
        self.running = running.reshape(-1).clone()  # the native step writes to it

    def __call__(self) -> None:
        """Iterate until every system pauses; X, steps and alive of all systems are up to date."""
        left = int(self.running.sum())
        # The first direction is Z: nothing before it, and an infinite rho makes beta 0.
        self.P = torch.zeros_like(self.R)
        self.rho = torch.full_like(self.target, torch.inf)
        self._narrow(left)
        self._turn(self._preconditioned())
        while True:
            left = self._step()
            if left == 0:
                break
            self._narrow(left)
            if self.preconditioner is not None:
                self._turn(self._preconditioned())
        self._write_back()

    def _preconditioned(self) -> Tensor:
        if self.preconditioner is None:
            return self.R
        return self._rows("preconditioner", self.preconditioner(self.R.view(self.shape)))

    def _step(self) -> int:
        Q = self._rows("operator A", self.apply(self.P.view(self.shape)))
        left: int = native().cg_step(
            *(DTYPE_NAMES[Q.dtype], *Q.shape, self.max_steps, self.preconditioner is not None),
            *(value.data_ptr() for value in (self.P, Q, self.X, self.R, self.rho, self.target)),
            *(value.data_ptr() for value in (self.running, self.alive, self.steps)),
        )
        return left

    def _rows(self, name: str, value: Tensor) -> Tensor:
        """What a callable returned, as rows; the kernels take its address on trust."""
        self._require_same_kind(name, value)
        return value.reshape(self.P.shape).contiguous()

    def _require_same_kind(self, name: str, value: Tensor) -> None:
        if (value.shape, value.dtype, value.device) != (self.shape, self.P.dtype, self.P.device):
            raise TypeError(
                f"the {name} must return shape {tuple(self.shape)} and {self.P.dtype} on "
                f"{self.P.device}, as it was given, got {tuple(value.shape)} and {value.dtype} on "
                f"{value.device}"
            )

    def _turn(self, Z: Tensor) -> None:
        rows = (self.R, Z, self.P, self.rho, self.running)
        native().cg_direction(DTYPE_NAMES[Z.dtype], *Z.shape, *(value.data_ptr() for value in rows))

    def _narrow(self, left: int) -> None:
        """Keep the running rows alone once that halves the products."""
        rows = self.P.shape[0]
        if self.restrict is None or rows < FEWEST_ROWS or 2 * left > rows or left == 0:
            return
        self._write_back()
        keep = self.running.nonzero().flatten()
        self.index = keep if self.index is None else self.index[keep]
        self.P, self.R, self.rho = self.P[keep], self.R[keep], self.rho[keep]
        self.X, self.steps, self.alive = self.X[keep], self.steps[keep], self.alive[keep]
        self.target, self.running = self.target[keep], self.running[keep]
        self.shape = torch.Size((len(keep), self.P.shape[1], 1))
        self.apply, self.preconditioner = self.restrict(self.index)

    def _write_back(self) -> None:
        if self.index is not None:
            for whole, part in zip(self.all, (self.X, self.steps, self.alive), strict=True):
                whole[self.index] = part
