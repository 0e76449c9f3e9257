"""Time against n, batch, m and threads: where cliffs would show.

Sizes just above a block or vector width (17, 33, 65, 129, 257) stand beside those at it; batch 1
shows the fixed cost of a call. In the first dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from . import scaled_gram, spd_solve, weighted_gram
from .case import Case, Settings

SIZES = (4, 8, 15, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384, 512)
QUICK_SIZES = (16, 17, 64, 65)
BATCHES, QUICK_BATCHES = (1, 8, 64, 512, 4096), (1, 64)
ROWS, QUICK_ROWS = (64, 128, 256, 512, 1024, 2048), (64, 512)
#: Left out here: spd_solve has it against every n.
_LEFT_OUT = ("scipy",)


def cases(settings: Settings) -> Iterator[Case]:
    """All four axes."""
    dtype, quick = settings.dtypes[0], settings.quick
    for n in QUICK_SIZES if quick else SIZES:
        unbound = dataclasses.replace(settings.options, batch=None)
        batch = dataclasses.replace(settings, options=unbound).batch(n * n * dtype.itemsize)
        yield _labelled("n", "spd_solve", spd_solve.case(settings, "scaling", n, batch, dtype))
    for batch in QUICK_BATCHES if quick else BATCHES:
        one = spd_solve.case(settings, "scaling", 32, batch, dtype)
        yield _labelled("batch", "spd_solve", one)
    for m in QUICK_ROWS if quick else ROWS:
        one = weighted_gram.case(settings, "scaling", m, 64, 64, dtype)
        yield _labelled("m", "weighted_gram", one)
    if settings.device.type == "cpu":
        yield from _over_threads(settings, dtype)


def _over_threads(settings: Settings, dtype: torch.dtype) -> Iterator[Case]:
    most = torch.get_num_threads()
    counts = sorted({most, *(2**i for i in range(12) if 2**i < most)})
    systems = 256 if settings.quick else 1024
    for threads in counts:
        for kernel, one in (
            ("spd_solve", spd_solve.case(settings, "scaling", 64, systems, dtype)),
            ("scaled_gram", scaled_gram.case(settings, "scaling", 128, systems, dtype, "relu")),
        ):
            case = _labelled("threads", kernel, one)
            about = {**case.about, "threads": threads}
            yield dataclasses.replace(case, about=about, threads=threads)


def _labelled(axis: str, kernel: str, case: Case) -> Case:
    """``case`` as part of this question, peers of other questions left out."""
    kept = {name: run for name, run in case.candidates.items() if name not in _LEFT_OUT}
    about = {"over": axis, "kernel": kernel}
    for key in ("n", "batch", "m", "dtype"):
        if key in case.about:
            about[key] = case.about[key]
    return dataclasses.replace(case, about=about, candidates=kept)
