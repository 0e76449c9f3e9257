"""What the commands share: paths, and how a command enters the parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..training.failures import UsageError, show

EXIT_CODES = (
    "exit codes: 0 done; 1 the run failed; 2 wrong usage or unusable input (one line says what, "
    "where and what to do); 130 interrupted and 143 terminated, state saved"
)

#: What a command does with its parsed flags; returns the exit code.
Run = Callable[[argparse.Namespace], int]


def settle(parser: argparse.ArgumentParser, run: Run) -> None:
    """Tie a complete parser to what it runs, and keep its flags for hints at misspelt ones."""
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    parser.set_defaults(command=run, flags=flags, help=f"{parser.prog} --help")


def path(flag: str, raw: str) -> Path:
    """The path given with a flag.

    Raises:
        UsageError: it is empty or holds a null byte.
    """
    if not raw or "\0" in raw:
        raise UsageError(f"{flag}: expected a path, got {show(raw)}")
    return Path(raw)
