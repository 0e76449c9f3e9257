"""``--probe K``: look at every K-th step of a run without changing it."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..blocks import Snapshot
from ..errors import BackMatchError
from ..matching import BackMatching
from ..partitioning import partition
from ..probing import probe
from . import methods
from .config import TrainConfig
from .failures import RunError
from .shadow_adam import ShadowAdam


class Probes:
    """The probes of one run.

    Before every step one back-propagation feeds a shadow of Adam; before every K-th the step is
    probed. Weights, grads, buffers and RNG are afterwards as before: the run does not notice.
    Passes go through modules of their own that share parameters and buffers with the run's, so that
    hooks which an optimizer puts onto the model later do not fire.

    Args:
        model: the model of the run.
        config: its options; ``config.probe`` is K.
    """

    def __init__(self, model: nn.Sequential, config: TrainConfig) -> None:
        self._model, self._every = _twin(model), config.probe
        self._shadow = ShadowAdam([p for p in model.parameters() if p.requires_grad])
        if config.method == "bp":  # what the exact step would be, with the default solvers
            self._matcher = BackMatching(partition(self._model))
        else:
            self._matcher = methods.create_matcher(self._model, config)
        #: Wall-clock time of the last :meth:`look`.
        self.last_seconds = 0.0

    def look(self, number: int, epoch: int, x: Tensor, y: Tensor) -> dict[str, Any] | None:
        """What step ``number`` is about to do: a row for the log, ``None`` between the probes.

        Raises:
            RunError: no memory for the back-propagation.
        """
        began = time.perf_counter()
        try:
            self._shadow.feed(self._gradients(x, y))
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {number} (epoch {epoch}): the device is out of memory for the "
                "back-propagation of the probes; lower --batch-size, or drop --probe"
            ) from error
        row = None
        if number % self._every == 0:
            row = {"kind": "probe", "step": number, "epoch": epoch, **self._measure(x, y)}
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.last_seconds = time.perf_counter() - began
        if row is not None:
            row["probe_ms"] = round(1e3 * self.last_seconds, 3)
        return row

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """dJ/dW of the loss in training, at the RNG state from which the step will start."""
        before = Snapshot([self._model], x.device)
        try:
            with torch.enable_grad():
                loss = cross_entropy(self._model(x), y)
                return torch.autograd.grad(
                    loss, self._shadow.parameters, allow_unused=True, materialize_grads=True
                )
        finally:
            before.restore()

    def _measure(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        try:
            found = probe(
                self._matcher,
                x,
                lambda output: cross_entropy(output, y),
                others={"adam": self._shadow.steps()},
            )
        except (BackMatchError, torch.OutOfMemoryError) as error:
            # The run may well go on: back-propagation solves nothing that could fail.
            return {"error": " ".join(str(error).split())[:500], "blocks": []}
        missing = {"missing": found.missing} if found.missing else {}
        return {**missing, "blocks": [block.as_dict() for block in found.blocks]}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._shadow.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state."""
        self._shadow.restore(state)


def _twin(model: nn.Sequential) -> nn.Sequential:
    """Other modules with the very parameters and buffers of ``model``, in training mode."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).train()


def create(model: nn.Sequential, config: TrainConfig) -> Probes | None:
    """The probes that a run asks for, ``None`` if it asks for none."""
    return Probes(model, config) if config.probe else None
