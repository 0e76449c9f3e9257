"""The options of ``backmatch compare``, read and checked without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..training.config import TrainConfig, resolve, unknown
from ..training.failures import UsageError
from ..training.options import INVERTIBLE, Option
from ..training.options import OPTIONS as TRAIN
from ..training.readers import integer
from . import methods, readers

_COMPARISON = "comparison"
#: Options of ``backmatch train`` that all methods share: those on data, model and machine, and two.
SHARED: tuple[Option, ...] = tuple(
    option
    for option in TRAIN
    if option.group in ("data and model", "machine") or option.name in ("batch_size", "epochs")
)
#: Tuning seeds are counted from here, so that they are none of the seeds of the table.
TUNING_SEED = 10_000
#: Values with ``--quick`` where nothing else is asked for.
QUICK = {"epochs": 2, "seeds": "2", "tuning_seeds": "1"}

OPTIONS: tuple[Option, ...] = (
    *SHARED,
    Option(
        "methods",
        _COMPARISON,
        f"what to compare, see above; default {','.join(methods.DEFAULT)}, and layer-inverse where "
        "the net can be inverted",
        "NAME,..",
        readers.names,
    ),
    Option(
        "seeds",
        _COMPARISON,
        "how many seeds (0, 1, ..), or which; default 5",
        "N|SEED,..",
        readers.seeds(0),
        list(range(5)),
    ),
    Option(
        "tuning_seeds",
        _COMPARISON,
        f"how many seeds ({TUNING_SEED}, ..) a learning rate is judged by, or which; default 3",
        "N|SEED,..",
        readers.seeds(TUNING_SEED),
        [TUNING_SEED, TUNING_SEED + 1, TUNING_SEED + 2],
    ),
    Option(
        "rates",
        _COMPARISON,
        "learning rates to choose from, of all methods or of one; may be given several times; a "
        "single rate is taken as it is; default four per method, from 1, 2, 5, 10, .., and "
        "up to three more while the best one lies on the edge",
        "[NAME=]LR,..",
        readers.rates,
        {},
    ),
    Option(
        "target",
        _COMPARISON,
        "test accuracy whose steps and seconds are counted; default the mean that the best of the "
        "bp- methods ends with, rounded down to a hundredth",
        "ACC",
        readers.target,
    ),
    Option(
        "evaluate_every",
        _COMPARISON,
        "steps between evaluations on the test set; the ends of epochs are added; default a "
        "twentieth of an epoch",
        "STEPS",
        integer(1),
    ),
    Option(
        "report_epochs",
        _COMPARISON,
        "epochs after which the table gives the accuracy; default the first and the last",
        "N,..",
        readers.epochs,
    ),
)
BY_NAME: dict[str, Option] = {option.name: option for option in OPTIONS}


@dataclass(frozen=True)
class CompareOptions:
    """Every option of a comparison with its final value; names and meaning as the flags'.

    Attributes:
        shared: options of ``backmatch train`` that all methods share, by name.
    """

    shared: dict[str, Any]
    methods: list[str]
    seeds: list[int]
    tuning_seeds: list[int]
    rates: dict[str, list[float]]
    target: float | None
    evaluate_every: int | None
    report_epochs: list[int]

    def as_dict(self) -> dict[str, Any]:
        """One flat mapping, for files; :func:`settle` takes it back."""
        own = asdict(self)
        return {**own.pop("shared"), **own}

    def grid(self, name: str) -> list[float]:
        """The learning rates that tuning of a method begins with, ascending."""
        given = self.rates.get(name, self.rates.get(""))
        return methods.find(name).rates() if given is None else given

    def may_extend(self, name: str) -> bool:
        """Whether the grid may grow: it does unless the user gave one."""
        return name not in self.rates and "" not in self.rates

    def config(self, name: str, lr: float | None = None, seed: int = 0) -> TrainConfig:
        """The options of ``backmatch train`` for one run."""
        return resolve(self.shared, methods.find(name).options, {"lr": lr, "seed": seed})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that are options of the comparison."""
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        groups[option.group].add_argument(
            option.flag,
            metavar=option.metavar,
            help=option.help,
            default=argparse.SUPPRESS,
            action="append" if option.name == "rates" else "store",
        )


def read(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options that were given on the command line, each checked by itself.

    Raises:
        UsageError: a value that cannot be used; the text names the flag and what it expects.
    """
    given = {name: raw for name, raw in vars(parsed).items() if name in BY_NAME}
    if "rates" in given and len(given["rates"]) == 1:
        given["rates"] = given["rates"][0]  # an error shows what was given
    return {name: _value(BY_NAME[name], raw) for name, raw in given.items()}


def settle(given: Mapping[str, Any]) -> CompareOptions:
    """Fill in the defaults and check every option against the others.

    Raises:
        UsageError: an option that cannot be used, alone or next to the others.
    """
    for name in given:
        if name not in BY_NAME:
            raise UsageError(unknown("option", name, BY_NAME, "backmatch compare --help"))
    values = {option.name: option.default for option in OPTIONS}
    values |= {name: _value(BY_NAME[name], raw) for name, raw in given.items() if raw is not None}
    shared = {option.name: values.pop(option.name) for option in SHARED}
    try:
        whole = resolve(shared).as_dict()
    except ValueError as error:
        raise UsageError(str(error)) from None
    shared = {name: whole[name] for name in shared}
    if values["methods"] is None:
        invertible = shared["activation"] in INVERTIBLE
        values["methods"] = [*methods.DEFAULT, *(["layer-inverse"] if invertible else [])]
    if values["report_epochs"] is None:
        values["report_epochs"] = sorted({1, shared["epochs"]})
    options = CompareOptions(shared=shared, **values)
    _check(options)
    return options


def _check(options: CompareOptions) -> None:
    for flag, names in (("--methods", options.methods), ("--rates", options.rates)):
        for name in names:
            if name:
                _check_name(flag, name)
    for name in options.rates:
        if name and name not in options.methods:
            raise UsageError(f"--rates {name}=..: {name} is none of --methods; add it, or drop it")
    for name in options.methods:
        try:
            options.config(name)
        except ValueError as error:
            raise UsageError(f"--methods {name}: {error}") from None
    both = sorted(set(options.seeds) & set(options.tuning_seeds))
    if both:
        raise UsageError(
            f"--seeds and --tuning-seeds: expected different ones, both hold {both[0]}"
        )
    last = options.shared["epochs"]
    late = [epoch for epoch in options.report_epochs if epoch > last]
    if late:
        raise UsageError(
            f"--report-epochs: expected epochs up to the last one, {last}, got {late[0]}"
        )


def _check_name(flag: str, name: str) -> None:
    try:
        methods.find(name)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def _value(option: Option, raw: Any) -> Any:
    try:
        return option.value(raw, option.flag)
    except ValueError as error:
        raise UsageError(str(error)) from None
