"""Read a pickled dictionary of byte arrays and labels without trusting it.

Unpickling as Python does it runs whatever the file asks for. Here a file can ask for nothing: it
may name only what NumPy writes to rebuild an array, and even these names stand for functions of
this module that check their arguments. Instructions that such a dictionary does not need
(persistent ids, extension codes, new objects, sets) are unknown, memory is taken only for bytes
that are there, and keys are text, so that hashing cannot recurse.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Digits of a whole number written as text: to read many takes quadratic time.
MOST_DIGITS = 20
#: Instructions of a pickle; CIFAR's need up to ten for each of 50,000 images. One byte can ask for
#: a list, which takes 64.
MOST_INSTRUCTIONS = 1_000_000
#: Characters of a key: equal ones are compared to their end, each time that one is set.
MOST_CHARACTERS = 100


class RefusedError(Exception):
    """The pickle holds something other than arrays of bytes, whole numbers and text."""


def load(content: bytes) -> dict[str, Any]:
    """The dictionary of a pickle of protocol 1 to 5, made by Python 2 or 3.

    Keys become text; values are uint8 arrays, ints, ``str``, ``bytes`` (text of Python 2),
    lists and tuples of them.

    Raises:
        RefusedError: damaged, another kind of object, or anything that is not data.

    >>> load(pickle.dumps({b"labels": [3, 1]}, protocol=2))
    {'labels': [3, 1]}
    >>> load(pickle.dumps({"f": print}))
    Traceback (most recent call last):
        ...
    backmatch.training.pickles.RefusedError: it names builtins.print, which no data needs
    """
    try:
        result = _Reader(content).load()
    except RefusedError:
        raise
    except Exception as error:  # whatever the machine makes of hostile bytes
        raise RefusedError(f"it is damaged ({type(error).__name__})") from None
    if type(result) is not dict:
        raise RefusedError(f"it holds no dictionary but a {type(result).__name__}")
    return {_text(key): _value(value) for key, value in result.items()}


def _text(key: str | bytes) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _value(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    if value.content is None:
        raise RefusedError("an array in it was never filled")
    return value.content


class _Reader(pickle._Unpickler):
    """The standard library's own machine in Python, with few instructions and no way to call.

    The compiled one takes the memory that a file claims to need before it looks for the bytes.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._encoded, self._size = 0, len(content)
        self.dispatch = _Instructions(_KNOWN)  # type: ignore[misc]  # one counter for each file

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; only the names of :data:`_NAMES` stand for anything."""
        if (module, name) not in _NAMES:
            raise RefusedError(f"it names {_shown(module)}.{_shown(name)}, which no data needs")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError("it refers to something outside of it")

    def load_int(self) -> None:
        text = self.readline().strip()
        if text in (b"00", b"01"):  # how protocol 1 writes a truth value
            self.append(text == b"01")
        elif len(text) > MOST_DIGITS:
            raise RefusedError(f"it holds a number of {len(text)} digits")
        else:
            self.append(int(text))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(arguments) is not tuple or not isinstance(function, _Name):
            raise RefusedError("it calls something that no data needs")
        result = function.build(*arguments)
        if isinstance(result, bytes):  # a reference repeated costs nothing, a copy does
            self._encoded += len(result)
            if self._encoded > self._size:
                raise RefusedError("it takes more memory than its bytes")
        self.append(result)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _DType)):
            raise RefusedError("it changes something that is no array")
        self.stack[-1].fill(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_bytes(self) -> None:
        """An array's bytes in protocol 5; the standard machine would take the memory claimed."""
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise RefusedError("it sets items of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes):
                raise RefusedError("a dictionary in it has keys that are no text")
            if len(key) > MOST_CHARACTERS:
                raise RefusedError(f"a dictionary in it has a key of {len(key)} characters")
            target[key] = value


class _Instructions(dict[int, Callable[..., None]]):
    """Looked up once for each instruction, and counted."""

    count = 0

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.count += 1
        if self.count > MOST_INSTRUCTIONS:
            raise RefusedError(f"it has more than {MOST_INSTRUCTIONS} instructions")
        if code not in self:
            raise RefusedError(f"it uses an instruction that no data needs ({chr(code)!a})")
        return super().__getitem__(code)


def _instructions() -> dict[int, Callable[..., None]]:
    plain = (
        *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE),
        *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1),
        *(pickle.BININT2, pickle.LONG1, pickle.SHORT_BINSTRING, pickle.BINSTRING),
        *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
        *(pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8),
        *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
        *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.MEMOIZE),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    )
    known: dict[int, Callable[..., None]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in plain
    }
    for code, own in (
        (pickle.INT, _Reader.load_int),
        (pickle.REDUCE, _Reader.load_reduce),
        (pickle.BUILD, _Reader.load_build),
        (pickle.SETITEM, _Reader.load_setitem),
        (pickle.SETITEMS, _Reader.load_setitems),
        (pickle.DICT, _Reader.load_dict),
        (pickle.BYTEARRAY8, _Reader.load_bytes),
    ):
        known[code[0]] = own
    return known


