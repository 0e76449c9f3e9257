"""Tensors that say they are on a GPU but live on the CPU, for tests of what chooses by device.

Inside :class:`PretendCuda` a tensor made with, or moved to, a CUDA device answers so to ``device``,
``is_cuda`` and ``is_cpu``, and so does all that is computed from it; one function that gets tensors
of both devices is an error, as it is on a GPU. Numbers are computed on the CPU, so results can be
compared. Launchers are stood in for by CPU kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from backmatch.linalg import _cuda_cg, _library

CUDA = torch.device("cuda", 0)
_MARK = "pretends_to_be_on_a_gpu"
_ASK_CUDA, _ASK_CPU, _ASK_DEVICE = (
    getter.__get__ for getter in (Tensor.is_cuda, Tensor.is_cpu, Tensor.device)
)
_SET_DATA = Tensor.data.__set__
#: What torch lets tensors of two devices meet in, and what looks at no numbers.
_FREE = {
    "__getitem__",
    "__setitem__",
    "copy_",
    "__get__",
    "__set__",
    "is_same_size",
    "_has_compatible_shallow_copy_type",
}


def pretends(value: Tensor) -> bool:
    return bool(value.__dict__.get(_MARK, False))


def pretend(*values: Tensor) -> None:
    """Moves tensors to the GPU that is not there, in place."""
    for value in values:
        value.__dict__[_MARK] = True


def pretend_modules(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        pretend(*module.parameters(), *module.buffers())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


#: What makes the host wait for the device.
_WAITS = {
    "__array__",
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "allclose",
    "argwhere",
    "cpu",
    "equal",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "tolist",
    "unique",
}


def _waits(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the host would wait; as torch's own debug mode on a GPU tells."""
    if name in ("__getitem__", "__setitem__"):
        return any(value.dtype == torch.bool for value in _tensors(args[1]))
    return name in _WAITS or (name == "where" and len(args) == 1)


class PretendCuda(TorchFunctionMode):
    """Counts in ``waits`` how often the host would have waited for the GPU.

    Args:
        may_wait: whether the host may look at numbers on the device or copy unpinned ones to it.
    """

    def __init__(self, *, may_wait: bool = True) -> None:
        super().__init__()
        self.may_wait, self.waits = may_wait, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == _ASK_CUDA:
            return pretends(args[0])
        if func == _ASK_CPU:
            return not pretends(args[0])
        if func == _ASK_DEVICE:
            return CUDA if pretends(args[0]) else torch.device("cpu")
        name = getattr(func, "__name__", "")
        self._note_wait(name, args, kwargs)
        if name in ("to", "cuda", "cpu"):
            return self._move(name, *args, **kwargs)
        if kwargs.get("device") is not None:
            target = torch.device(kwargs.pop("device"))
            result = func(*args, **kwargs)
            if target.type == "cuda":
                pretend(*_tensors(result))
            return result
        if func == _SET_DATA and pretends(args[1]):
            pretend(args[0])
        given = _tensors((args, kwargs))
        there = [tuple(value.shape) for value in given if pretends(value)]
        here = [tuple(v.shape) for v in given if not pretends(v) and v.dim() > 0]
        if there and here and name not in _FREE:
            raise RuntimeError(f"{name}: tensors {there} on cuda meet tensors {here} on the CPU")
        result = func(*args, **kwargs)
        if there and not (name == "copy_" and not pretends(args[0])):
            pretend(*_tensors(result))
        return result

    def _note_wait(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _tensors((args, kwargs))
        waits = any(pretends(value) for value in given) and _waits(name, args)
        unpinned = name == "tensor" and torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if waits or unpinned:
            self.waits += 1
            if not self.may_wait:
                why = "waits for the device" if waits else "copies from unpinned memory"
                raise RuntimeError(f"{name} {why}")

    @staticmethod
    def _move(name: str, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target: Any = kwargs.pop("device", None)
        rest = []
        for arg in args:
            if isinstance(arg, (str, torch.device)):
                target = arg
            else:
                rest.append(arg)
                if isinstance(arg, Tensor):
                    target = CUDA if pretends(arg) else "cpu"
        target = target if name == "to" else name
        there = pretends(value) if target is None else torch.device(target).type == "cuda"
        result = Tensor.to(value, *rest, **kwargs) if rest or kwargs else value
        if there != pretends(value) and result is value:
            result = value.clone()
        if there:
            pretend(result)
        return result


#: What solves the same problems on the CPU.
_STAND_INS = {"ridge_primal": "ridge_dual"}
_WITHOUT_WORKSPACE = {"weighted_gram", "ridge_primal", "cg"}


def _none(self: object, *sizes: object) -> int:
    return 0


class _Event:
    """All work is done when it is enqueued."""

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return True


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts stand-ins for ``torch.cuda`` and ``_C.cuda``; returns the names of the kernels as they
    are called. Tensors pretend only inside ``with PretendCuda()``.
    """
    called: list[str] = []

    class Kernels:
        """Every launcher is a CPU kernel without the last arguments, workspace and stream."""

        def __getattr__(self, name: str) -> Any:
            kernel = getattr(_library.native(), _STAND_INS.get(name, name))

            def launch(*arguments: Any) -> None:
                called.append(name)
                kernel(*arguments[: -1 if name in _WITHOUT_WORKSPACE else -2])

            return launch

        spd_solve_workspace = scaled_gram_solve_workspace = cg_step_workspace = _none
        scaled_gram_cg_largest_order = _none  # no such CPU kernel: the loop takes over

        def ridge_primal_fits(self, dtype: str, n: int) -> bool:
            return n % 2 == 0  # both routes are taken

        def cg_largest_order(self, dtype: str) -> int:
            return 100

    monkeypatch.setattr(_library._extension, "cuda", Kernels(), raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *a: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_cuda_cg, "new_event", _Event)
    monkeypatch.setattr(_cuda_cg, "pinned_flag", lambda: torch.empty((), dtype=torch.bool))
    return called
