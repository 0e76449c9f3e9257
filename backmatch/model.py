"""What a model must be for a sweep: checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from . import checks
from .blocks import Block
from .blocks.unwrap import refuse_hooks, unwrapped
from .partitioning import plain_sequential


def chain(blocks: nn.Module | Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Name -> block, bottom first, from a Sequential or an iterable of modules."""
    if isinstance(blocks, nn.Module):
        blocks = unwrapped(blocks)
        if not isinstance(blocks, nn.ModuleList) and not plain_sequential(blocks):
            raise TypeError(
                "blocks must be an nn.Sequential or an iterable of modules, got the module "
                f"{type(blocks).__name__}; pass [block, ...] in the order they are applied"
            )
        refuse_hooks(blocks)
        items = list(blocks._modules.items())
    else:
        if not isinstance(blocks, Iterable):
            raise TypeError(
                "blocks must be an nn.Sequential or an iterable of modules, got "
                f"{type(blocks).__name__}"
            )
        items = [(str(i), block) for i, block in enumerate(blocks)]
    if not items:
        raise ValueError("blocks must hold at least one module, got none")
    named: dict[str, nn.Module] = {}
    for name, block in items:
        if not isinstance(block, nn.Module):
            raise TypeError(f"block {name!r} must be an nn.Module, got {type(block).__name__}")
        named[name] = unwrapped(block)
        for part in named[name].modules():
            unwrapped(part)
    refuse_shared({name: dict(block.named_parameters()) for name, block in named.items()})
    return named


def refuse_shared(blocks: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """One parameter in two blocks would get two steps. Takes the parameters of every block."""
    owner: dict[int, str] = {}
    for name, parameters in blocks.items():
        for key, parameter in parameters.items():
            first = owner.setdefault(id(parameter), name)
            if first != name:
                raise ValueError(
                    f"blocks {first!r} and {name!r} share the parameter {key!r}; put both uses "
                    "into one block"
                )


def check_ready(x: object, name: str = "x") -> None:
    """Refuse a grad mode, input or dtype that a sweep cannot work with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise TypeError(
            f"{name} must be no inference tensor, and inference mode off: use torch.no_grad"
        )
    if x.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} must live on a CPU or CUDA device, got {x.device}")
    for device in {"cpu", x.device.type}:
        if torch.is_autocast_enabled(device):
            raise TypeError("autocast must be off: local problems need float32 or float64")
    if x.is_floating_point() or x.is_complex():
        checks.tensor(name, x)
    if x.dim() < 1 or x.numel() < 1:
        raise ValueError(
            f"{name} must hold at least one sample, shape (m, ...), got {tuple(x.shape)}"
        )
    checks.finite(name, x)


def check_parameters(x: Tensor, blocks: list[Block], name: str = "x") -> None:
    """One dtype and one device for all parameters and x; no NaN or Inf."""
    first: tuple[str, Tensor] | None = (name, x) if x.is_floating_point() else None
    for block in blocks:
        for key, parameter in block.parameters.items():
            if first is not None and _is_usual(parameter, first[1], x):
                continue
            label = f"parameter {key!r} of block {block.name!r}"
            if type(parameter) is not nn.Parameter:
                raise TypeError(f"{label} must be a plain parameter, got {type(parameter)}")
            checks.tensor(label, parameter)
            if parameter.is_inference():
                raise TypeError(f"{label} must be no inference tensor: make the model outside it")
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise TypeError(f"the grad of {label} must be dense, got {parameter.grad.layout}")
            if first is None:
                first = (label, parameter)
            checks.same(label, parameter, *first)
            if parameter.device != x.device:
                raise ValueError(f"{label} must be on the device of {name}, got {parameter.device}")
    checks.all_finite(
        (f"parameter {key!r}", parameter, block.name)
        for block in blocks
        for key, parameter in block.parameters.items()
    )


def _is_usual(parameter: nn.Parameter, first: Tensor, x: Tensor) -> bool:
    """Nothing to complain of; what there is, the caller finds out."""
    return (
        type(parameter) is nn.Parameter
        and parameter.dtype == first.dtype
        and parameter.dtype in checks.DTYPES
        and parameter.device == x.device
        and parameter.layout == torch.strided
        and not parameter.is_inference()
        and (parameter.grad is None or parameter.grad.layout == torch.strided)
    )
