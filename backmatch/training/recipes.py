"""Config files that come with the package: ``--config recipe:NAME``."""

from __future__ import annotations

import difflib
from importlib.resources import files
from typing import Any

from .config import read_config_text
from .failures import UsageError, show

PREFIX = "recipe:"


def names() -> list[str]:
    """The recipes there are.

    >>> "vgg13-cifar10" in names()
    True
    """
    folder = files(__package__.rpartition(".")[0]) / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def text(name: str) -> str:
    """The YAML text of a recipe; a name is looked up, never made a path.

    Raises:
        UsageError: there is none of that name.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name[:60], known, n=1, cutoff=0.7)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(
            f"--config: unknown recipe {show(name)}{hint}; there are {', '.join(known)}"
        )
    folder = files(__package__.rpartition(".")[0]) / "recipes"
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """The option values of a recipe."""
    return read_config_text(text(name), f"--config {PREFIX}{name}")
