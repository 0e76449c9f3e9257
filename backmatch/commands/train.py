"""``backmatch train``: one run."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..training import recipes, rundir
from ..training.config import differences, read_config_file, resolve
from ..training.failures import UsageError, show
from ..training.options import BY_NAME, OPTIONS
from . import _common


def add(commands: Any) -> None:
    """Enter the command into the parser."""
    train = commands.add_parser(
        "train",
        help="train a network, leave metrics, curves and checkpoints in a folder",
        description="Train a network. Without flags: exact back-matching of a 64-128-128-10 net "
        "on the digits.",
        epilog=_common.EXIT_CODES,
        allow_abbrev=False,
    )
    groups = {
        name: train.add_argument_group(name) for name in dict.fromkeys(o.group for o in OPTIONS)
    }
    for option in OPTIONS:
        groups[option.group].add_argument(
            option.flag, metavar=option.metavar, help=option.help, default=argparse.SUPPRESS
        )
    run_flags = train.add_argument_group("run")
    run_flags.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the results, made if missing; "
        "default runs/DATA-MODEL-METHOD-seedN, with -2, -3, .. where that is taken",
    )
    run_flags.add_argument(
        "--resume", metavar="DIR", help="continue the run in DIR exactly where it was saved"
    )
    run_flags.add_argument(
        "--config",
        metavar="FILE|recipe:NAME",
        help="YAML or JSON file with options of the first four groups (a config.json of a run, "
        "too), or a recipe that comes with the package, as recipe:vgg13-cifar10 "
        "(a wrong name lists them all); flags override it",
    )
    run_flags.add_argument(
        "--dry-run",
        action="store_true",
        help="one batch: show blocks, solvers, time and memory; write nothing",
    )
    run_flags.add_argument("--quiet", action="store_true", help="show nothing but errors")
    _common.settle(train, run)


def run(parsed: argparse.Namespace) -> int:
    """Check the flags, then train, take a run up, or show one step."""
    given = _given(parsed)
    if parsed.resume is not None:
        return _resume(parsed, given)
    levels = [given]
    if parsed.config is not None:
        levels.insert(0, _configured(parsed.config))
    try:
        config = resolve(*levels)
    except ValueError as error:
        raise UsageError(f"{error}{_origin(str(error), given, parsed.config)}") from None
    if parsed.dry_run:
        if parsed.out is not None:
            raise UsageError("--dry-run writes nothing; drop --out")
        # torch's allocator would warn on stderr about memory older than the measurement.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from ..training import dryrun

        return dryrun.show_step(config)
    out = None if parsed.out is None else _common.path("--out", parsed.out)
    if out is not None:
        rundir.check_new(out)
    from ..training import run as training

    return training.start(config, out, quiet=parsed.quiet)


def _resume(parsed: argparse.Namespace, given: dict[str, Any]) -> int:
    for flag, value in (("--out", parsed.out), ("--dry-run", parsed.dry_run)):
        if value:
            raise UsageError(f"--resume takes up a stored run as it is; drop {flag}")
    path = _common.path("--resume", parsed.resume)
    saved = rundir.saved_config(path)
    if parsed.config is not None:
        given = {**_configured(parsed.config), **given}
    changed = differences(saved.as_dict(), given)
    if changed:
        raise UsageError(
            f"--resume {show(str(path), 200)}: a run goes on with its own options "
            f"({'; '.join(changed)}); drop them, or start a new run with --out"
        )
    if rundir.is_finished(path):
        if not parsed.quiet:
            print(f"the run in {path} is finished; nothing to do")
        return 0
    from ..training import run as training

    return training.resume(saved, path, quiet=parsed.quiet)


def _configured(raw: str) -> dict[str, Any]:
    """Option values of a recipe of ours or of a file."""
    if raw.startswith(recipes.PREFIX):
        return recipes.read(raw.removeprefix(recipes.PREFIX))
    return read_config_file(_common.path("--config", raw))


def _origin(message: str, given: dict[str, Any], config: str | None) -> str:
    """Where the option stands that a message opens with, if it is not among the flags."""
    named = [option.name for option in OPTIONS if message.startswith(f"{option.flag} ")]
    if config is None or not named or named[0] in given:
        return ""
    return f" (it stands in --config {show(config, 100)})"


def _given(parsed: argparse.Namespace) -> dict[str, Any]:
    values = {}
    for name, raw in vars(parsed).items():
        if name in BY_NAME:
            try:
                values[name] = BY_NAME[name].value(raw, BY_NAME[name].flag)
            except ValueError as error:
                raise UsageError(str(error)) from None
    return values
