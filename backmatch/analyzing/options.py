"""The options of ``backmatch analyze``, read and checked without importing torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import textwrap
from pathlib import Path
from typing import Any

from ..training.failures import UsageError, show
from ..training.readers import Reader, choice, integer
from ..training.rundir import check_writable

RESULT, FIGURE = "analysis.json", "analysis.png"

#: name -> what it shows.
STUDIES = {
    "init": "Gaussian, Xavier, He and orthonormal initialisation of one block",
    "skip": "a skip connection beside a branch of growing weight",
    "norm": "centring and batch norm",
    "depth": "the blocks of deep nets, one after the other",
    "width": "nets of four blocks, the width swept",
    "training": "the blocks of nets while they learn, by back-propagation and back-matching",
}
#: Flag -> studies that it reaches.
REACH = {
    "--draws": ("init", "skip", "norm"),
    "--nets": ("depth", "width", "training"),
    "--size": ("init", "skip", "norm", "depth", "training"),
    "--data": ("training",),
    "--method": ("training",),
}
METHODS = {"bp": ("bp",), "backmatch": ("backmatch",), "both": ("bp", "backmatch")}


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """What to study and how.

    Attributes:
        studies: their names.
        draws: matrices per case of init, skip and norm; ``None``: 1000, 100 if quick.
        nets: nets per case of depth, width and training; ``None``: 5, 3 and 3, 1 if quick.
        size: matrices are size x size, hidden layers that wide; ``None``: 64, nets 32 if quick.
        seed: of all draws.
        quick: fewer draws, nets, blocks, widths and steps: under 20 seconds on two cores.
        data: of the study training.
        methods: of the study training.
        threads: of torch; small matrices gain nothing from more than one.
    """

    studies: tuple[str, ...] = tuple(STUDIES)
    draws: int | None = None
    nets: int | None = None
    size: int | None = None
    seed: int = 0
    quick: bool = False
    data: str = "digits"
    methods: tuple[str, ...] = METHODS["both"]
    threads: int = 1

    def as_dict(self) -> dict[str, Any]:
        """For ``analysis.json``."""
        return dataclasses.asdict(self)

    def arguments(self, study: str) -> dict[str, Any]:
        """Keyword arguments of ``bm.analysis.STUDY``; what is not in it has the default there."""
        chosen: dict[str, Any] = {"seed": self.seed}
        if study in REACH["--draws"]:
            chosen["draws"] = self.draws or (100 if self.quick else None)
        if study in REACH["--nets"]:
            chosen["nets"] = self.nets or (1 if self.quick else None)
        if study in REACH["--size"]:
            on_nets = study in REACH["--nets"]
            chosen["size"] = self.size or (32 if self.quick and on_nets else None)
        if study == "training":
            chosen |= {"data": self.data, "methods": self.methods}
        if self.quick:
            chosen |= _QUICK.get(study, {})
        return {name: value for name, value in chosen.items() if value is not None}


_QUICK: dict[str, dict[str, Any]] = {
    "depth": {"blocks": 6},
    "width": {"widths": (8, 16, 32)},
    "training": {"steps": 22},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``backmatch analyze``."""
    known = "\n".join(f"  {name:<9} {text}" for name, text in STUDIES.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    about = textwrap.fill(parser.description or "", 96)
    parser.description = f"{about}\n\nstudies:\n{known}"
    parser.epilog = textwrap.fill(parser.epilog or "", 96)
    parser.add_argument(
        "--study", metavar="NAME,...", default="all", help="only these studies (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer draws and smaller nets: under 20 seconds"
    )
    parser.add_argument(
        "--draws", metavar="N", help="matrices per case of init, skip, norm (default: 1000)"
    )
    parser.add_argument(
        "--nets", metavar="N", help="nets per case of depth, width, training (default: 5, 3, 3)"
    )
    parser.add_argument(
        "--size",
        metavar="N",
        help="order of the matrices, width of the hidden layers (default: 64)",
    )
    parser.add_argument("--seed", metavar="N", default="0", help="of all draws (default: 0)")
    parser.add_argument(
        "--data", metavar="SOURCE", help="of training: digits (default), synthetic or FILE.npz"
    )
    parser.add_argument(
        "--method", metavar="NAME", help="of training: bp, backmatch or both (default)"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        default="1",
        help="CPU threads (default: 1; small matrices gain nothing from more)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help=f"also write {RESULT} and {FIGURE} there (default: print only)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def read(parsed: argparse.Namespace) -> AnalyzeOptions:
    """The checked options.

    Raises:
        UsageError: a value that cannot be used; the text names the flag and what it expects.
    """
    studies = _studies(parsed.study)
    for flag, reached in REACH.items():
        given = getattr(parsed, flag[2:])
        if given is not None and not set(studies) & set(reached):
            raise UsageError(f"{flag} has no effect with --study {','.join(studies)}; drop it")
    return AnalyzeOptions(
        studies=studies,
        draws=_value("--draws", parsed.draws, integer(1, 10**6)),
        nets=_value("--nets", parsed.nets, integer(1, 1000)),
        size=_value("--size", parsed.size, integer(2, 1024)),
        seed=_value("--seed", parsed.seed, integer(0)),
        quick=parsed.quick,
        data=_data(parsed.data),
        methods=METHODS[_value("--method", parsed.method, choice(*METHODS)) or "both"],
        threads=_value("--threads", parsed.threads, integer(1, 4096)),
    )


def check_out(path: Path) -> None:
    """Refuse an ``--out`` folder that holds a result or cannot be written; changes nothing."""
    where = f"--out {show(str(path), 200)}"
    check_writable(path, where)
    if (path / RESULT).exists():
        raise UsageError(f"{where}: holds an {RESULT} already; remove it, or choose another folder")


def _studies(raw: str) -> tuple[str, ...]:
    if raw == "all":
        return tuple(STUDIES)
    names = raw.split(",")
    for name in names:
        if name not in STUDIES:
            close = difflib.get_close_matches(name[:60], STUDIES, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            expected = f"all or names out of {', '.join(STUDIES)}"
            raise UsageError(f"--study: expected {expected}, got {show(name)}{hint}")
    return tuple(name for name in STUDIES if name in names)


def _data(raw: str | None) -> str:
    if raw is None:
        return "digits"
    if raw not in ("digits", "synthetic") and not raw.endswith(".npz"):
        raise UsageError(
            f"--data: expected digits, synthetic or the path of an .npz file, got {show(raw)}"
        )
    return raw


def _value(flag: str, raw: str | None, read: Reader) -> Any:
    if raw is None:
        return None
    try:
        return read(raw)
    except ValueError as error:
        raise UsageError(f"{flag}: expected {error}, got {show(raw)}") from None
