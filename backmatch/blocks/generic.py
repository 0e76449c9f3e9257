"""Any module: J and J^T by autodiff on the graph of its one forward pass.

J^T u is a backward pass. J v is the derivative of u -> J^T u, a backward pass through the backward
pass: no second forward pass, so hooks fire once, dropout keeps its mask and running statistics
move once. Where a backward pass cannot be differentiated, forward-mode autodiff takes over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..problems import LeastSquares, Operator
from .base import Block, Linearisation, Named
from .products import NoPushforwardError, Products
from .replay import HookRecorder


class GenericBlock(Block):
    """A module without known structure."""

    always_replayable = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.hooks = HookRecorder(module)
        self._places = _places(module)
        self._has_group_norm = any(isinstance(part, nn.GroupNorm) for part in module.modules())

    def _linearise(
        self, z: Tensor, with_input: bool, parameters: Named | None
    ) -> GenericLinearisation:
        named = self.parameters_plus(None) if parameters is None else parameters
        leaves = {key: value.detach().requires_grad_() for key, value in named.items()}
        leaf = z.detach()
        if leaf.is_floating_point():
            leaf = leaf.requires_grad_(with_input)
        with _differentiable(self.module):
            if parameters is None:
                with self.hooks.recording():
                    output = self._call(leaves, leaf)
            else:
                output = self._again(leaf, leaves)
        self._check(output, z)
        return GenericLinearisation(self, leaf, leaves, output)

    def _again(self, z: Tensor, leaves: Named) -> Tensor:
        assert self.replay is not None
        with self.hooks.essential_only():
            return self._call({**leaves, **self.replay.fresh_buffers()}, z)

    def _call(self, state: Named, z: Tensor) -> Tensor:
        """The module on ``z`` with some of its parameters and buffers replaced.

        Every place where a shared tensor stands is named; torch's own tying of names would swap
        one module that stands twice in a Sequential twice, and put the wrong tensor back.
        """
        everywhere = {place: state[name] for place, name in self._places.items() if name in state}
        # torch's GroupNorm crashes on channels_last maps when the parameters alone need a gradient.
        layout = torch.contiguous_format if self._has_group_norm else torch.preserve_format
        own = z.clone(memory_format=layout)
        output: Tensor = functional_call(self.module, everywhere, (own,), tie_weights=False)
        return output

    def pushforward(self, z: Tensor, parameters: Named, v: Named) -> Tensor:
        """J v by forward mode: evaluates the block again. The key "" of ``v`` stands for z."""
        point = {name: leaf.detach() for name, leaf in {"": z, **parameters}.items()}
        names = list(v)

        def run(*values: Tensor) -> Tensor:
            named = {**point, **dict(zip(names, values, strict=True))}
            return self._again(named.pop(""), named)

        assert self.replay is not None
        with self.replay.again(), _differentiable(self.module):
            try:
                tangent: Tensor = _quiet_jvp(
                    run, tuple(point[name] for name in names), tuple(v.values())
                )[1]
            except (NotImplementedError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise NoPushforwardError(
                    f"block {self.name!r} ({type(self.module).__name__}) has neither a "
                    "differentiable backward pass nor forward-mode derivatives, so that only "
                    f"Gradient() can work on it: {error}"
                ) from error
        return tangent.detach()

    def _check(self, output: object, z: Tensor) -> None:
        kind = type(self.module).__name__
        if not isinstance(output, Tensor):
            raise TypeError(
                f"block {self.name!r} ({kind}) must return a tensor, got {type(output).__name__}"
            )
        expected = {p.dtype for p in self.module.parameters()}
        expected = expected or ({z.dtype} if z.is_floating_point() else set(checks.DTYPES))
        if output.dtype not in expected:
            raise TypeError(
                f"block {self.name!r} ({kind}) must return {expected.pop()}, got {output.dtype}"
            )
        if output.dim() < 1 or output.shape[0] != z.shape[0]:
            raise ValueError(
                f"block {self.name!r} ({kind}) must keep dimension 0, the sample: expected "
                f"({z.shape[0]}, ...), got {tuple(output.shape)}"
            )


class GenericLinearisation(Linearisation):
    """The autodiff graph of one evaluation."""

    def __init__(self, block: GenericBlock, z: Tensor, leaves: Named, output: Tensor) -> None:
        self.block, self.z, self.leaves, self.graph = block, z, leaves, output
        self.output = output.detach()
        self.samples = z.shape[0]
        self._coupled: bool | None = True if couples_batch(block.module) else None

    def weight_problem(self, displacement: Tensor) -> LeastSquares:
        sizes = [leaf.numel() for leaf in self.leaves.values()]
        shapes = [leaf.shape for leaf in self.leaves.values()]
        autodiff = self._products(list(self.leaves), list(self.leaves.values()))

        def forward(step: Tensor) -> Tensor:
            parts = [p.view(s) for p, s in zip(torch.split(step[0], sizes), shapes, strict=True)]
            return autodiff.jvp(parts).reshape(1, -1)

        def reverse(cotangent: Tensor) -> Tensor:
            parts = autodiff.vjp(cotangent.reshape(self.graph.shape))
            return torch.cat([part.reshape(-1) for part in parts]).unsqueeze(0)

        return Operator(
            forward,
            reverse,
            sum(sizes),
            displacement.reshape(1, -1),
            1.0 / self.samples,
            "joint",
            f"the weight problem of block {self.block.name!r} ({type(self.block.module).__name__})",
        )

    def weight_step(self, step: Tensor) -> Named:
        sizes = [leaf.numel() for leaf in self.leaves.values()]
        parts = torch.split(step[0], sizes)
        return {
            name: part.view(leaf.shape)
            for (name, leaf), part in zip(self.leaves.items(), parts, strict=True)
        }

    def input_problem(self, displacement: Tensor) -> LeastSquares:
        autodiff = self._products([""], [self.z])
        systems = 1 if self._is_coupled(autodiff) else self.samples

        def forward(step: Tensor) -> Tensor:
            return autodiff.jvp([step.reshape(self.z.shape)]).reshape(systems, -1)

        def reverse(cotangent: Tensor) -> Tensor:
            (part,) = autodiff.vjp(cotangent.reshape(self.graph.shape))
            return part.reshape(systems, -1)

        return Operator(
            forward,
            reverse,
            self.z.numel() // systems,
            displacement.reshape(systems, -1),
            1.0,
            "joint" if systems == 1 and self.samples > 1 else "sample",
            f"the input problem of block {self.block.name!r} ({type(self.block.module).__name__})",
        )

    def input_step(self, step: Tensor) -> Tensor:
        return step.reshape(self.z.shape)

    def _products(self, names: list[str], leaves: list[Tensor]) -> Products:
        def pushforward(v: Named) -> Tensor:
            return self.block.pushforward(self.z, self.leaves, v)

        return Products(self.graph, dict(zip(names, leaves, strict=True)), pushforward)

    def _is_coupled(self, autodiff: Products) -> bool:
        """One probe: what moves one sample must not move, or be moved by, another."""
        if self._coupled is None:
            chosen = self.samples // 2
            others = torch.arange(self.samples, device=self.z.device) != chosen
            generator = torch.Generator().manual_seed(0)

            def probe(like: Tensor) -> Tensor:
                full = torch.zeros_like(like)
                noise = torch.randn(
                    like.shape[1:], generator=generator, dtype=torch.float64, device="cpu"
                )
                full[chosen] = noise.to(full)
                return full

            (movers,) = autodiff.vjp(probe(self.output))
            self._coupled = bool(movers[others].any())
            if not self._coupled:
                # Without J v the gradient can still be had, and J^T u has been asked.
                with suppress(NoPushforwardError):
                    self._coupled = bool(autodiff.jvp([probe(self.z)])[others].any())
        return self._coupled


def _quiet_jvp(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``torch.func.jvp`` without the deprecation warnings of torch's own first import for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pushed: tuple[Tensor, ...] = torch.func.jvp(function, primals, tangents)
    return pushed


def _places(module: nn.Module) -> dict[str, str]:
    """Every place (module and attribute) that holds a parameter or buffer -> its first name."""
    first: dict[int, str] = {}
    places: dict[str, str] = {}
    for prefix, part in module.named_modules():
        for table in (part._parameters, part._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    place = f"{prefix}.{key}" if prefix else key
                    places[place] = first.setdefault(id(tensor), place)
    return places


def couples_batch(module: nn.Module) -> bool:
    """Whether a module says, or is known, to mix the samples of a batch."""
    return any(
        getattr(part, "batch_coupled", False) is True
        or (isinstance(part, _BatchNorm) and (part.training or part.running_mean is None))
        for part in module.modules()
    )


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Twice differentiable attention, and eager code where parts are compiled."""
    compiled = any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        for part in module.modules()
    )
    # Compiled graphs have no double backward; fused attention kernels have none either.
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), eager:
        yield
