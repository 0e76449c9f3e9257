"""Files that are either the old version or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``; a crash at any point leaves the old file or the new one.

    The temporary file lies in the same folder, because a rename is atomic only within one file
    system. On an error (disk full) it is removed again.
    """
    temporary = write_temporary(path, content)
    with removed_on_error(temporary):
        os.replace(temporary, path)
    fsync_folder(path.parent)


def write_temporary(path: Path, content: bytes) -> Path:
    """Write ``content`` next to ``path`` and force it to the disk; returns the file's path."""
    temporary = path.with_name(f".{path.name}.tmp")
    with removed_on_error(temporary), temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


@contextlib.contextmanager
def removed_on_error(temporary: Path) -> Iterator[None]:
    """Where the disk is full, a half-written file must not take what room there is."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_fully(descriptor: int, content: bytes) -> None:
    """``os.write`` until everything is written; it may write less without an error."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