_KNOWN = _instructions()


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that a pickle may use, and what it builds."""

    build: Callable[..., Any]


class _DType:
    """The dtype uint8; every other one is refused."""

    def fill(self, state: Any) -> None:
        # version, byte order, then subtype, field names and fields: none of them for bytes.
        if type(state) is not tuple or len(state) < 5 or state[2:5] != (None, None, None):
            raise RefusedError("it holds an array with fields")


class _Array:
    """An array of bytes on its way."""

    def __init__(self) -> None:
        self.content: Array | None = None

    def fill(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise RefusedError("it holds an array of an unknown form")
        _, shape, dtype, columns_first, content = state
        self.content = _shaped(content, dtype, shape, "F" if columns_first else "C")


def _shaped(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    if not isinstance(dtype, _DType) or type(content) is not bytes:
        raise RefusedError("it holds an array of something other than bytes")
    sizes = shape if type(shape) is tuple else ()
    if not 1 <= len(sizes) <= 4 or not all(type(n) is int and 0 <= n < 2**40 for n in sizes):
        raise RefusedError("it holds an array of an impossible shape")
    count = 1
    for size in sizes:
        count *= size
    if count != len(content):
        raise RefusedError(f"an array of shape {sizes} in it has {len(content)} bytes")
    if order not in ("C", "F"):
        raise RefusedError("it holds an array of an unknown form")
    return np.frombuffer(content, np.uint8).reshape(sizes, order=order)


def _reconstruct(kind: Any, shape: Any = None, code: Any = None) -> _Array:
    if kind is not _NDARRAY:
        raise RefusedError("it holds an array of an unknown kind")
    return _Array()


def _dtype(name: Any, *flags: Any) -> _DType:
    name = _text(name) if isinstance(name, (str, bytes)) else name
    if name not in ("u1", "|u1", "uint8"):
        kind = _shown(name) if isinstance(name, str) else type(name).__name__
        raise RefusedError(f"it holds an array of dtype {kind}, not uint8")
    return _DType()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    array = _Array()
    array.content = _shaped(content, dtype, shape, order)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in protocols that know only text."""
    if type(text) is not str or encoding not in ("latin1", b"latin1"):
        raise RefusedError("it encodes something other than bytes")
    return text.encode("latin1")


def _not_called(*arguments: Any) -> Any:
    raise RefusedError("it makes an array of an unknown form")


_NDARRAY = _Name(_not_called)

#: All that a pickle may name; NumPy 2 moved ``core`` to ``_core``.
_NAMES: dict[tuple[str, str], _Name] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name(_dtype),
    ("numpy.core.multiarray", "_reconstruct"): _Name(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Name(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): _Name(_from_buffer),
    ("numpy._core.numeric", "_frombuffer"): _Name(_from_buffer),
    ("_codecs", "encode"): _Name(_encode),
}


def _shown(name: str) -> str:
    """A name from a hostile file, short and printable."""
    return "".join(c if c.isprintable() else "?" for c in name[:40])
