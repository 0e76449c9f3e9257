"""``backmatch doctor``: versions, build, devices, one self-check."""

from __future__ import annotations

import argparse
from typing import Any

from . import _common


def add(commands: Any) -> None:
    """Enter the command into the parser."""
    doctor = commands.add_parser(
        "doctor",
        help="versions, build, devices and a self-check",
        description="Print versions, how the native code was built, the devices, and check "
        "solver and sweep once. Exit code 0 if all is well, else 1.",
        allow_abbrev=False,
    )
    _common.settle(doctor, run)


def run(parsed: argparse.Namespace) -> int:
    """Check the installation."""
    from .. import doctor

    return doctor.run()
