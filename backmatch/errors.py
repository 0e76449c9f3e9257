"""Typed errors and warnings: every failure that backmatch can report has a class here.

All errors derive from :class:`BackMatchError`; each also derives from the built-in class
that a caller would expect to catch (``ValueError``, ``ArithmeticError``, ``RuntimeError``,
``ImportError``), so existing handlers keep working.
"""

from __future__ import annotations

from collections.abc import Sequence


class BackMatchError(Exception):
    """Base class of every error that backmatch raises on its own account."""


class NonFiniteError(BackMatchError, ArithmeticError):
    """NaN or Inf was found; names the tensor, how many entries, and the block if known.

    Attributes:
        tensor: name of the offending tensor.
        count: number of NaN or Inf entries in it.
        numel: total number of entries in it.
        block: name of the block whose problem it belongs to, or ``None``.
    """

    def __init__(self, tensor: str, count: int, numel: int, *, block: str | None = None) -> None:
        self.tensor, self.count, self.numel, self.block = tensor, count, numel, block
        where = "" if block is None else f" in block {block!r}"
        super().__init__(f"{tensor} has {count} non-finite (NaN or Inf) of {numel} entries{where}")


class NotPositiveDefiniteError(BackMatchError, ValueError):
    """A matrix that must be positive definite is not.

    Attributes:
        indices: flat batch indices of the failing matrices, ascending.
        pivots: for each of them the order of the leading minor that is not positive
            (1-based, the meaning of LAPACK's ``info`` in ``potrf``).
        batch: number of matrices in the call.
    """

    #: How many failing matrices the message lists before it only counts the rest.
    SHOWN = 8

    def __init__(
        self, what: str, indices: Sequence[int], pivots: Sequence[int], batch: int
    ) -> None:
        self.indices, self.pivots, self.batch = list(indices), list(pivots), batch
        pairs = zip(self.indices[: self.SHOWN], self.pivots[: self.SHOWN], strict=True)
        shown = ", ".join(f"{i} (pivot {p})" for i, p in pairs)
        rest = len(self.indices) - self.SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        super().__init__(
            f"{what} is not positive definite: {len(self.indices)} of {batch} systems failed, "
            f"batch index {shown}{more}; raise damping"
        )


class NotConvergedError(BackMatchError, RuntimeError):
    """An iterative solve stopped at its cap and ``strict=True`` asked for an error."""


class MissingExtensionError(BackMatchError, ImportError):
    """The compiled module ``backmatch._C`` (or its CUDA half) is not there."""


class ConvergenceWarning(UserWarning):
    """An iterative solve stopped at its cap before it reached its tolerance."""
