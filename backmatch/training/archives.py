"""Read single files out of a ``.tar.gz`` in memory; nothing is extracted, nothing is trusted."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

#: The original archives unpack to 186 MB; what unpacks to more is none of them.
MOST_BYTES = 256 * 2**20
#: Members of an archive; the original ones have at most ten.
MOST_MEMBERS = 100


class RefusedError(Exception):
    """The archive is damaged, or holds what no data set needs."""


def members(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted members, in the archive's order.

    Every member up to the last wanted one is looked at: links, devices, paths that lead out of
    the archive, wanted names given twice, and more bytes or members than a data set has are
    refused. The rest is read too, so that the checksum at the end of the file counts.

    Raises:
        RefusedError: see above.
        OSError: the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as unzipped:
            limited = _Limited(unzipped)
            with tarfile.open(fileobj=cast(Any, limited), mode="r|") as archive:
                for count, member in enumerate(archive):
                    _check(member, count)
                    name = member.name.removeprefix("./")
                    if name not in wanted:
                        continue
                    if not member.isreg():
                        raise RefusedError(f"{name} is no file")
                    if name in seen:
                        raise RefusedError(f"it holds {name} twice")
                    seen.add(name)
                    yield name, _content(archive, member)
            limited.drain()
    except (RefusedError, MemoryError):
        raise
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise RefusedError(f"it is damaged or cut short ({type(error).__name__})") from None
    except OSError:
        raise
    except Exception as error:  # whatever the parsers make of hostile bytes
        raise RefusedError(f"it is damaged ({type(error).__name__})") from None


def _check(member: tarfile.TarInfo, count: int) -> None:
    name = "".join(c if c.isprintable() else "?" for c in member.name[:60])
    if count >= MOST_MEMBERS:
        raise RefusedError(f"it has more than {MOST_MEMBERS} members")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise RefusedError(f"{name} in it is a link, a device or another special file")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise RefusedError(f"the path {name} leads out of it")
    if not 0 <= member.size <= MOST_BYTES:
        raise RefusedError(f"{name} in it claims {member.size} bytes")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    content = file.read()
    if len(content) != member.size:
        raise RefusedError(f"{member.name} in it is cut short")
    return content


class _Limited:
    """A stream that gives no more than :data:`MOST_BYTES`, however small the file is."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream, self._left = stream, MOST_BYTES

    def read(self, size: int) -> bytes:
        content: bytes = self._stream.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise RefusedError(f"it unpacks to more than {MOST_BYTES // 2**20} MiB")
        return content

    def drain(self) -> None:
        """Read to the end: the checksum stands there."""
        while self.read(2**20):
            pass
