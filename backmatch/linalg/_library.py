"""The compiled module, the operator library and the memory budget: one place for each.

Every operator of :mod:`backmatch.linalg` is defined through :func:`define` in the namespace
``torch.ops.backmatch``; every native call goes through :func:`native` or :func:`native_cuda`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch  # before backmatch._C, so that both share one OpenMP runtime and its threads
from torch import Tensor

from ..errors import MissingExtensionError

#: What a solver may allocate beyond its arguments and its result, in bytes.
WORKSPACE_BYTES = 256 * 2**20

#: How the native module names the dtypes.
DTYPE_NAMES = {torch.float32: "float32", torch.float64: "float64"}

# torch leaves its operator library untyped.
_LIBRARY: Any = cast(Any, torch.library.Library)("backmatch", "DEF")

_extension: ModuleType | None
_import_error: ImportError | None = None
try:
    _extension = importlib.import_module("backmatch._C")
except ImportError as error:
    _extension, _import_error = None, error


def native() -> Any:
    """The compiled module ``backmatch._C``.

    Raises:
        MissingExtensionError: it is not built, or cannot be loaded.
    """
    if _extension is None:
        raise MissingExtensionError(
            "the compiled module backmatch._C is missing or cannot be loaded "
            f"({_import_error}); build it with `pip install .` in the source tree"
        ) from _import_error
    return _extension


def native_cuda() -> Any:
    """The CUDA half of the compiled module, ``backmatch._C.cuda``.

    Raises:
        MissingExtensionError: this build has no CUDA kernels.
    """
    cuda = getattr(native(), "cuda", None)
    if cuda is None:
        raise MissingExtensionError(
            "this build of backmatch has no CUDA kernels; rebuild it with nvcc on the PATH: "
            "`BACKMATCH_CUDA=1 pip install .` in the source tree"
        )
    return cuda


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register one operator with all its parts and return it, ready to call."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"backmatch::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"backmatch::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
    overload: Callable[..., Any] = getattr(torch.ops.backmatch, name).default
    return overload


def unobserved(*tensors: Tensor) -> bool:
    """Whether nobody would notice that an operator's implementation is called directly.

    That takes plain tensors (no lazily negated views), no gradient, no tracing and no transform
    (``vmap``, a dispatch mode). The dispatcher costs 6 microseconds, as much as a small system.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        all(type(value) is Tensor and not value.is_neg() for value in tensors)
        and not (torch.is_grad_enabled() and any(value.requires_grad for value in tensors))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on."""
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Torch drops the tangent at an operator that has no rule for it, and says nothing."""
    if not forward_mode():
        return
    forward: Any = torch.autograd.forward_ad  # untyped in torch
    if any(forward.unpack_dual(value).tangent is not None for value in tensors):
        raise NotImplementedError(
            "backmatch.linalg has no forward-mode derivatives: use reverse mode, or detach"
        )


def not_differentiable(name: str) -> Callable[..., Any]:
    """A backward that says so, instead of zeros or a warning."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"backmatch.linalg.{name} is not differentiable: detach its arguments, "
            "or build the matrix in torch and call spd_solve"
        )

    return backward


class _Guard(torch.autograd.Function):
    """Hands a result on; its backward is :func:`not_differentiable`."""

    @staticmethod
    def forward(ctx: Any, name: str, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        not_differentiable(ctx.name)(ctx, *grads)


def guarded(name: str, result: Tensor, *inputs: object) -> Tensor:
    """A result computed in plain torch that must not pass for differentiable.

    Detached if no input requires grad; else its backward raises, as an operator's does.
    """
    result = result.detach()
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in tensors):
        return result
    guard: Tensor = _Guard.apply(name, result, *tensors)  # type: ignore[no-untyped-call]
    return guard


def in_chunks(
    total: int, item_bytes: int, work: Callable[[slice], None], multiple: int = 1
) -> None:
    """Call ``work`` on consecutive slices of ``range(total)`` within the memory budget.

    ``work`` writes its part of a result allocated beforehand. A chunk whose allocation fails is
    halved and tried again, so that memory decides about speed, never about the result.

    Args:
        total: number of systems.
        item_bytes: what one system needs while it is worked on.
        work: called with a slice; every slice starts at a multiple of ``multiple``.
        multiple: number of consecutive systems that must stay together.
    """
    step = max(1, WORKSPACE_BYTES // max(1, item_bytes * multiple)) * multiple
    start = 0
    while start < total:
        stop = min(start + step, total)
        try:
            work(slice(start, stop))
        except (MemoryError, RuntimeError) as error:
            if stop - start <= multiple or not _is_out_of_memory(error):
                raise
        else:
            start = stop
            continue
        # Outside the handler: the exception's frames hold the tensors of the failed attempt.
        step = max(1, (stop - start) // (2 * multiple)) * multiple


def launch(
    device: torch.device,
    batch: int,
    workspace_bytes: Callable[[int], int],
    enqueue: Callable[[slice, int, int], None],
) -> None:
    """Enqueue a CUDA kernel on the current stream, in chunks whose workspace fits the budget.

    Args:
        device: where the tensors live; made current.
        batch: number of systems, at least 1.
        workspace_bytes: number of systems -> bytes that the kernel needs for them.
        enqueue: called with a slice of systems, the address of the workspace and the stream. The
            caching allocator hands a workspace out again on the same stream only, hence later.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream

        def work(part: slice) -> None:
            size = workspace_bytes(part.stop - part.start)
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            enqueue(part, workspace.data_ptr(), stream)

        in_chunks(batch, -(-workspace_bytes(batch) // batch), work)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
