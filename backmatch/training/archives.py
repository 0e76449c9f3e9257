"""Read single files out of a ``.tar.gz`` in memory; nothing is extracted, nothing is trusted."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

#: The original archives unpack to 186 MB; what unpacks to more is none of them.
MOST_BYTES = 256 * 2**20
#: Members of an archive; the original ones have at most ten.
MOST_MEMBERS = 100
#: Bytes of a header that goes before a member; tar itself takes some hundred for dates and owners.
MOST_HEADER = 4096
_CHUNK = 2**20


class RefusedError(Exception):
    """The archive is damaged, or holds what no data set needs."""


def members(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted members, in the archive's order.

    Every member up to the last wanted one is looked at: links, devices, paths that lead out of
    the archive, wanted names given twice, and more bytes or members than a data set has are
    refused, and so is what would keep the parsers busy: long or sparse headers, a gzip file of
    several parts. The rest is read too, so that the checksum at the end of the file counts.

    Raises:
        RefusedError: see above.
        OSError: the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as raw:
            limited = _Unzipped(raw)
            with tarfile.open(fileobj=cast(Any, limited), mode="r|", tarinfo=_Member) as archive:
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
    except (tarfile.TarError, zlib.error) as error:
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


class _Member(tarfile.TarInfo):
    """A member whose headers are looked at before tarfile reads them.

    tarfile takes minutes for some headers of a few compressed kilobytes; ``_proc_member`` is its
    entry point for subclasses.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        name = "".join(c if c.isprintable() else "?" for c in self.name[:60])
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise RefusedError(f"{name} in it is a link, a device or another special file")
        if self.type in _HEADERS and not 0 <= self.size <= MOST_HEADER:
            raise RefusedError(f"a header in it claims {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # unknown to the type stubs


#: What tells more about the member that follows.
_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Unzipped:
    """The content of a gzip file of one part, no more than :data:`MOST_BYTES`.

    The standard library's reader looks at names in the header and at zeros after the end byte by
    byte, and takes any number of parts.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._left, self._fed = raw, MOST_BYTES, MOST_BYTES
        self._decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # gzip, checksum included
        self._waiting = b""

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end."""
        parts: list[bytes] = []
        while size > 0 and not self._decoder.eof:
            part = self._decoder.decompress(self._waiting or self._feed(), size)
            self._waiting = self._decoder.unconsumed_tail
            size -= len(part)
            self._left -= len(part)
            if self._left < 0:
                raise RefusedError(f"it unpacks to more than {MOST_BYTES // 2**20} MiB")
            parts.append(part)
        return b"".join(parts)

    def _feed(self) -> bytes:
        part = self._raw.read(_CHUNK)
        self._fed -= len(part)
        if not part:
            raise RefusedError("it is cut short")
        if self._fed < 0:
            raise RefusedError(f"it is larger than {MOST_BYTES // 2**20} MiB")
        return part

    def drain(self) -> None:
        """Read to the end: the checksum stands there. Only zeros may follow."""
        while self.read(_CHUNK):
            pass
        rest = self._decoder.unused_data
        while rest:
            if rest.strip(b"\0"):
                raise RefusedError("something follows its end")
            rest = b"" if self._fed <= 0 else self._raw.read(_CHUNK)
            self._fed -= len(rest)
