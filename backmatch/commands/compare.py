"""``backmatch compare``: several methods side by side."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from ..comparing import folder, methods
from ..comparing import options as compare_options
from ..training.config import differences
from ..training.failures import UsageError, show
from . import _common


def add(commands: Any) -> None:
    """Enter the command into the parser."""
    compare = commands.add_parser(
        "compare",
        help="train several methods from the same weights on the same batches: a table, a figure",
        description=_description(),
        epilog=textwrap.fill(_common.EXIT_CODES, 96),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare_options.add_arguments(compare)
    run_flags = compare.add_argument_group("run")
    run_flags.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the results, made if missing; default runs/compare-DATA-MODEL, with -2, "
        "-3, .. where that is taken",
    )
    run_flags.add_argument(
        "--resume", metavar="DIR", help="go on with the comparison in DIR after its last run"
    )
    run_flags.add_argument(
        "--quick", action="store_true", help="2 epochs, 2 seeds and 1 tuning seed unless given"
    )
    run_flags.add_argument(
        "--dry-run", action="store_true", help="list the runs and their steps; write nothing"
    )
    run_flags.add_argument("--quiet", action="store_true", help="show nothing but errors")
    _common.settle(compare, run)


def _description() -> str:
    about = textwrap.fill(
        "Train several methods with several seeds. A seed gives every method the same initial "
        "weights and the same batches; learning rates are chosen on samples held out of the "
        "training set; the test set is used with the chosen rate alone.",
        96,
    )
    known = [*methods.NAMED.values(), methods.find("cg-4")]
    names = "\n".join(f"  {method.name:<18}  {method.title}" for method in known)
    return f"{about}\n\nmethods:\n{names}\n  (cg-K for any K)"


def run(parsed: argparse.Namespace) -> int:
    """Check the flags, then compare, go on, or show what would run."""
    given = compare_options.read(parsed)
    if parsed.resume is not None:
        return _resume(parsed, given)
    quick = compare_options.QUICK if parsed.quick else {}
    options = compare_options.settle({**quick, **given})
    if parsed.dry_run and parsed.out is not None:
        raise UsageError("--dry-run writes nothing; drop --out")
    out = None if parsed.out is None else _common.path("--out", parsed.out)
    if out is not None:
        folder.check_new(out)
    from ..comparing import run as comparison

    if parsed.dry_run:
        return comparison.show_plan(options)
    return comparison.start(options, out, quiet=parsed.quiet)


def _resume(parsed: argparse.Namespace, given: dict[str, Any]) -> int:
    for flag in ("out", "dry_run", "quick"):
        if getattr(parsed, flag):
            name = flag.replace("_", "-")
            raise UsageError(f"--resume takes up a stored comparison as it is; drop --{name}")
    path = _common.path("--resume", parsed.resume)
    saved = folder.saved_options(path)
    changed = differences(saved.as_dict(), given)
    if changed:
        raise UsageError(
            f"--resume {show(str(path), 200)}: a comparison goes on with its own options "
            f"({'; '.join(changed)}); drop them, or start a new one with --out"
        )
    if folder.is_finished(path):
        if not parsed.quiet:
            print(f"the comparison in {path} is finished; nothing to do")
        return 0
    from ..comparing import run as comparison

    return comparison.resume(saved, path, quiet=parsed.quiet)
