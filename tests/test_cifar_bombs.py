"""Archives and pickles of a few bytes that keep a parser busy: refused before it begins.

No test asserts a time: what is checked is that the parser is not given the work.
"""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import tarfile
from pathlib import Path

import fake_cifar
import pytest
import torch

from backmatch.training import archives, data, pickles
from backmatch.training.failures import UsageError

FILES = fake_cifar.contents("cifar100", "binary", fake_cifar.draw("cifar100", 4))
FOLDER = "cifar-100-binary"
WANTED = {f"{FOLDER}/train.bin", f"{FOLDER}/test.bin"}


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    return made.tobuf(tarfile.GNU_FORMAT)


def told(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        data.load("cifar100", torch.float32, str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
def test_a_long_header_is_not_read(kind: bytes, tmp_path: Path) -> None:
    """Records of a pax header cost a microsecond each, and many digits quadratic time."""
    size = archives.MOST_HEADER + 1
    content = gzip.compress(header(kind, size) + b"1" * 2**20)
    assert f"a header in it claims {size} bytes" in told(tmp_path, content)


def test_headers_of_headers_end(tmp_path: Path) -> None:
    block = header(b"g", 512) + b"9 a=bbbb\n".ljust(512, b"\0")
    assert "damaged (RecursionError)" in told(tmp_path, gzip.compress(block * 3000))


def test_the_map_of_a_sparse_member_is_not_read(tmp_path: Path) -> None:
    block = bytearray(header(b"S", 0, f"{FOLDER}/train.bin"))
    block[482] = 1  # "the map goes on in the next block"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    more = (b"0" * 10 + b"1 " + b"0" * 11 + b" ") * 21 + b"\1" + bytes(7)
    message = told(tmp_path, gzip.compress(bytes(block) + more * 2000))
    assert "train.bin in it is a link, a device or another special file" in message


def test_a_gzip_file_has_one_part(tmp_path: Path) -> None:
    whole = fake_cifar.packed(FOLDER, FILES)
    assert "something follows its end" in told(tmp_path, whole + whole)
    assert "something follows its end" in told(tmp_path, whole + gzip.compress(b"") * 1000)
    assert "something follows its end" in told(tmp_path, whole + bytes(3_000_000) + b"x")


def test_zeros_may_follow_its_end(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(
        fake_cifar.packed(FOLDER, FILES) + bytes(3_000_000)
    )
    assert len(data.load("cifar100", torch.float32, str(tmp_path)).x_test) == 4


def test_a_file_name_without_end_in_the_header_of_gzip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * (5 * 2**20)
    assert "it is cut short" in told(tmp_path, content)
    monkeypatch.setattr(archives, "MOST_BYTES", 2**21)
    assert "it is larger than 2 MiB" in told(tmp_path, content)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_that_tar_itself_writes(form: int, tmp_path: Path) -> None:
    """Dates in fractions of a second and long names make tar put a header before a member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=form) as archive:
        extra = tarfile.TarInfo("/".join(["long"] * 15) + "/readme.html")
        extra.mtime = 1e9 if form == tarfile.USTAR_FORMAT else 1234567890.25
        archive.addfile(extra)
        for name, content in FILES.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size, member.mtime = len(content), extra.mtime
            archive.addfile(member, io.BytesIO(content))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(buffer.getvalue())
    found = dict(archives.members(path, WANTED))
    assert found == {f"{FOLDER}/{name}": content for name, content in FILES.items()}


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 10240, 2**20])
def test_bytes_come_as_asked_for(size: int) -> None:
    content = bytes(itertools.islice(itertools.cycle(range(251)), 100_000))
    stream = archives._Unzipped(io.BytesIO(gzip.compress(content)))
    parts = list(iter(lambda: stream.read(size), b""))
    assert b"".join(parts) == content
    assert all(len(part) == size for part in parts[:-1])


def test_keys_are_short() -> None:
    """Equal texts at two places are compared to their end each time that one is set."""
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000
    hostile = b"}q\0" + text + b"q\1Ns" + text + b"q\2Ns" + b"h\2Ns" * 10 + b"."
    with pytest.raises(pickles.RefusedError, match="a key of 100000 characters"):
        pickles.load(hostile)


def test_the_largest_true_file_stays_below_the_limit_of_instructions() -> None:
    """50,000 images as Python 3 writes bytes in protocol 2: eight instructions a name."""
    names = [b"image_%05d.png" % i for i in range(50_000)]
    made = fake_cifar.modern({"n": names, "f": [1] * 50_000, "c": [2] * 50_000}, 2)
    assert pickles.load(made)["n"] == names
