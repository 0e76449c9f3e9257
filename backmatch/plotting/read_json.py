"""JSON from a folder that anybody may have written: every surprise is one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ..training.failures import UsageError, show

#: Larger files are none of ours.
MAX_BYTES = 1 << 26


def parse(text: str) -> Any:
    """One JSON value; NaN and infinities, which are no JSON, are refused like any other damage.

    Raises:
        ValueError: it is no JSON, or nested beyond reason.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_mapping(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UsageError: it cannot be read, is too large, or holds something else.
    """
    where = show(str(path), 200)
    require_file(path)
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise UsageError(f"{where}: larger than {most >> 20} MiB, not a file of backmatch")
        content = parse(raw.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{where}: cannot read it: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{where}: damaged, not valid JSON ({show(str(error))})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{where}: expected a JSON object, got {show(content)}")
    return content


def require_file(path: Path) -> None:
    """Refuse what is no plain file: reading a pipe could wait for ever.

    Raises:
        UsageError: the text names the path.
    """
    where = show(str(path), 200)
    try:
        if path.is_file():
            return
        missing = not path.exists()
    except OSError as error:
        raise UsageError(f"{where}: cannot read it: {error.strerror}") from None
    raise UsageError(f"{where}: {'no such file' if missing else 'no plain file'}")


def number(value: object, what: str) -> float:
    """A finite number; ``None`` (undefined) and what is not there become NaN.

    Raises:
        ValueError: it is something else; the text names ``what``.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} must be a number, got {show(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if math.isinf(found):
        raise ValueError(f"{what} must be a finite number, got {show(value)}")
    return found


def whole(value: object, what: str) -> int:
    """A whole number from 0 to 2^53.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**53:
        raise ValueError(f"{what} must be a whole number, got {show(value)}")
    return value
