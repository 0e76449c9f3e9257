"""Global forward hooks of our own: they look, change nothing, and are none of the user's hooks.

Global ones are in no module: a watched model can be copied and pickled, its copies are unwatched,
and its modules' own hook tables stay the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Observer:
    """A hook that returns nothing and that no route has to respect.

    >>> is_foreign({0: Observer(print)}), is_foreign({0: print})
    (False, True)
    """

    def __init__(self, look: Callable[..., None]) -> None:
        self.look = look

    def __call__(self, *args: Any) -> None:
        self.look(*args)


def is_foreign(hooks: Mapping[int, Any]) -> bool:
    """Whether a table holds hooks other than ours."""
    return any(type(hook) is not Observer for hook in hooks.values())
