"""What a study returns: rows of quantiles, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spectra import Spectra

#: One row: ``case`` says what was drawn, the other fields what came out.
Row = dict[str, Any]

#: Of every quantity; the names end in per cent.
QUANTILES = {"q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9}

#: What is told of a spectrum.
QUANTITIES = ("kappa", "spectral_norm", "trace_mean", "rank")


@dataclass(frozen=True)
class Study:
    """The rows of one study and how they were made.

    Attributes:
        name: as in ``bm.analysis`` and ``backmatch analyze --study``.
        claim: the claim that it tests, in a sentence.
        options: what it was called with; with it the rows can be made again.
        rows: one mapping per case: ``study``, ``case``, ``count`` (values behind the quantiles),
            and for each of ``kappa``, ``spectral_norm``, ``trace_mean`` and ``rank`` the
            quantiles ``q10``, ``q25``, ``median``, ``q75``, ``q90``.
    """

    name: str
    claim: str
    options: dict[str, Any]
    rows: list[Row]

    def find(self, **case: object) -> Row:
        """The one row whose case has these values.

        Raises:
            LookupError: no row has them, or more than one.
        """
        found = [row for row in self.rows if case.items() <= row["case"].items()]
        if len(found) != 1:
            raise LookupError(f"{self.name}: {len(found)} rows have {case}, expected one")
        return found[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON."""
        return {
            "name": self.name,
            "claim": self.claim,
            "options": self.options,
            "rows": self.rows,
        }


class InterruptedStudyError(Exception):
    """Raised by a ``check_stop`` to end a study.

    Attributes:
        partial: what the study has found so far, once it has passed this on.
    """

    partial: Study | None = None


def gathered(name: str, claim: str, options: dict[str, Any], rows: Iterable[Row]) -> Study:
    """The study with all rows.

    Raises:
        InterruptedStudyError: a ``check_stop`` did; with the rows that were complete.
    """
    kept: list[Row] = []
    study = Study(name, claim, options, kept)
    try:
        kept.extend(rows)
    except InterruptedStudyError as stop:
        stop.partial = study
        raise
    return study


def row(study: str, case: dict[str, Any], spectra: Spectra) -> Row:
    """The quantiles over all systems of ``spectra``."""
    values = {
        "kappa": spectra.condition_numbers,
        "spectral_norm": spectra.spectral_norms,
        "trace_mean": spectra.trace_means,
        "rank": spectra.ranks,
    }
    return {
        "study": study,
        "case": case,
        "count": len(spectra.eigenvalues),
        **{name: quantiles(each) for name, each in values.items()},
    }


def quantiles(values: Tensor) -> dict[str, float | int | None]:
    """The five quantiles of the finite values, by linear interpolation.

    Args:
        values: shape (count,). NaN stands for "there is none" (the condition number of a zero
            matrix); such values are left out and counted as ``undefined``.

    >>> quantiles(torch.arange(11.0))["q90"]
    9.0
    >>> quantiles(torch.tensor([1.0, float("nan")]))
    {'q10': 1.0, 'q25': 1.0, 'median': 1.0, 'q75': 1.0, 'q90': 1.0, 'undefined': 1}
    """
    values = values.double().cpu()
    there = values[~values.isnan()]
    out: dict[str, float | int | None] = dict.fromkeys(QUANTILES)
    if len(there):
        marks = torch.tensor(list(QUANTILES.values()), dtype=there.dtype)
        out = dict(zip(QUANTILES, torch.quantile(there, marks).tolist(), strict=True))
    missing = len(values) - len(there)
    return {**out, "undefined": missing} if missing else out
