"""Checkpoints that know when they are damaged: own SHA-256, the last two kept.

A checkpoint file is what ``torch.save`` writes, followed by a trailer with the SHA-256 of
everything before it. ``torch.load`` reads such a file too (a zip archive is found from its
end, trailing bytes are allowed), but it does not notice flipped bits; :func:`load` does.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .failures import UsageError
from .files import fsync_folder, removed_on_error, write_temporary

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"

_MARK = b"\nbackmatch sha256 "
_TRAILER = len(_MARK) + 64 + 1


class DamagedError(Exception):
    """The bytes of a checkpoint are not the ones that were written."""


def encode(payload: dict[str, Any]) -> bytes:
    """Serialise and seal a payload."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    body = buffer.getvalue()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode() + b"\n"


def decode(content: bytes) -> dict[str, Any]:
    """Check the seal and load; nothing is unpickled before the seal is known to be good.

    Raises:
        DamagedError: truncated, altered, or not a checkpoint of ours.
    """
    body, trailer = content[:-_TRAILER], content[-_TRAILER:]
    if len(content) <= _TRAILER or not trailer.startswith(_MARK):
        raise DamagedError("it is truncated")
    if trailer != _MARK + hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise DamagedError("its SHA-256 does not match")
    try:
        payload = torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
    except Exception:  # sealed, but made by something else: whatever the unpickler says
        raise DamagedError("it holds something other than plain tensors and numbers") from None
    if not isinstance(payload, dict):
        raise DamagedError("it holds no run state")
    return payload


def save(folder: Path, payload: dict[str, Any]) -> None:
    """Make ``payload`` the newest checkpoint and the newest one the previous.

    Between the two renames only the previous checkpoint exists under its name; a crash there
    resumes from it.
    """
    newest = folder / NEWEST
    temporary = write_temporary(newest, encode(payload))
    with removed_on_error(temporary):
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
        os.replace(temporary, newest)
    fsync_folder(folder)


def load(folder: Path, note: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest intact checkpoint, or ``None`` where none was ever saved.

    A damaged newest file is replaced by the previous one, so that the next :func:`save` does
    not push the good file out; ``note`` is told.

    Raises:
        UsageError: there are checkpoints, but none is intact.
    """
    damage: list[str] = []
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        try:
            payload = decode(path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"{path}: cannot read it: {error.strerror}") from None
        except DamagedError as error:
            damage.append(f"{name}: {error}")
            continue
        if name == PREVIOUS:
            reason = damage[0] if damage else f"{NEWEST} is missing"
            note(f"falling back to the previous checkpoint ({reason})")
            os.replace(path, folder / NEWEST)
            fsync_folder(folder)
        return payload
    if damage:
        raise UsageError(
            f"--resume {folder}: no intact checkpoint ({'; '.join(damage)}); "
            "start a new run with --out"
        )
    return None
