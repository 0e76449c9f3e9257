"""Config files that come with the package: ``--config recipe:NAME``."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from .config import read_config_text, unknown
from .failures import UsageError

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
        told = unknown("recipe", name, known, "backmatch train --help")
        raise UsageError(f"--config {PREFIX}..: {told}; there are {', '.join(known)}")
    folder = files(__package__.rpartition(".")[0]) / "recipes"
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """The option values of a recipe."""
    return read_config_text(text(name), f"--config {PREFIX}{name}")
