"""PNG files that say who drew them, so that no other file is ever replaced."""

from __future__ import annotations

import errno
import struct
import zlib
from pathlib import Path

from ..training.failures import RunError, UsageError, show
from ..training.files import write_atomic

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MARK = b"Source\0backmatch plot"
#: IHDR, the first chunk, ends here: length, name, 13 bytes, checksum.
_AFTER_HEADER = len(_SIGNATURE) + 25


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


_MARKING = _chunk(b"tEXt", _MARK)


def marked(content: bytes) -> bytes:
    """The PNG with our mark as its second chunk.

    Raises:
        ValueError: it is no PNG.
    """
    if not content.startswith(_SIGNATURE + b"\0\0\0\x0dIHDR") or len(content) < _AFTER_HEADER:
        raise ValueError("not a PNG")
    if content[_AFTER_HEADER:].startswith(_MARKING):
        return content
    return content[:_AFTER_HEADER] + _MARKING + content[_AFTER_HEADER:]


def check_target(path: Path, where: str) -> None:
    """Refuse a path that cannot be written or holds a file of someone else's; changes nothing.

    Raises:
        UsageError: the text begins with ``where``.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{where}: expected a file name that ends in .png")
    if not str(path).isprintable():
        raise UsageError(f"{where}: the path holds control characters; choose another file")
    try:
        if not path.parent.is_dir():
            parent = show(str(path.parent), 200)
            raise UsageError(f"{where}: no folder {parent}; make it, or choose another file")
        if path.exists() and not _is_ours(path):
            raise UsageError(
                f"{where}: exists and was not drawn by backmatch plot; remove it, or choose "
                "another file with --out"
            )
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}; choose another file") from None


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(_AFTER_HEADER + len(_MARKING)).endswith(_MARKING)


def write(path: Path, content: bytes, where: str) -> None:
    """Replace the file at once, or leave it as it was.

    Raises:
        UsageError: no permission to write there.
        RunError: the disk takes no more.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        text = f"{where}: cannot write it: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise RunError(f"{text}; make room and draw again") from None
        raise UsageError(f"{text}; choose another file with --out") from None
