"""Conjugate gradient in plain torch under a CUDA graph: the peer of our loops on a GPU.

A graph has no control flow that torch offers, so it holds :data:`STEPS` masked steps; after each
replay the host looks once whether any system still runs. That is the fastest such loop that needs
nothing but torch. On the CPU the same functions run without a graph, so that tests execute them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = 8
_MOST_REPLAYS = 10_000 // STEPS

#: (inputs of a case) -> the operator P -> A P, and B of shape (systems, n, 1).
Problem = Callable[..., tuple[Callable[[Tensor], Tensor], Tensor]]


class _Loop:
    """One set of inputs: buffers that stay where they are, and the steps on them."""

    def __init__(self, apply: Callable[[Tensor], Tensor], B: Tensor, rtol: float) -> None:
        self.apply, self.B, self.rtol = apply, B, rtol
        self.x, self.r, self.p = (torch.empty_like(B) for _ in range(3))
        self.rho = torch.empty_like(B[:, :1])
        self.goal = torch.empty_like(self.rho)
        self.left = torch.ones((), dtype=torch.bool, device=B.device)
        self.begin: Callable[[], object] = self._begin
        self.steps: Callable[[], object] = self._steps
        if B.is_cuda:
            self.begin, self.steps = _captured(self._begin), _captured(self._steps)

    def __call__(self) -> Tensor:
        self.begin()
        for _ in range(_MOST_REPLAYS):
            self.steps()
            if not bool(self.left):
                break
        return self.x

    def _begin(self) -> None:
        self.x.zero_()
        self.r.copy_(self.B)
        self.p.copy_(self.B)
        self.rho.copy_((self.B * self.B).sum(1, keepdim=True))
        self.goal.copy_(self.rtol**2 * self.rho)

    def _steps(self) -> None:
        for _ in range(STEPS):
            going = self.rho > self.goal
            q = self.apply(self.p)
            alpha = torch.where(going, self.rho / (self.p * q).sum(1, keepdim=True), 0.0)
            self.x.addcmul_(alpha, self.p)
            self.r.addcmul_(alpha, q, value=-1)
            new = (self.r * self.r).sum(1, keepdim=True)
            beta = torch.where(going, new / self.rho, 0.0)
            self.p.mul_(beta).add_(self.r)
            self.rho.copy_(torch.where(going, new, self.rho))
        self.left.copy_((self.rho > self.goal).any())


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as a CUDA graph, warmed up on a stream of its own as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def loop_of(
    problem: Problem, inputs: Sequence[tuple[Any, ...]], rtol: float
) -> Callable[..., Tensor]:
    """The loop for every input set of a case, captured beforehand; called with one of the sets.

    Args:
        problem: inputs -> operator and right-hand sides.
        inputs: all sets; they must stay where they are.
        rtol: stop of every system, on the recursive residual.
    """
    try:
        loops = {_address(values): _Loop(*problem(*values), rtol) for values in inputs}
    except RuntimeError as error:  # a peer that fails is listed; it does not end the case
        reason = f"not captured: {error}"

        def fail(*values: Tensor) -> Tensor:
            raise RuntimeError(reason)

        return fail
    return lambda *values: loops[_address(values)]()


def _address(values: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(value.data_ptr() for value in values)
