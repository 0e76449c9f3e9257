"""The command line: ``backmatch COMMAND``, also ``python -m backmatch``.

Arguments are read and checked before torch is imported, so ``--help`` and wrong usage answer
at once. Exit codes: 0 done, 1 a run that failed, 2 wrong usage or unusable input,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import __version__
from .bench import options as bench_options
from .training import rundir
from .training.config import differences, read_config_file, resolve, unknown
from .training.failures import RunError, UsageError, show
from .training.options import BY_NAME, OPTIONS

_EXIT_CODES = (
    "exit codes: 0 done; 1 the run failed; 2 wrong usage or unusable input (one line says what, "
    "where and what to do); 130 interrupted and 143 terminated, state saved"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: the words after ``backmatch``; ``None`` takes them from the command line.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path need not be text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        parsed, left = _parser().parse_known_args(arguments)
        if left:
            raise UsageError(unknown("argument", left[0].split("=")[0], parsed.flags, parsed.help))
        command: Callable[[argparse.Namespace], int] = parsed.command
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return command(parsed)
    except UsageError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted before the first step", 130)
    except Exception as error:
        if os.environ.get("BACKMATCH_TRACEBACK"):
            raise
        kind = type(error).__name__
        return _fail(f"{kind}: {error} (BACKMATCH_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> int:
    print("backmatch:", " ".join(message.split()), file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print("backmatch: warning:", " ".join(str(message).split()), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse with errors as exceptions, so that they come out as one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def _parser() -> _Parser:
    parser = _Parser(
        prog="backmatch",
        description="Exact back-matching propagation: train a network by solving one "
        "least-squares problem per block for its weights and one for its inputs.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"backmatch {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    _add_train(commands)
    _add_bench(commands)
    doctor = commands.add_parser(
        "doctor",
        help="versions, build, devices and a self-check",
        description="Print versions, how the native code was built, the devices, and check "
        "solver and sweep once. Exit code 0 if all is well, else 1.",
        allow_abbrev=False,
    )
    doctor.set_defaults(command=_doctor, flags=[], help="backmatch doctor --help")
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a network, leave metrics, curves and checkpoints in a folder",
        description="Train a network. Without flags: exact back-matching of a 64-128-128-10 net "
        "on the digits.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    groups = {
        name: train.add_argument_group(name) for name in dict.fromkeys(o.group for o in OPTIONS)
    }
    for option in OPTIONS:
        groups[option.group].add_argument(
            option.flag, metavar=option.metavar, help=option.help, default=argparse.SUPPRESS
        )
    run = train.add_argument_group("run")
    run.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the results, made if missing; "
        "default runs/DATA-MODEL-METHOD-seedN, with -2, -3, .. where that is taken",
    )
    run.add_argument(
        "--resume", metavar="DIR", help="continue the run in DIR exactly where it was saved"
    )
    run.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file with options of the first four groups (a config.json of a run, "
        "too); flags override it",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="one batch: show blocks, solvers, time and memory; write nothing",
    )
    run.add_argument("--quiet", action="store_true", help="show nothing but errors")
    flags = [flag for flag in train._option_string_actions if flag.startswith("--")]
    train.set_defaults(command=_train, flags=flags, help="backmatch train --help")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time kernels and steps beside SciPy, torch and other methods",
        description="Time kernels and steps beside their peers. Every answer is checked first; "
        "times are medians, x NAME is the peer's time over ours, /FMA and /copy are fractions of "
        "a multiply-add loop's and a copy's rate in the same run, error is the worst scaled "
        "residual of ours.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    bench_options.add_arguments(bench)
    flags = [flag for flag in bench._option_string_actions if flag.startswith("--")]
    bench.set_defaults(command=_bench, flags=flags, help="backmatch bench --help")


def _bench(parsed: argparse.Namespace) -> int:
    options = bench_options.read(parsed)
    out = None if parsed.out is None else _path("--out", parsed.out)
    if out is not None:
        bench_options.check_out(out)
    from .bench import run

    return run.start(options, out, quiet=parsed.quiet)


def _train(parsed: argparse.Namespace) -> int:
    given = _given(parsed)
    if parsed.resume is not None:
        return _resume(parsed, given)
    levels = [given]
    if parsed.config is not None:
        levels.insert(0, read_config_file(_path("--config", parsed.config)))
    try:
        config = resolve(*levels)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if parsed.dry_run:
        if parsed.out is not None:
            raise UsageError("--dry-run writes nothing; drop --out")
        # torch's allocator would warn on stderr about memory older than the measurement.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from .training import dryrun

        return dryrun.show_step(config)
    out = None if parsed.out is None else _path("--out", parsed.out)
    if out is not None:
        rundir.check_new(out)
    from .training import run

    return run.start(config, out, quiet=parsed.quiet)


def _resume(parsed: argparse.Namespace, given: dict[str, Any]) -> int:
    for flag, value in (("--out", parsed.out), ("--dry-run", parsed.dry_run)):
        if value:
            raise UsageError(f"--resume takes up a stored run as it is; drop {flag}")
    path = _path("--resume", parsed.resume)
    saved = rundir.saved_config(path)
    if parsed.config is not None:
        given = {**read_config_file(_path("--config", parsed.config)), **given}
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
    from .training import run

    return run.resume(saved, path, quiet=parsed.quiet)


def _given(parsed: argparse.Namespace) -> dict[str, Any]:
    values = {}
    for name, raw in vars(parsed).items():
        if name in BY_NAME:
            try:
                values[name] = BY_NAME[name].value(raw, BY_NAME[name].flag)
            except ValueError as error:
                raise UsageError(str(error)) from None
    return values


def _path(flag: str, raw: str) -> Path:
    if not raw or "\0" in raw:
        raise UsageError(f"{flag}: expected a path, got {show(raw)}")
    return Path(raw)


def _doctor(parsed: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run()
