"""The options of ``backmatch bench``, read and checked without importing torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.failures import UsageError, show
from ..training.readers import choice, integer
from ..training.rundir import check_writable

RESULT, FIGURE = "bench.json", "bench.png"

#: name -> what it measures.
QUESTIONS = {
    "spd_solve": "batched factor + solve against torch.linalg and SciPy",
    "scaled_gram": "one shared K, many scalings, against a scaled copy of K per system",
    "weighted_gram": "weighted Gram matrices against einsum, bmm and a loop; peak memory",
    "cg": "conjugate gradient, dense and scaled-Gram, against the same loop in torch",
    "step": "a whole exact step against back-propagation and the same step in torch.linalg",
    "peers": "the exact step against ProxProp, FOOF and LocoProp-S steps",
    "scaling": "time against n, batch, m and threads",
}
#: Questions that --sizes and --batch reach.
SIZED = ("spd_solve", "scaled_gram", "weighted_gram", "cg")
DTYPES = {
    "float32": ("float32",),
    "float64": ("float64",),
    "both": ("float32", "float64"),
}


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure and how.

    Attributes:
        quick: fewer and smaller cases, fewer repeats: under a minute on two cores.
        only: the questions.
        sizes: n of the kernel questions; ``None``: each question's own.
        dtypes: ``"float32"``, ``"float64"`` or both.
        batch: systems per call of the kernel questions; ``None``: by n.
        threads: of torch and of the kernels; ``None``: torch's own number.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """

    quick: bool = False
    only: tuple[str, ...] = tuple(QUESTIONS)
    sizes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] = DTYPES["both"]
    batch: int | None = None
    threads: int | None = None
    device: str = "auto"

    def as_dict(self) -> dict[str, Any]:
        """For ``bench.json``."""
        return dataclasses.asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``backmatch bench``."""
    known = "\n".join(f"  {name:<14} {text}" for name, text in QUESTIONS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    about = textwrap.fill(parser.description or "", 96)
    parser.description = f"{about}\n\nquestions:\n{known}"
    parser.epilog = textwrap.fill(parser.epilog or "", 96)
    parser.add_argument(
        "--quick", action="store_true", help="fewer, smaller cases in float32: under a minute"
    )
    parser.add_argument("--only", metavar="NAME,...", help="only these questions (default: all)")
    parser.add_argument("--sizes", metavar="N,...", help="n of the kernels' systems: 8,16,32")
    parser.add_argument("--batch", metavar="N", help="systems per call of the kernels")
    parser.add_argument(
        "--dtype", metavar="TYPE", help="float32, float64 or both (default; float32 with --quick)"
    )
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: torch's number)")
    parser.add_argument(
        "--device", metavar="NAME", default="auto", help="auto (default), cpu or cuda"
    )
    parser.add_argument(
        "--out", metavar="DIR", help=f"also write {RESULT} and {FIGURE} there (default: print only)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def read(parsed: argparse.Namespace) -> BenchOptions:
    """The checked options.

    Raises:
        UsageError: a value that cannot be used; the text names the flag and what it expects.
    """
    only = _questions(parsed.only)
    sizes, batch = _sizes(parsed.sizes), _value("--batch", parsed.batch, integer(1, 2**24))
    for flag, value in (("--sizes", sizes), ("--batch", batch)):
        if value is not None and not set(only) & set(SIZED):
            raise UsageError(f"{flag} has no effect with --only {','.join(only)}; drop it")
    dtype = _value("--dtype", parsed.dtype, choice(*DTYPES))
    return BenchOptions(
        quick=parsed.quick,
        only=only,
        sizes=sizes,
        dtypes=DTYPES[dtype or ("float32" if parsed.quick else "both")],
        batch=batch,
        threads=_value("--threads", parsed.threads, integer(1, 4096)),
        device=_value("--device", parsed.device, choice("auto", "cpu", "cuda")),
    )


def check_out(path: Path) -> None:
    """Refuse an ``--out`` folder that holds a result or cannot be written; changes nothing."""
    where = f"--out {show(str(path), 200)}"
    check_writable(path, where)
    if (path / RESULT).exists():
        raise UsageError(f"{where}: holds a {RESULT} already; remove it, or choose another folder")


def _questions(raw: str | None) -> tuple[str, ...]:
    if raw is None:
        return tuple(QUESTIONS)
    names = raw.split(",")
    for name in names:
        if name not in QUESTIONS:
            close = difflib.get_close_matches(name[:60], QUESTIONS, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise UsageError(
                f"--only: expected names out of {', '.join(QUESTIONS)}, got {show(name)}{hint}"
            )
    return tuple(name for name in QUESTIONS if name in names)


def _sizes(raw: str | None) -> tuple[int, ...] | None:
    if raw is None:
        return None
    try:
        sizes = [integer(1, 4096)(part) for part in raw.split(",")]
    except ValueError:
        raise UsageError(
            "--sizes: expected whole numbers from 1 to 4096 with commas between, "
            f"for example 8,16,32, got {show(raw)}"
        ) from None
    return tuple(sorted(set(sizes)))


def _value(flag: str, raw: str | None, read: Callable[[Any], Any]) -> Any:
    if raw is None:
        return None
    try:
        return read(raw)
    except ValueError as error:
        raise UsageError(f"{flag}: expected {error}, got {show(raw)}") from None
