"""The two ways in which a command ends early, told apart by the exit code."""

from __future__ import annotations


class UsageError(Exception):
    """Wrong usage or unusable input: exit code 2; the text says what, where and what to do."""


class RunError(Exception):
    """A run that failed on its way: exit code 1."""


def show(value: object, limit: int = 60) -> str:
    """``repr`` of a value a user gave, on one line and never longer than ``limit``.

    Containers are only named: a YAML file can alias one list into a text of gigabytes.

    >>> show("a\\nb"), show([1]), show("x" * 100, limit=8)
    ("'a\\\\nb'", 'a list', "'xxxxx..")
    """
    if isinstance(value, (list, tuple, set, dict)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 2] + ".."
