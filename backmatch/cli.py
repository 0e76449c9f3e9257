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
from typing import NoReturn, TextIO

from . import __version__
from .commands import COMMANDS
from .commands._common import EXIT_CODES
from .training.config import unknown
from .training.failures import RunError, UsageError


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
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"backmatch {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for command in COMMANDS:
        command.add(commands)
    return parser
