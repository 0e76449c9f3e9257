"""Study ``training``: how the local Hessians of a net move while it learns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import checks
from ..matching import BackMatching
from ..training.data import Dataset, batches, load
from .draws import Draws, generator, nothing
from .nets import FAMILIES, net, spectra
from .result import Row, Study, gathered, quantiles, row
from .spectra import Spectra

CLAIM = (
    "What initialisation, skip connections and batch norm do to the local Hessians does not hold "
    "at the start alone: it fades while the net learns, but does not vanish."
)
#: After so many steps (of a whole run's number) it is looked at.
MARKS = (0.0, 0.02, 0.05, 0.17, 0.5, 1.0)
METHODS = ("bp", "backmatch")
DATA = ("digits", "synthetic")
#: Learning rate of torch's SGD by method; 1 takes the exact step as it is.
RATES = {"bp": 0.1, "backmatch": 1.0}
BATCH = 128
#: Training samples at which the Hessians are taken.
PROBE = 256
HIDDEN = 3


@dataclass(frozen=True)
class Look:
    """One net after some steps.

    Attributes:
        loss: mean cross-entropy of the probe samples, in nats.
        sides: ``"weight"`` and ``"input"``: the systems of every block.
    """

    step: int
    loss: float
    sides: dict[str, list[Spectra]]


def training(
    *,
    size: int = 64,
    nets: int = 3,
    steps: int = 66,
    methods: Sequence[str] = METHODS,
    data: str = "digits",
    seed: int = 0,
    check_stop: Callable[[], None] = nothing,
) -> Study:
    """Four kinds of ReLU nets with three hidden layers while they learn to classify.

    Claim: the conditioning at initialisation is felt throughout training. Nothing is derived here,
    it is only observed: every net is trained from the same batches by back-propagation with SGD
    (learning rate 0.1) and by exact back-matching (its default dampings, learning rate 1), and
    after some steps the local Hessians of all blocks are taken at the first 256 training samples.

    Not claimed: that better conditioning is why a net learns faster; that is another experiment.
    One data set, small nets and few seeds show no law.

    Args:
        size: width of the hidden layers.
        nets: nets drawn for each case; net k sees its batches in the order of seed + k.
        steps: of 128 samples each.
        methods: of ``"bp"`` and ``"backmatch"``.
        data: ``"digits"`` (needs scikit-learn), ``"synthetic"``, or the path of an ``.npz`` file
            as for ``backmatch train``.
        seed: of the nets and the order of the samples.
        check_stop: called before every step; raises to end the study.

    Returns:
        Rows with ``family``, ``method``, ``step``, ``block`` (from 1, the last is the Linear on
        top) and ``side`` as their case. The quantiles are over systems, one per output unit or
        (32) samples; ``whole`` has ``kappa``, ``spectral_norm`` and ``trace_mean`` of the whole
        block, all these systems together, medians over the nets. Rows without ``block`` have the
        ``loss`` (mean cross-entropy in nats of the 256 samples).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, too small, or unknown.
        UsageError: the data cannot be had.

    >>> study = training(size=8, nets=1, steps=2, methods=["bp"], data="synthetic")
    >>> study.find(family="skip", method="bp", step=0, block=2, side="input")["rank"]["median"]
    8.0
    """
    drawn = Draws(size, checks.positive_int("nets", nets), seed, check_stop)
    checks.positive_int("steps", steps)
    _check_choices(methods, data)
    options = {"size": size, "nets": nets, "steps": steps, "methods": list(methods), "data": data}
    samples = prepared(data)
    found = (one for method in methods for one in rows(drawn, steps, method, samples))
    return gathered("training", CLAIM, {**options, "seed": seed}, found)


def _check_choices(methods: object, data: object) -> None:
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise TypeError(f"methods must be a sequence of names, got {type(methods).__name__}")
    for method in methods:
        checks.choice("methods", method, METHODS)
    if not methods or len(set(methods)) < len(methods):
        known = ", ".join(METHODS)
        raise ValueError(f"methods must hold some of {known}, each once, got {list(methods)}")
    if not isinstance(data, str):
        raise TypeError(f"data must be a name or a path as a str, got {type(data).__name__}")
    if data not in DATA and not data.endswith(".npz"):
        raise ValueError(f"data must be one of {', '.join(DATA)} or FILE.npz, got {data!r}")


def prepared(data: str) -> Dataset:
    """The data set in float64, samples flattened.

    Raises:
        UsageError: the file (or scikit-learn, for digits) is missing or unusable.
        ValueError: it has fewer samples than a batch.
    """
    found = load(data, torch.float64)
    if len(found.x_train) < BATCH:
        raise ValueError(f"data must have at least {BATCH} samples, got {len(found.x_train)}")
    return replace(found, x_train=found.x_train.flatten(1), x_test=found.x_test.flatten(1))


def rows(draws: Draws, steps: int, method: str, data: Dataset) -> Iterator[Row]:
    """The rows of one method, family by family."""
    for family in FAMILIES:
        looks = [list(_run(draws, family, k, steps, method, data)) for k in range(draws.count)]
        for same in zip(*looks, strict=True):
            case = {"family": family, "method": method, "step": same[0].step}
            losses = torch.tensor([look.loss for look in same], dtype=torch.float64)
            yield {"study": "training", "case": case, "loss": quantiles(losses)}
            for side in ("weight", "input"):
                parts = zip(*(look.sides[side] for look in same), strict=True)
                for block, each in enumerate(parts, 1):
                    yield _row({**case, "block": block, "side": side}, list(each))


def _row(case: dict[str, object], parts: list[Spectra]) -> Row:
    """Over the systems of all nets, and the whole blocks of each."""
    whole = [part.whole() for part in parts]
    medians = {
        name: quantiles(torch.tensor([each[name] for each in whole], dtype=torch.float64))["median"]
        for name in whole[0]
    }
    return {**row("training", case, Spectra.joined(parts)), "whole": medians}


def _run(
    draws: Draws, family: str, number: int, steps: int, method: str, data: Dataset
) -> Iterator[Look]:
    """One net, looked at after some of its steps."""
    sizes = [data.x_train.shape[1], *[draws.size] * HIDDEN]
    model = net(family, "relu", sizes, generator(draws.seed, 6, number), data.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[method])
    matcher = BackMatching(list(model)) if method == "backmatch" else None
    marks = sorted({round(mark * steps) for mark in MARKS})
    for step, (x, y) in enumerate(_endless(data, draws.seed + number)):
        draws.check_stop()
        if step in marks:
            yield _look(model, step, data)
        if step == steps:
            return
        optimizer.zero_grad()
        if matcher is None:
            with torch.enable_grad():
                torch.autograd.backward(cross_entropy(model(x), y))
        else:
            matcher.backward(x, functools.partial(_loss, y))
        optimizer.step()


def _loss(y: Tensor, output: Tensor) -> Tensor:
    return cross_entropy(output, y)


def _endless(data: Dataset, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from batches(data, batch_size=BATCH, seed=seed, epoch=epoch, start=0)
        epoch += 1


def _look(model: nn.Sequential, step: int, data: Dataset) -> Look:
    x, y = data.x_train[:PROBE], data.y_train[:PROBE]
    with torch.no_grad():
        loss = float(cross_entropy(copy.deepcopy(model).train()(x), y))
    sides = {"weight": spectra(model, x, "weight"), "input": spectra(model, x, "input", 32)}
    return Look(step, loss, sides)
