"""What the launchers of ``backmatch._C.cuda`` would launch, found by calling them in a dry run.

Nothing is listed here: a launcher is a function with a ``stream`` argument, and its arguments are
told apart by the names that all of them share (csrc/kernels.h): sizes, ``<x>_batch``, ``<x>_row``
and ``<x>_col`` for strides, ``<x>_stride`` for one value per system; the rest are addresses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cuda_resources import Device

BATCH, ROWS, STEPS = 10_000, 512, 8
DTYPES = ("float32", "float64")
#: Every order of a small kernel, then some around which a larger one may begin or end, and two that
#: fit nowhere on chip.
ORDERS = (*range(1, 66), 96, 128, 129, 192, 256, 257, 384, 512, 1024, 4096, 65536)
#: Further ones that are called, so that no instance is missed, but not shown.
BETWEEN = tuple(n for n in range(72, 512, 8) if n not in ORDERS)
#: Nothing is read or written in a dry run: an address of this alignment, and one with hardly any.
_ALIGNED, _ODD = 1 << 20, (1 << 20) + 8

#: Sizes that are the same in all cases.
_SIZES = {"m": ROWS, "max_steps": STEPS, "repeats": STEPS}


@dataclass(frozen=True)
class Variant:
    """How the tensors of a call lie in memory, and how many right-hand sides there are."""

    columns: int = 1
    layout: str = "rows"  # contiguous; "columns": transposed; "odd": rows of odd length
    address: int = 0  # null: also what is optional is left out
    systems: int = BATCH


PLAIN = Variant()
VARIANTS = (
    PLAIN,
    Variant(address=_ALIGNED),
    Variant(systems=64),
    Variant(systems=64, address=_ALIGNED),
    Variant(columns=8),
    Variant(columns=64),
    Variant(layout="columns"),
    Variant(layout="odd", address=_ODD),
)


@dataclass(frozen=True)
class Launch:
    """One launch of a call."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Call:
    """A launcher called once, and what it launched, in order; or why it refused."""

    launcher: str
    device: str
    dtype: str
    n: int | None
    variant: Variant
    launches: tuple[Launch, ...]
    error: str = ""
    flags: tuple[tuple[str, bool], ...] = ()


def launchers(module: Any) -> dict[str, dict[str, str]]:
    """Name -> its arguments and their types, of every launcher of ``_C.cuda``."""
    found = {}
    for name in sorted(vars(module)):
        arguments = arguments_of(getattr(module, name))
        if "stream" in arguments:
            found[name] = arguments
    return found


def arguments_of(function: Callable[..., Any]) -> dict[str, str]:
    """Name -> type, out of the signature that pybind11 puts into the docstring."""
    signature = (function.__doc__ or "").partition("\n")[0].partition(") ->")[0]
    return dict(re.findall(r"(\w+): ([^,=]+)", signature))


def calls(module: Any, device: Device) -> Iterator[Call]:
    """Every launcher, dtype, order and variant on that device."""
    for name, arguments in launchers(module).items():
        dtypes = DTYPES if "dtype" in arguments else ("float64",)
        orders = sorted({*ORDERS, *BETWEEN}) if "n" in arguments else [None]
        for dtype, n, variant in itertools.product(dtypes, orders, VARIANTS):
            for flags in _flags(arguments):
                yield one_call(module, device, name, arguments, dtype, n, variant, flags)


def _flags(arguments: Mapping[str, str]) -> Iterator[dict[str, bool]]:
    names = [name for name, kind in arguments.items() if kind.strip() == "bool"]
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def one_call(
    module: Any,
    device: Device,
    name: str,
    arguments: Mapping[str, str],
    dtype: str,
    n: int | None,
    variant: Variant,
    flags: Mapping[str, bool],
) -> Call:
    """One launcher, once."""
    given = {"dtype": dtype, **flags}
    values = [
        given[key] if key in given else _value(key, kind, n or 0, variant)
        for key, kind in arguments.items()
    ]
    call = lambda: getattr(module, name)(*values)  # noqa: E731
    launches: list[tuple[str, int, int, int]] = []
    error = ""
    try:
        launches = module.dry_run(device.shared_per_block, device.multiprocessors, call)
    except (RuntimeError, ValueError) as refused:
        error = str(refused)
    found = tuple(Launch(*launch) for launch in launches)
    return Call(name, device.name, dtype, n, variant, found, error, tuple(flags.items()))


def _value(name: str, kind: str, n: int, variant: Variant) -> int | float:
    if name in _SIZES:
        return _SIZES[name]
    if name in ("batch", "systems"):
        return variant.systems
    if name == "n":
        return n
    if name == "k":
        return variant.columns
    if kind.strip() == "float":
        return 1e-3
    width = n + 1 if variant.layout == "odd" else n
    strides = {"row": width, "col": 1, "batch": width * n, "stride": 1}
    if variant.layout == "columns":
        strides |= {"row": 1, "col": width}
    ending = name.rpartition("_")[2]
    if ending in strides and "_" in name:
        return strides[ending]
    return 0 if name == "stream" else variant.address
