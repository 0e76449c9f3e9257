"""Study ``depth``: the blocks of deep nets, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import checks
from .draws import SAMPLES_PER_FEATURE, Draws, generator, nothing
from .nets import ACTIVATIONS, FAMILIES, net, spectra
from .result import Row, Study, gathered, row
from .spectra import Spectra

CLAIM = (
    "In real nets at initialisation skip and orthonormal blocks keep the input side conditioned at "
    "any depth, batch norm the weight side; neither does the other's."
)
#: Systems per block and net that are decomposed.
SYSTEMS = 16


def depth(
    *,
    size: int = 64,
    blocks: int = 12,
    nets: int = 5,
    seed: int = 0,
    check_stop: Callable[[], None] = nothing,
) -> Study:
    """Every block of deep nets of equal width at initialisation, both sides.

    Claim: what the studies of single blocks show holds along a net. The blocks see what the
    blocks below make of inputs that are uniform on [0.5, 1.5]. Derived here: with ReLU the
    outputs of all samples grow alike with depth (their mean part is handed on, the differences
    are not), so that on the weight side X^T X is ever more dominated by one direction, and a
    batch norm in each block takes that direction away each time.

    Not claimed: that the input side of a plain ReLU net is badly conditioned. On its range it is
    not: half of the rows drop out, and what remains is a wide matrix. ``rank`` shows the price.

    Args:
        size: width n of all blocks; 4n samples.
        blocks: number of blocks.
        nets: nets drawn for each case.
        seed: of the nets and their inputs.
        check_stop: called before every net; raises to end the study.

    Returns:
        Rows with ``family`` (of :data:`backmatch.analysis.nets.FAMILIES`), ``activation``,
        ``block`` (counted from 1) and ``side`` as their case, over 16 systems of each net: output
        units of the weight side, biases included, samples of the input side.

    Raises:
        TypeError, ValueError: an argument that is no int or too small.

    >>> study = depth(size=8, blocks=2, nets=1)
    >>> case = {"family": "orthonormal", "activation": "relu", "block": 2, "side": "input"}
    >>> round(study.find(**case)["kappa"]["median"], 9)
    1.0
    """
    drawn = Draws(size, checks.positive_int("nets", nets), seed, check_stop)
    checks.positive_int("blocks", blocks)
    options = {"size": size, "blocks": blocks, "nets": nets, "seed": seed}
    return gathered("depth", CLAIM, options, rows(drawn, blocks))


def rows(draws: Draws, blocks: int) -> Iterator[Row]:
    """One row after the other."""
    for activation in ACTIVATIONS:
        for family in FAMILIES:
            for side, each in along(draws, family, activation, blocks).items():
                for number, found in enumerate(each, 1):
                    case = {"family": family, "activation": activation, "block": number}
                    yield row("depth", {**case, "side": side}, found)


def along(draws: Draws, family: str, activation: str, blocks: int) -> dict[str, list[Spectra]]:
    """By side, the systems of every block over all nets."""
    found: dict[str, list[list[Spectra]]] = {"weight": [], "input": []}
    for number in range(draws.count):
        draws.check_stop()
        own = generator(draws.seed, 5, number)
        model = net(family, activation, [draws.size] * (blocks + 1), own)
        x = inputs(draws.size, own)
        for side, parts in found.items():
            parts.append(spectra(model, x, side, SYSTEMS))
    return {
        side: [Spectra.joined(list(each)) for each in zip(*parts, strict=True)]
        for side, parts in found.items()
    }


def inputs(size: int, own: torch.Generator) -> Tensor:
    """4n samples of n features, uniform on [0.5, 1.5]."""
    shape = (SAMPLES_PER_FEATURE * size, size)
    return torch.rand(*shape, dtype=torch.float64, generator=own) + 0.5
