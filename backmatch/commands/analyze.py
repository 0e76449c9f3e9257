"""``backmatch analyze``: the papers' claims about the local Hessian as studies."""

from __future__ import annotations

import argparse
from typing import Any

from ..analyzing import options as analyze_options
from . import _common


def add(commands: Any) -> None:
    """Enter the command into the parser."""
    analyze = commands.add_parser(
        "analyze",
        help="study the local Hessian: initialisation, skip connections, norms, depth, training",
        description="Study the local Hessians of blocks: how initialisation, skip connections and "
        "batch norm condition them, on the input side and on the weight side, at initialisation "
        "and while a net learns. Figures are medians over draws or nets with 10 % and 90 % "
        "quantiles.",
        epilog=_common.EXIT_CODES,
        allow_abbrev=False,
    )
    analyze_options.add_arguments(analyze)
    _common.settle(analyze, run)


def run(parsed: argparse.Namespace) -> int:
    """Check the flags, then study."""
    options = analyze_options.read(parsed)
    out = None if parsed.out is None else _common.path("--out", parsed.out)
    if out is not None:
        analyze_options.check_out(out)
    from ..analyzing import run as studying

    return studying.start(options, out, quiet=parsed.quiet)
