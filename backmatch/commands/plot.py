"""``backmatch plot``: figures from stored runs."""

from __future__ import annotations

import argparse
from typing import Any

from . import _common


def add(commands: Any) -> None:
    """Enter the command into the parser."""
    plot = commands.add_parser(
        "plot",
        help="draw stored runs, comparisons and analyses",
        description="Draw what is stored; nothing is computed. One run (unfinished ones, too): "
        "loss, accuracy, and what its probes saw of every block. Several runs: their test accuracy "
        "and loss against steps and seconds. The folder of a comparison or an analysis: its "
        "figure.",
        epilog=_common.EXIT_CODES,
        allow_abbrev=False,
    )
    plot.add_argument("folders", metavar="DIR", nargs="+", help="folder of a run, or several")
    plot.add_argument(
        "--out",
        metavar="FILE.png",
        help="the figure; default DIR/plot.png, with several folders overlay.png in the first. A "
        "figure that plot drew before is replaced, any other file is not",
    )
    plot.add_argument("--quiet", action="store_true", help="show nothing but errors")
    _common.settle(plot, run)


def run(parsed: argparse.Namespace) -> int:
    """Draw, and say where the figure is."""
    from ..plotting import draw

    out = None if parsed.out is None else _common.path("--out", parsed.out)
    path = draw.start([_common.path("DIR", folder) for folder in parsed.folders], out)
    if not parsed.quiet:
        from ..training.progress import say

        say(f"figure  {path}")
    return 0
