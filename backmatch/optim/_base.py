"""What both optimizers share: catch the pass, measure the scales, divide, step as SGD does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..model import chain
from . import gradients, groups
from .divisors import BlockScale, averaged, factors, normalising
from .options import Options
from .passes import Pass, Watcher
from .scales import Needs, measure
from .update import update

Self = TypeVar("Self", bound="BlockScaledSGD")


class BlockScaledSGD(torch.optim.Optimizer):
    """SGD on gradients divided, block by block, by scalars of the local Hessians."""

    #: Whether the scalars of the blocks above multiply up.
    _chained: bool

    def __init__(
        self,
        params_or_blocks: Any,
        lr: float | Tensor,
        defaults: dict[str, Any],
        options: Options,
        blocks: nn.Module | Iterable[nn.Module] | None,
    ) -> None:
        self._options = options
        self._blocks, params = groups.read(params_or_blocks, blocks)
        self._settle_owners()
        self._scalars: dict[tuple[str, int], float] = {}
        self._factors: dict[int, float] = {}
        self._steps, self._age = 0, 0
        self._watcher = self._new_watcher()
        super().__init__(params, {"lr": lr, **defaults})
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("the blocks must have parameters, got none")
        # Last, so that no error above leaves a hook behind.
        self._open()

    def _settle_owners(self) -> None:
        self._owners = {
            id(p): b for b, block in enumerate(self._blocks.values()) for p in block.parameters()
        }

    def _new_watcher(self) -> Watcher:
        pulls = self._options.kind == "rayleigh"
        return Watcher(list(self._blocks.values()), pulls=pulls)

    def _open(self) -> None:
        self._watcher.open()
        # An optimizer that is dropped takes its hooks along.
        weakref.finalize(self, self._watcher.close)

    def close(self) -> None:
        """Take the hooks off the forward passes; a ``with`` puts them in place again."""
        self._watcher.close()

    def __enter__(self: Self) -> Self:
        self._watcher.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The chain: name -> block, bottom first."""
        return dict(self._blocks)

    @property
    def scales(self) -> dict[str, BlockScale]:
        """What was measured and used last, by name of the block, bottom first."""
        return {
            name: BlockScale(
                self._scalars.get(("weight", b)),
                self._scalars.get(("input", b)),
                self._factors.get(b),
            )
            for b, name in enumerate(self._blocks)
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the blocks that are in no group yet, or whole blocks.

        Args:
            param_group: ``{"params": ..., "lr": ..., ...}`` as in torch, the parameters being of
                blocks of the chain; or ``{"blocks": ...}``: blocks of the chain bring their
                parameters that no group has yet, other ones join the chain on top.

        Raises:
            TypeError, ValueError: as the constructor's; nothing has changed then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group, before = dict(param_group), self._blocks
        try:
            if "blocks" in group:
                self._take_blocks(group)
            params = group.get("params", ())
            if isinstance(params, Tensor):
                params = [params]
            if not isinstance(params, (list, tuple, set)) and isinstance(params, Iterable):
                params = list(params)
            group["params"] = params
            groups.check_group({**self.defaults, **group})
            groups.check_parameters(params, self._owners)
            super().add_param_group(group)
        except BaseException:
            self._blocks = before
            self._settle_owners()
            raise
        if self._blocks is not before:
            self._watcher.watch(list(self._blocks.values()))
        self._age = 0
        self._watcher.wanted = True

    def _take_blocks(self, group: dict[str, Any]) -> None:
        given = groups.modules_of(group.pop("blocks"))
        known = {id(block) for block in self._blocks.values()}
        added = [block for block in given if id(block) not in known]
        if added:
            named, number = dict(self._blocks), len(self._blocks)
            for block in added:
                while str(number) in named:
                    number += 1
                named[str(number)] = block
            chain(list(named.values()))
            self._blocks = named
            self._settle_owners()
        taken = {id(p) for each in self.param_groups for p in each["params"]}
        own = [p for p in groups.parameters_of(given) if id(p) not in taken]
        group.setdefault("params", own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Measure the scales if they are due, then move the parameters.

        Args:
            closure: computes the loss anew, with ``loss.backward()`` inside.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: scales are due, and no pass of the model was back-propagated; or its
                tensors have changed since. No parameter has changed.
            NonFiniteError: a scale or a gradient is NaN or Inf. No parameter has changed.
            TypeError: gradients are sparse, or the pass ran under autocast. Likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[p for p in g["params"] if p.grad is not None] for g in self.param_groups]
        gradients.refuse_sparse(moving)
        owned = {self._owners[id(p)] for part in moving for p in part}
        scalars, fresh = self._current_scalars(owned)
        found = self._found_factors(scalars, moving, owned)
        for group, part in zip(self.param_groups, moving, strict=True):
            if part:
                each = [found[self._owners[id(p)]] for p in part]
                update(group, part, each, self.state)
        self._finish(scalars, found, fresh)
        return loss

    def _needs(self, owned: set[int]) -> Needs:
        lowest = min(owned, default=len(self._blocks))
        above = range(lowest + 1, len(self._blocks)) if self._chained else ()
        return Needs(frozenset(owned), frozenset(above))

    def _current_scalars(self, owned: set[int]) -> tuple[dict[tuple[str, int], float], bool]:
        """The scalars that this step uses, and whether they were measured for it."""
        needs = self._needs(owned)
        keys = {("weight", b) for b in needs.weights} | {("input", b) for b in needs.inputs}
        if self._age > 0 and keys <= self._scalars.keys():
            return self._scalars, False
        if self._watcher.found is None:
            raise RuntimeError(self._why_nothing())
        if not keys:
            return self._scalars, True
        run: Pass = self._watcher.found
        fresh = measure(self._blocks, run, needs, self._options.rule, self._steps)
        return averaged(self._scalars, fresh, self._options.average), True

    def _why_nothing(self) -> str:
        name = type(self).__name__
        if not self._watcher.is_open:
            return f"this {name} is closed: it sees no forward pass to take its scales from"
        return (
            f"{name}.step() needs a forward pass of the model and loss.backward() since the last "
            "step: none was seen that ended in the output of the top block"
        )

    def _found_factors(
        self,
        scalars: dict[tuple[str, int], float],
        moving: list[list[Tensor]],
        owned: set[int],
    ) -> dict[int, float]:
        names, damping = list(self._blocks), self._options.damping
        sizes = gradients.sizes(moving, self._owners, names)
        found = factors(
            scalars, sorted(owned), len(names) - 1, damping, names, chained=self._chained
        )
        found = normalising(sizes, found) if self._options.normalize else found
        gradients.refuse_overflow(moving, self._owners, names, sizes, found)
        return found

    def _finish(
        self, scalars: dict[tuple[str, int], float], found: dict[int, float], fresh: bool
    ) -> None:
        """Count the step, let go of the pass, and say whether the next one is needed."""
        self._scalars, self._factors = scalars, found
        self._steps += 1
        self._age = (1 if fresh else self._age + 1) % self._options.every
        self._watcher.rest(wanted=self._age == 0)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the scales and counters under ``"scales"``."""
        saved = super().state_dict()
        names = list(self._blocks)
        saved["scales"] = {
            **{k: v for k, v in asdict(self._options).items() if k in ("kind", "estimate")},
            "blocks": len(names),
            "steps": self._steps,
            "age": self._age,
            "values": [[side, b, c] for (side, b), c in self._scalars.items()],
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; a fresh optimizer made with the same arguments goes on exactly.

        Raises:
            ValueError: the state is of other groups, blocks, kind or estimate, or of another
                optimizer.
        """
        saved = state_dict.get("scales")
        if not isinstance(saved, dict):
            raise ValueError(
                f"state_dict must hold 'scales' as {type(self).__name__}.state_dict() does"
            )
        now = self.state_dict()["scales"]
        for key in ("kind", "estimate", "blocks"):
            if saved.get(key) != now[key]:
                raise ValueError(
                    f"the state was saved with {key}={saved.get(key)!r}, this optimizer has "
                    f"{now[key]!r}"
                )
        scalars = {(str(side), int(b)): float(c) for side, b, c in saved["values"]}
        steps, age = int(saved["steps"]), int(saved["age"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "scales"})
        self._scalars, self._factors, self._steps = scalars, {}, steps
        self._age = age % self._options.every
        self._watcher.rest(wanted=self._age == 0)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_options", "_blocks", "_scalars", "_factors", "_steps", "_age")
        state = {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}
        return {**state, "_was_open": self._watcher.is_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_open = state.pop("_was_open", None)
        super().__setstate__(state)
        if was_open is not None:  # a copy or an unpickled one; load_state_dict comes by, too
            self._settle_owners()
            self._watcher = self._new_watcher()
            self._watcher.rest(wanted=self._age == 0)
            if was_open:
                self._open()
