"""Study ``width``: nets of four blocks, the width swept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .. import checks
from .depths import along
from .draws import Draws, nothing
from .nets import ACTIVATIONS, FAMILIES
from .result import Row, Study, gathered, row
from .spectra import Spectra

CLAIM = (
    "Without remedy the condition numbers grow with the width, on the input side unless ReLU cuts "
    "the rank, and on the weight side; skip, orthonormal and batch norm stop that, each on its "
    "side."
)
WIDTHS = (8, 16, 32, 64, 128)
#: Blocks of every net.
BLOCKS = 4


def width(
    *,
    widths: Sequence[int] = WIDTHS,
    nets: int = 3,
    seed: int = 0,
    check_stop: Callable[[], None] = nothing,
) -> Study:
    """All blocks of nets of four blocks at initialisation, the width n swept.

    Claim: the wider, the more a remedy matters. Derived here: the smallest singular value of a
    square Gaussian matrix with entries of variance 1/n is of order 1/n, so kappa(W^T W) is of
    order n^2 (known; the median of the limit law is 13.5 n^2); |I + aW| and its inverse stay
    bounded for a < 1/2. On the weight side of the first block the mean part of X has an eigenvalue
    of order n while, at a fixed number of samples per feature, the rest stays where it is; with a
    bias the smallest eigenvalue is of order 1/n besides (what the column of ones has beyond the
    columns of X), so that kappa grows like n^2.

    Not claimed: anything about nets whose samples do not grow with the width.

    Args:
        widths: the n, each at least 2; 4n samples.
        nets: nets drawn for each case.
        seed, check_stop: as in :func:`backmatch.analysis.depth`.

    Returns:
        Rows with ``family``, ``activation``, ``width`` and ``side`` as their case, over all blocks
        and 16 systems of each of them.

    Raises:
        TypeError, ValueError: an argument that is no int or too small, no width.

    >>> study = width(widths=[4, 8], nets=1)
    >>> case = {"family": "orthonormal", "activation": "relu", "width": 8, "side": "input"}
    >>> round(study.find(**case)["kappa"]["median"], 9)
    1.0
    """
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise TypeError(f"widths must be a sequence of ints, got {type(widths).__name__}")
    chosen = [checks.positive_int("widths", n) for n in widths]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"widths must hold at least one width, each once, got {chosen}")
    drawn = [Draws(n, checks.positive_int("nets", nets), seed, check_stop) for n in chosen]
    options = {"widths": chosen, "nets": nets, "seed": seed}
    found = (one for draws in drawn for one in rows(draws))
    return gathered("width", CLAIM, options, found)


def rows(draws: Draws) -> Iterator[Row]:
    """The rows of one width, one after the other."""
    for activation in ACTIVATIONS:
        for family in FAMILIES:
            for side, each in along(draws, family, activation, BLOCKS).items():
                case = {"family": family, "activation": activation, "width": draws.size}
                yield row("width", {**case, "side": side}, Spectra.joined(each))
