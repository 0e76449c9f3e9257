"""The commands of the command line: one file each, with its flags and what it runs.

Nothing here imports torch before the flags are checked.
"""

from __future__ import annotations

from . import analyze, bench, compare, doctor, plot, train

#: In the order of the help text.
COMMANDS = (train, compare, analyze, plot, bench, doctor)
