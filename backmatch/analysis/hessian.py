"""``bm.local_hessian``: the Hessian of one block's back-matching loss, and its spectrum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from .. import checks
from ..errors import NonFiniteError
from ..precision import full_precision
from .curvature import Curvature
from .pose import Posed, pose
from .spectrum import Spectrum

#: Multiplications (per system: short side squared times long side) up to which all eigenvalues are
#: computed; a tenth of it where only k are asked for.
DENSE_WORK = 4e10
#: Eigenvalues that Lanczos computes where all are too many and ``k`` is not given.
DEFAULT_K = 10
#: Unknowns up to which :meth:`LocalHessian.to_dense` forms the matrix.
MOST_DENSE = 2**14


def local_hessian(
    block: nn.Module,
    z: Tensor,
    side: str = "input",
    displacement: Tensor | None = None,
    k: int | None = None,
    *,
    rcond: float | None = None,
) -> LocalHessian:
    """The local Hessian of one block at its present parameters and the input ``z``.

    Without ``displacement`` the Gauss-Newton Hessian that the sweep solves with (derived here):
    ``side="weight"``: H_W = J_W^T J_W / m over all trainable parameters jointly, in the order of
    ``block.named_parameters()``, each flattened; ``side="input"``: H_z = J_z^T J_z over the input
    of the whole batch, flattened. With it the full Hessian of the local loss
    ``1/(2m) |T(W) - zhat|^2`` (inputs: without 1/m) at ``zhat = T + displacement``:
    ``(J^T J - sum_i r_i grad^2 T_i) / m``, which may be indefinite.

    The block runs once, on copies of its state: parameters, grads, buffers and RNG stay as they
    are, forward hooks fire once, dropout keeps the mask of that one run, batch norm in training
    mode its batch statistics. The result stays true to this moment when the block moves on.

    Args:
        block: any module whose input and output have the sample as dimension 0; several layers
            as one block in an ``nn.Sequential``.
        z: its input, shape (m, ...), float32 or float64 like the parameters; integers where the
            block takes them, for ``side="weight"``.
        side: ``"input"`` or ``"weight"``.
        displacement: r = zhat - T(z), shape of the output: the full Hessian instead.
        k: only the k eigenvalues of largest magnitude. ``None``: all where that is affordable,
            else 10.
        rcond: eigenvalues of magnitude up to rcond^2 times the largest of their own system count
            as zero. ``None``: what rounding leaves, see :attr:`LocalHessian.rank`.

    Raises:
        NonFiniteError: NaN or Inf in z, the displacement, a parameter, the output or a derivative.
        TypeError, ValueError: no module, wrong shape, dtype or device, autocast, inference mode,
            an empty batch, no trainable parameter on the weight side, an integer z on the input
            side, a block without second derivatives where the full Hessian is asked for.

    Example:
        An orthonormal W has condition number 1, and a skip connection bounds that of I + aW:

        >>> import torch, backmatch as bm
        >>> _ = torch.manual_seed(0)
        >>> linear = torch.nn.Linear(8, 8, bias=False).double()
        >>> _ = torch.nn.init.orthogonal_(linear.weight)
        >>> z = torch.randn(5, 8).double()
        >>> H = bm.local_hessian(linear, z)
        >>> H.shape, H.rank, round(H.condition_number, 6)
        ((40, 40), 40, 1.0)
        >>> with torch.no_grad():
        ...     _ = linear.weight.mul_(0.5)  # H keeps to W as it was
        >>> skip = bm.local_hessian(bm.blocks.Residual(linear), z)
        >>> skip.condition_number <= ((1 + 0.5) / (1 - 0.5)) ** 2
        True
    """
    checks.choice("side", side, ("input", "weight"))
    if k is not None:
        checks.positive_int("k", k)
    if rcond is not None:
        checks.non_negative("rcond", rcond)
    return LocalHessian(pose(block, z, side, displacement), k, rcond)


class LocalHessian:
    """A local Hessian as a linear operator with its spectrum; made by :func:`local_hessian`.

    What is expensive is computed when first asked for. ``H @ v`` takes flat vectors (size,) or
    columns (size, c).

    Attributes:
        side: ``"input"`` or ``"weight"``.
        kind: ``"gauss-newton"`` or ``"full"``.
        samples: m.
        shape: (size, size).
        size: number of unknowns; :attr:`unknowns` is the same number.
        names: parameter names in the order of the unknowns; ``("z",)`` on the input side.
        dtype, device: of the block.
    """

    def __init__(self, posed: Posed, k: int | None, rcond: float | None) -> None:
        self._curvature: Curvature = posed.curvature
        self._shapes, self._moment = posed.shapes, posed.moment
        self._k, self._rcond = k, rcond
        self.side, self.kind, self.samples = posed.side, posed.kind, posed.samples
        self.block, self.names = posed.name, tuple(posed.shapes)
        self.size = self.unknowns = self._curvature.layout.size
        self.shape = (self.size, self.size)
        self.dtype, self.device = self._curvature.like.dtype, self._curvature.like.device

    def __repr__(self) -> str:
        return (
            f"LocalHessian(block={self.block!r}, side={self.side!r}, kind={self.kind!r}, "
            f"size={self.size}, samples={self.samples}, dtype={self.dtype})"
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        inside = nullcontext() if self._moment is None else self._moment.inside()
        with torch.no_grad(), full_precision(), inside:
            yield

    @cached_property
    def _spectrum(self) -> Spectrum:
        curvature, k = self._curvature, self._k
        with self._computing():
            work = DENSE_WORK if k is None else DENSE_WORK / 10
            found = curvature.all_eigenvalues(work, self._rcond)
            if found is None and k is not None and k >= self.size:
                found = curvature.all_eigenvalues(math.inf, self._rcond)
            if found is None:
                wanted = min(DEFAULT_K if k is None else k, self.size - 1)
                found = curvature.extreme_eigenvalues(wanted, self._rcond)
        checks.finite("eigenvalues", found.values, block=self.block)
        return found

    @property
    def eigenvalues(self) -> Tensor:
        """Descending, with their sign, zeros included: all of them, or the k of largest magnitude.

        :attr:`is_complete` tells which, unless ``k`` was given. In the block's dtype and on its
        device; a tensor of the caller's own.
        """
        found = self._spectrum if self._k is None else self._spectrum.extreme(self._k)
        return found.values.to(self.dtype, copy=True)

    @property
    def is_complete(self) -> bool:
        """Whether all eigenvalues are known, so that rank and condition number are."""
        return self._spectrum.complete

    @property
    def method(self) -> str:
        """How the eigenvalues were computed.

        ``"closed form"``; ``"svd"``: singular values of J, in float64; ``"gram"``: eigenvalues of
        J^T J or J J^T; ``"eigh"``: of the full Hessian; ``"lanczos"``.
        """
        return self._spectrum.method

    @property
    def spectral_norm(self) -> float:
        """The largest magnitude of an eigenvalue."""
        values = self._spectrum.values
        return float(values.abs().max()) if values.numel() else 0.0

    @property
    def rank(self) -> int:
        """Number of eigenvalues that are not zero.

        One counts as zero where sqrt(|lambda|) is at most c times its maximum over the same
        system (sample, output unit or block): c = ``rcond`` if given, else n eps where singular
        values of J are known (n the shorter side of J), eps where they have a closed form, and
        sqrt(n eps) where only eigenvalues are (n the longer side). eps is the block's dtype's.

        Raises:
            ValueError: not all eigenvalues are known.
        """
        return int(self._complete("rank").counted.sum())

    @property
    def condition_number(self) -> float:
        """Largest over smallest magnitude on the range; NaN for the zero matrix.

        Raises:
            ValueError: not all eigenvalues are known.
        """
        found = self._complete("condition_number")
        sizes = found.values[found.counted].abs()
        return float(sizes.max() / sizes.min()) if sizes.numel() else math.nan

    def _complete(self, name: str) -> Spectrum:
        if not self._spectrum.complete:
            raise ValueError(
                f"{name} needs all eigenvalues: this {self.size} x {self.size} Hessian is so large "
                f"that only the {self._spectrum.values.numel()} largest are computed; pass fewer "
                "samples, or use kappa(p)"
            )
        return self._spectrum

    def kappa(self, p: int) -> float:
        """lambda_max / lambda_p, lambda_p the p-th largest eigenvalue, counted from 1.

        By magnitude, which makes a difference for an indefinite full Hessian only. Infinite where
        lambda_p counts as zero; NaN for the zero matrix.

        Raises:
            TypeError, ValueError: p is no int, below 1, or above the number of known eigenvalues.
        """
        checks.positive_int("p", p)
        found = self._spectrum
        if p > found.values.numel():
            known = "size" if found.complete else "number of computed eigenvalues (raise k)"
            raise ValueError(f"p must be at most {found.values.numel()}, the {known}, got {p}")
        order = torch.sort(found.values.abs(), descending=True, stable=True).indices
        first, chosen = order[0], order[p - 1]
        if not bool(found.counted[first]):
            return math.nan
        if not bool(found.counted[chosen]):
            return math.inf
        return float((found.values[first] / found.values[chosen]).abs())

    @cached_property
    def _own_trace(self) -> tuple[float, bool]:
        with self._computing():
            total, exact = self._curvature.trace()
        if not math.isfinite(total):
            raise NonFiniteError("the trace", 1, 1, block=self.block)
        return total, exact

    @property
    def _trace(self) -> tuple[float, bool]:
        """Exact as soon as all eigenvalues have been asked for."""
        if not self._own_trace[1] and "_spectrum" in self.__dict__ and self._spectrum.complete:
            return float(self._spectrum.values.sum()), True
        return self._own_trace

    @property
    def trace(self) -> float:
        """Sum of all eigenvalues; :attr:`trace_is_exact` tells whether it was estimated."""
        return self._trace[0]

    @property
    def trace_mean(self) -> float:
        """Trace over size: the mean eigenvalue, the scalar of ``Scalar(kind="trace")``."""
        return self._trace[0] / self.size

    @property
    def trace_is_exact(self) -> bool:
        """Otherwise Hutchinson's estimate with 16 probes of a fixed seed."""
        return self._trace[1]

    def matvec(self, v: Tensor) -> Tensor:
        """H v for a flat vector (size,), or for every column of (size, c).

        Raises:
            NonFiniteError: v or a derivative holds NaN or Inf.
            TypeError, ValueError: v has another shape, dtype or device.
        """
        checks.tensor("v", v)
        like = self._curvature.like
        checks.same("v", v, "the block", like)
        if v.dim() not in (1, 2) or v.shape[0] != self.size:
            raise ValueError(
                f"v must have shape ({self.size},) or ({self.size}, columns), got {tuple(v.shape)}"
            )
        layout = self._curvature.layout
        with self._computing():
            columns = v.detach().reshape(self.size, -1).t().contiguous()
            found = [layout.to_flat(self._curvature.product(layout.to_systems(c))) for c in columns]
        out = torch.stack(found, 1) if found else torch.zeros_like(v)
        checks.finite("H @ v", out, block=self.block)
        return out.reshape(v.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A flat vector as one tensor per name, in the shapes of the parameters or of z."""
        if v.shape != (self.size,):
            raise ValueError(f"v must have shape ({self.size},), got {tuple(v.shape)}")
        parts = torch.split(v, [shape.numel() for shape in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}

    def to_dense(self) -> Tensor:
        """The matrix, (size, size), symmetric to the last bit.

        Raises:
            ValueError: more than 16384 unknowns.
        """
        if self.size > MOST_DENSE:
            raise ValueError(
                f"to_dense forms at most {MOST_DENSE} x {MOST_DENSE} entries, this Hessian has "
                f"{self.size} unknowns; use H @ v or to_scipy()"
            )
        with self._computing():
            blocks = self._curvature.blocks()
            checks.finite("the local Hessian", blocks, block=self.block)
            return self._curvature.layout.to_dense((blocks + blocks.mT) / 2)

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays of the block's dtype."""
        like = self._curvature.like

        def apply(v: object) -> object:
            given = torch.as_tensor(v)
            if given.is_complex():
                raise TypeError(f"v must be real, got {given.dtype}")
            return self.matvec(given.to(like)).cpu().numpy()

        dtype = str(self.dtype).removeprefix("torch.")
        return LinearOperator(self.shape, matvec=apply, rmatvec=apply, matmat=apply, dtype=dtype)
