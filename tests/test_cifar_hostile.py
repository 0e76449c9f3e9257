"""Hostile pickles and archives are refused with one line, and nothing of theirs is executed."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import gzip
import io
import os
import pickle
import re
import struct
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import fake_cifar
import numpy as np
import pytest
import torch

from backmatch.cli import main
from backmatch.training import archives, data, pickles
from backmatch.training.failures import UsageError


def told(content: bytes) -> str:
    with pytest.raises(pickles.RefusedError) as caught:
        pickles.load(content)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 150
    return message


def dictionary(value: bytes) -> bytes:
    """A pickle of {"data": value} for the instructions that make a value."""
    return b"\x80\x02}U\x04data" + value + b"s."


class Calls:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


HOSTILE: list[Any] = [
    (Calls(os.system, "touch HIT"), "it names posix.system"),
    (Calls(eval, "open('HIT', 'w')"), "eval, which no data needs"),
    (Calls(exec, "open('HIT', 'w')"), "exec"),
    (Calls(getattr, "x", "upper"), "getattr, which no data needs"),
    (Calls(open, "HIT", "w"), "open"),
    (Calls(__import__, "antigravity"), "__import__"),
    (Calls(print, Calls(os.system, "touch HIT")), "print"),
    (Calls(np.load, "HIT"), "load"),
    (Calls(np.frombuffer, b"x"), "frombuffer"),
    (Calls(bytearray, 2**40), "bytearray"),
    (np.array([Calls(os.system, "touch HIT")], dtype=object), "dtype O8, not uint8"),
    (np.zeros(3, "M8[s]"), "dtype M8, not uint8"),
    (np.zeros(3, [("a", "u1")]), "dtype V1, not uint8"),
    (np.zeros(3, "S4"), "dtype S4, not uint8"),
    (np.zeros(3, np.int64), "dtype i8, not uint8"),
    (np.zeros(3, np.uint8).view(np.recarray), "recarray, which no data needs"),
    (np.uint8(3), "scalar, which no data needs"),
    (torch.zeros(3), "it names torch"),
    ({1, 2}, "which no data needs|instruction that"),
    (frozenset({1}), "which no data needs|instruction that"),
    (1.5, "instruction that no data needs"),
    (10**3000, "instruction that no data needs"),
    (UsageError("x"), "it names backmatch.training.failures.UsageError"),
    (pickles._Reader, "it names backmatch.training.pickles._Reader"),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(("value", "expected"), HOSTILE, ids=lambda v: str(v)[:30])
def test_hostile_objects(
    value: Any, expected: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"data": value}, protocol)
    assert re.search(expected, told(content))
    assert not list(tmp_path.iterdir())


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NDARRAY = b"cnumpy\nndarray\n"
DTYPE = b"cnumpy\ndtype\n"
EMPTY = RECONSTRUCT + NDARRAY + b"K\x00\x85U\x01b\x87R"
U1 = DTYPE + b"U\x02u1K\x00K\x01\x87R"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"cos\nsystem\n(S'touch HIT'\ntR.", "it names os.system"),
        (b"\x80\x02cos\nsystem\nU\x09touch HIT\x85R.", "it names os.system"),
        (b"(S'touch HIT'\nios\nsystem\n.", "('S')"),  # INST
        (b"(cos\nsystem\nS'touch HIT'\no.", "it names os.system"),  # OBJ
        (b"(" + NDARRAY + b"K\x03o.", "('o')"),
        (NDARRAY + b")\x81.", r"('\x81')"),  # NEWOBJ
        (NDARRAY + b")}\x92.", "instruction"),  # NEWOBJ_EX
        (b"Pid\n.", "('P')"),  # PERSID
        (b"U\x02idQ.", "('Q')"),  # BINPERSID
        (b"\x82\x01.", "instruction"),  # EXT1, 2 and 4
        (b"\x83\x01\x00.", "instruction"),
        (b"\x84\x01\x00\x00\x00.", "instruction"),
        (b"\x97.", "instruction"),  # NEXT_BUFFER
        (b"\x80\x02}}b.", "it changes something that is no array"),  # BUILD of a dictionary
        (RECONSTRUCT + b"}U\x05buildcos\nsystem\nsb.", "it names os.system"),
        (RECONSTRUCT + b"}b.", "it changes something that is no array"),
        (b"c_codecs\nencode\n}b.", "it changes something that is no array"),
        (b"cos\nsystem\n.", "it names os.system"),
        (b"cnumpy\nndarray.tofile\n.", "it names numpy.ndarray.tofile"),
        (b"\x8c\x05numpy\x8c\x0eufunc.__call__\x93.", "it names numpy.ufunc.__call__"),
        (b"cbuiltins\n__dict__\n.", "it names builtins.__dict__"),
        (b"c\x1b[31m\nx\n.", "it names ?[31m.x"),
        (b"]K\x01K\x02R.", "it calls something that no data needs"),
        (RECONSTRUCT + b"]R.", "it calls something that no data needs"),
        (NDARRAY + b")R.", "it makes an array of an unknown form"),
        (RECONSTRUCT + b"cnumpy\ndtype\nK\x00\x85U\x01b\x87R.", "array of an unknown kind"),
        (DTYPE + b"U\x01O\x85R.", "dtype O, not uint8"),
        (DTYPE + b"U\x05u1,O8\x85R.", "dtype u1,O8, not uint8"),
        (DTYPE + b"}\x85R.", "dtype dict, not uint8"),
        (dictionary(EMPTY), "an array in it was never filled"),
        (dictionary(EMPTY + b"(K\x01K\x05\x85cnumpy\ndtype\n\x89U\x05abcdetb"), "other than bytes"),
        (dictionary(EMPTY + b"(K\x01K\x05\x85" + U1 + b"\x89]tb"), "other than bytes"),
        (
            dictionary(EMPTY + b"(K\x01K\x05\x85" + U1 + b"\x89U\x04abcdtb"),
            "(5,) in it has 4 bytes",
        ),
        (dictionary(EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + U1 + b"\x89U\x01atb"), "impossible"),
        (dictionary(EMPTY + b"(K\x01K\x05" + U1 + b"\x89U\x05abcdetb"), "an impossible shape"),
        (dictionary(EMPTY + b"(K\x01)" + U1 + b"\x89U\x01atb"), "an impossible shape"),
        (dictionary(EMPTY + b"K\x05\x85b"), "an array of an unknown form"),
        (
            dictionary(
                EMPTY + b"(K\x01K\x05\x85" + U1 + b"(K\x03U\x01|N}}tb" + b"\x89U\x05abcdetb"
            ),
            "an array with fields",
        ),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "other than bytes"),
        (b"\x80\x02}K\x01K\x02s.", "keys that are no text"),
        (b"\x80\x02}U\x01a](K\x01K\x02u.", "sets items of something"),
        (b"\x80\x02](K\x01K\x02u.", "sets items of something"),
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02]}s.", "damaged"),
        (b"\x80\x02]K\x01a.", "no dictionary but a list"),
        (b"\x80\x09}.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02", "damaged"),
        (b"", "damaged"),
        (b".", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"<html>not a pickle</html>", "instruction"),
        (b"I" + b"9" * 10_000 + b"\n.", "number of 10000 digits"),  # int() of many digits is slow
        (b"\x80\x02}U\x04data]U\x04datas", "sets items of something"),
    ],
)
def test_hostile_bytes(
    content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in told(content)
    assert not list(tmp_path.iterdir())


def test_an_extension_code_that_is_registered_is_refused_too() -> None:
    """The standard machine would take it from its cache without asking ``find_class``."""
    copyreg.add_extension("builtins", "eval", 0x70)
    try:
        copyreg._extension_cache[0x70] = builtins.eval  # type: ignore[attr-defined]
        assert "instruction" in told(b"\x80\x02\x82\x70U\x011\x85R.")
    finally:
        copyreg.remove_extension("builtins", "eval", 0x70)
        copyreg._extension_cache.pop(0x70, None)  # type: ignore[attr-defined]


def nested(opening: bytes, closing: bytes, depth: int = 100_000) -> bytes:
    return b"\x80\x02" + opening * depth + closing * depth


@pytest.mark.parametrize(
    "content",
    [
        nested(b"]", b"a") + b".",
        dictionary(b")" + b"\x85" * 100_000),
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",  # as a key: hashing would recurse
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02}" + b"q\x01h\x01" * 50_000 + b"u.",
    ],
    ids=["lists", "tuples", "key", "marks", "references"],
)
def test_deep_nesting_does_not_crash(content: bytes) -> None:
    try:
        result = pickles.load(content)
    except pickles.RefusedError:
        return
    assert list(result) == ["data"]
    assert isinstance(result["data"], tuple)  # harmless: nobody reads it


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}U\x01ar\xff\xff\xff\xff.",  # memo at 2^32
        b"\x80\x02T\xff\xff\xff\x7f.",  # text of 2 GiB
        b"\x80\x02T\xff\xff\xff\xff.",  # a negative length
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x03B\xff\xff\xff\xff.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b".",
        dictionary(EMPTY + b"(K\x01(" + b"J\xff\xff\xff\x7f" * 4 + b"t" + U1 + b"\x89)tb"),
        # One text of 1 MiB, encoded again and again.
        b"\x80\x02(X\x00\x00\x10\x00" + b"a" * 2**20 + b"q\x01"
        + b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 1000 + b"l.",
    ],
    ids=["memo", "text", "negative", "unicode", "bytes", "bytes8", "unicode8", "bytearray8",
         "frame", "shape", "copies"],
)  # fmt: skip
def test_memory_is_taken_only_for_bytes_that_are_there(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(pickles.RefusedError):
            pickles.load(content)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_a_byte_that_asks_for_a_list_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 1000)
    assert "more than 1000 instructions" in told(b"\x80\x02" + b"]" * 1000 + b".")
    pickles.load(b"\x80\x02}U\x01a](" + b"K\x01" * 900 + b"es.")  # each file has its own count
    pickles.load(b"\x80\x02}U\x01a](" + b"K\x01" * 900 + b"es.")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_truncated_and_flipped_pickles_load_or_are_refused(protocol: int) -> None:
    """Any other exception, a crash or a hang fails the test."""
    value = {"data": np.arange(60, dtype=np.uint8).reshape(20, 3), "labels": [3] * 20, "f": ["a"]}
    content = pickle.dumps(value, protocol)
    for size in range(len(content)):
        with pytest.raises(pickles.RefusedError):
            pickles.load(content[:size])
    random = np.random.default_rng(0)
    loaded = 0
    for _ in range(1500):
        flipped = bytearray(content)
        for position in random.integers(0, len(content), int(random.integers(1, 4))):
            flipped[position] ^= 1 << int(random.integers(8))
        with contextlib.suppress(pickles.RefusedError):
            pickles.load(bytes(flipped))
            loaded += 1
    assert 0 < loaded < 1500


def test_a_hostile_file_in_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: one line, exit code 2, no run, nothing executed."""
    monkeypatch.chdir(tmp_path)
    fake_cifar.write(tmp_path / "data", "cifar10", "python", per_file=2)
    path = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps({"data": Calls(os.system, "touch HIT"), "labels": [1, 2]}))
    for more in ([], ["--dry-run"]):
        assert main(["train", "--data", "cifar10", *more]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == (
            "backmatch: --data cifar10: 'data/cifar-10-batches-py/data_batch_3': it names "
            "posix.system, which no data needs; get the file anew\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


FILES = fake_cifar.contents("cifar100", "binary", fake_cifar.draw("cifar100", 4))
FOLDER = "cifar-100-binary"


def member(name: str, kind: bytes, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


def refused_archive(tmp_path: Path, content: bytes) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cifar-100-binary.tar.gz").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        data.load("cifar100", torch.float32, str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(list(folder.iterdir())) == 1
    return message


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (member(f"{FOLDER}/train.bin", tarfile.SYMTYPE, "/etc/passwd"), "a link, a device"),
        (member(f"{FOLDER}/train.bin", tarfile.LNKTYPE, f"{FOLDER}/test.bin"), "a link, a device"),
        (member("other", tarfile.SYMTYPE, "/etc"), "other in it is a link"),
        (member("zero", tarfile.CHRTYPE), "a link, a device"),
        (member("disk", tarfile.BLKTYPE), "a link, a device"),
        (member("pipe", tarfile.FIFOTYPE), "a link, a device"),
        (member("/etc/cron.d/x", tarfile.REGTYPE), "leads out of it"),
        (member("../x", tarfile.REGTYPE), "the path ../x leads out of it"),
        (member(f"{FOLDER}/../../x", tarfile.DIRTYPE), "leads out of it"),
        (member(f"{FOLDER}/train.bin", tarfile.DIRTYPE), "train.bin is no file"),
    ],
    ids=["symlink", "hard-link", "other-link", "char", "block", "fifo", "absolute", "parent",
         "inner-parent", "folder"],
)  # fmt: skip
def test_hostile_members(made: tarfile.TarInfo, expected: str, tmp_path: Path) -> None:
    assert expected in refused_archive(tmp_path, fake_cifar.packed(FOLDER, FILES, made))


def test_a_name_twice(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in (f"{FOLDER}/test.bin", f"./{FOLDER}/test.bin"):
            one = member(name, tarfile.REGTYPE, size=len(FILES["test.bin"]))
            archive.addfile(one, io.BytesIO(FILES["test.bin"]))
    told = refused_archive(tmp_path, buffer.getvalue())
    assert "it holds cifar-100-binary/test.bin twice" in told


def test_more_members_than_a_data_set_has(tmp_path: Path) -> None:
    many = [member(f"file{i}", tarfile.REGTYPE) for i in range(archives.MOST_MEMBERS)]
    content = fake_cifar.packed(FOLDER, FILES, *many)
    assert "more than 100 members" in refused_archive(tmp_path, content)


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    content = fake_cifar.packed(FOLDER, {"train.bin": FILES["train.bin"]})
    assert "it has no cifar-100-binary/test.bin" in refused_archive(tmp_path, content)


@pytest.mark.parametrize("where", ["before", "as-member"])
def test_a_bomb(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that unpacks to more than is allowed: 4 MiB of zeros against 1 MiB here."""
    monkeypatch.setattr(archives, "MOST_BYTES", 2**20)
    name = "big" if where == "before" else f"{FOLDER}/train.bin"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(member(name, tarfile.REGTYPE, size=4 * 2**20), io.BytesIO(bytes(2**22)))
    assert "claims 4194304 bytes" in refused_archive(tmp_path, buffer.getvalue())


def test_a_bomb_of_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 2**20)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for i in range(6):
            part = member(f"part{i}", tarfile.REGTYPE, size=2**18)
            archive.addfile(part, io.BytesIO(bytes(2**18)))
    assert "unpacks to more than 1 MiB" in refused_archive(tmp_path, buffer.getvalue())


def test_a_sparse_member_that_claims_much(tmp_path: Path) -> None:
    header = member(f"{FOLDER}/train.bin", tarfile.GNUTYPE_SPARSE, size=0).tobuf()
    assert "link, a device or another special file" in refused_archive(
        tmp_path, gzip.compress(header + bytes(1024))
    )


@pytest.mark.parametrize("size", [0, 1, 10, 100, 5000, -1, -8, -9])
def test_truncated_archives(size: int, tmp_path: Path) -> None:
    content = fake_cifar.packed(FOLDER, FILES)[:size]
    assert "get the file anew" in refused_archive(tmp_path, content)


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bits_in_an_archive_are_noticed(seed: int, tmp_path: Path) -> None:
    """gzip's checksum sees them, wherever they are; its header has bytes that mean nothing."""
    content = bytearray(fake_cifar.packed(FOLDER, FILES))
    random = np.random.default_rng(seed)
    content[int(random.integers(20, len(content)))] ^= 1 << int(random.integers(8))
    refused_archive(tmp_path, bytes(content))
