"""The commands of the command line: one file each, with its flags and what it runs.

Nothing here imports torch before the flags are checked.
"""

from __future__ import annotations

from . import bench, compare, doctor, train

#: In the order of the help text.
COMMANDS = (train, compare, bench, doctor)
