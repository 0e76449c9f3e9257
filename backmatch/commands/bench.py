"""``backmatch bench``: kernels and steps beside their peers."""

from __future__ import annotations

import argparse
from typing import Any

from ..bench import options as bench_options
from . import _common


def add(commands: Any) -> None:
    """Enter the command into the parser."""
    bench = commands.add_parser(
        "bench",
        help="time kernels and steps beside SciPy, torch and other methods",
        description="Time kernels and steps beside their peers. Every answer is checked first; "
        "times are medians, x NAME is the peer's time over ours, /FMA and /copy are fractions of "
        "a multiply-add loop's and a copy's rate in the same run, error is the worst scaled "
        "residual of ours.",
        epilog=_common.EXIT_CODES,
        allow_abbrev=False,
    )
    bench_options.add_arguments(bench)
    _common.settle(bench, run)


def run(parsed: argparse.Namespace) -> int:
    """Check the flags, then measure."""
    options = bench_options.read(parsed)
    out = None if parsed.out is None else _common.path("--out", parsed.out)
    if out is not None:
        bench_options.check_out(out)
    from ..bench import run as benchmark

    return benchmark.start(options, out, quiet=parsed.quiet)
