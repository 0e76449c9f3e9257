"""What ``--methods`` names: each method is a set of options of ``backmatch train``.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..training.config import unknown


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: as in ``--methods``.
        title: what it is, for people.
        options: of ``backmatch train``.
        grid: the first and the last of the rates that tuning begins with, see :func:`rate`.
        place: position on the continuum from back-propagation to exact; ``None``: beside it.
    """

    name: str
    title: str
    options: Mapping[str, Any]
    grid: tuple[int, int]
    place: float | None = None

    def rates(self) -> list[float]:
        """The learning rates that tuning begins with, ascending."""
        first, last = self.grid
        return [rate(k) for k in range(first, last + 1)]


def rate(place: int) -> float:
    """Learning rates three to a decade: 1, 2, 5, 10, ..

    >>> [rate(k) for k in (-4, -3, -2, -1, 0, 1)]
    [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    """
    return float(f"{'125'[place % 3]}e{place // 3}")


_BP = {"method": "bp"}
#: A direct or conjugate-gradient step is meant for lr 1.
_AROUND_ONE = (-2, 1)

_NAMED = (
    Method("bp-sgd", "back-propagation, SGD", {**_BP, "momentum": 0.0}, (-3, 0), 0.0),
    Method("bp-momentum", "back-propagation, momentum 0.9", {**_BP, "momentum": 0.9}, (-5, -2)),
    Method("bp-adam", "back-propagation, Adam", {**_BP, "optimizer": "adam"}, (-7, -4)),
    Method(
        "layerwise-adaptive",
        "momentum 0.9, gradients over a scalar of the own block, normalised",
        {**_BP, "optimizer": "layerwise-adaptive", "momentum": 0.9, "normalize": True},
        (-5, -2),
    ),
    Method(
        "scale-amended",
        "momentum 0.9, gradients over scalars of the block and all above, normalised",
        {**_BP, "optimizer": "scale-amended", "momentum": 0.9, "normalize": True},
        (-5, -2),
    ),
    Method(
        "scalar",
        "one scalar per block and side",
        {"weights": "scalar", "inputs": "scalar"},
        (-9, -6),
    ),
    Method(
        "foof",
        "FOOF: exact weights layer by layer, back-propagated inputs",
        {"blocks": "layer", "inputs": "gradient", "weight_damping": 0.1},
        _AROUND_ONE,
    ),
    Method("exact-weights", "exact weights, inputs by gradient", {"inputs": "gradient"}, (-3, 0)),
    Method("exact-inputs", "exact inputs, weights by gradient", {"weights": "gradient"}, (-3, 0)),
    Method(
        "exact-undamped",
        "exact, weights of minimum norm: where the method fails on minibatches",
        {"weight_damping": 0.0},
        _AROUND_ONE,
    ),
    Method(
        "layer-inverse",
        "exact weights, inputs by inverted layers",
        {"inputs": "layer-inverse"},
        _AROUND_ONE,
    ),
    Method("exact", "exact weights and inputs", {}, _AROUND_ONE, float("inf")),
)
NAMED: dict[str, Method] = {method.name: method for method in _NAMED}

#: In the order of the table. exact-undamped is slow and must be asked for; layer-inverse joins
#: where the net can be inverted.
DEFAULT = (
    "bp-sgd",
    "bp-momentum",
    "bp-adam",
    "layerwise-adaptive",
    "scale-amended",
    "scalar",
    "foof",
    "cg-1",
    "cg-2",
    "cg-4",
    "cg-8",
    "exact-weights",
    "exact-inputs",
    "exact",
)
_CG = re.compile(r"cg-([1-9][0-9]{0,5})")


def find(name: str) -> Method:
    """The method of that name; ``cg-K`` takes exactly K steps of conjugate gradient on both sides.

    Raises:
        ValueError: there is none; the text names the nearest one.

    >>> find("cg-3").options["cg_steps"], find("exact").rates()
    (3, [0.2, 0.5, 1.0, 2.0])
    """
    if name in NAMED:
        return NAMED[name]
    steps = _CG.fullmatch(name)
    if steps is None:
        known = [*NAMED, *(method for method in DEFAULT if method not in NAMED)]
        raise ValueError(unknown("method", name, known, "backmatch compare --help"))
    count = int(steps[1])
    return Method(
        name,
        f"conjugate gradient, {count} step{'s' if count > 1 else ''} on both sides",
        {"weights": "cg", "inputs": "cg", "cg_steps": count},
        _AROUND_ONE,
        float(count),
    )
