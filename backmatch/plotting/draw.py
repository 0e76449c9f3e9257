"""From folders to one figure: what each folder holds, and who draws it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from ..training.failures import UsageError, show
from ..training.rundir import CONFIG
from . import png
from .read_json import read_mapping

#: Result file of a folder -> the module whose ``draw(result)`` gives the figure.
RESULTS = {
    "compare.json": "backmatch.comparing.figure",
    "analysis.json": "backmatch.analysis.figure",
}
PAGE, OVERLAY = "plot.png", "overlay.png"


def start(folders: Sequence[Path], out: Path | None) -> Path:
    """Draw the folders and write the figure; returns where.

    Args:
        folders: one folder of a run, a comparison or an analysis, or several of runs.
        out: the file; ``None``: ``plot.png`` in the folder, with several ``overlay.png`` in the
            first.

    Raises:
        UsageError: a folder holds nothing to draw, is damaged, or the file cannot be written.
        RunError: the disk takes no more.
    """
    kinds = [_kind(folder) for folder in folders]
    if len(folders) > 1:
        for folder, kind in zip(folders, kinds, strict=True):
            if kind != CONFIG:
                raise UsageError(
                    f"{show(str(folder), 200)}: holds {kind}; several folders are drawn together "
                    "if all hold runs: draw this one alone"
                )
    path = folders[0] / (PAGE if len(folders) == 1 else OVERLAY) if out is None else out
    where = ("--out " if out is not None else "") + show(str(path), 200)
    png.check_target(path, where)
    png.write(path, png.marked(_content(folders, kinds[0])), where)
    return path


def _kind(folder: Path) -> str:
    """The file that says what a folder holds."""
    where = show(str(folder), 200)
    try:
        if not folder.is_dir():
            raise UsageError(f"{where}: no such folder; give the folder of a run (--out of train)")
        for name in (*RESULTS, CONFIG):
            if (folder / name).exists():
                return name
    except OSError as error:
        raise UsageError(f"{where}: cannot read it: {error.strerror}") from None
    raise UsageError(
        f"{where}: holds nothing to draw (no {CONFIG} of a run, {' or '.join(RESULTS)})"
    )


def _content(folders: Sequence[Path], kind: str) -> bytes:
    if kind in RESULTS:
        return _draw_result(folders[0] / kind)
    try:
        from . import overlay, run_page, stored_run
    except ImportError as error:
        raise _missing(error) from None
    if len(folders) > overlay.MOST_RUNS:
        raise UsageError(f"at most {overlay.MOST_RUNS} runs fit into one figure; draw fewer")
    runs = [stored_run.read(folder) for folder in folders]
    return run_page.page(runs[0]) if len(runs) == 1 else overlay.overlay(runs)


def _draw_result(path: Path) -> bytes:
    result = read_mapping(path)
    try:
        module = importlib.import_module(RESULTS[path.name])
    except ImportError as error:
        raise _missing(error) from None
    try:
        content = module.draw(result)
        return png.marked(content)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"{show(str(path), 200)}: damaged, or of another version "
            f"({type(error).__name__}: {show(str(error))})"
        ) from None


def _missing(error: ImportError) -> Exception:
    name = (error.name or "").partition(".")[0]
    if name == "matplotlib":
        return UsageError("matplotlib is not installed; pip install 'backmatch[cli]' has it")
    return error
