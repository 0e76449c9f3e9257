"""Probes: what one step of the sweep does at every block, beside what other methods would do."""

from __future__ import annotations

from .likeness import Likeness
from .measure import probe
from .report import BlockProbe, LocalLoss, Probe, SideProbe
from .spectrum import Spectrum
from .spread import Spread

__all__ = [
    "BlockProbe",
    "Likeness",
    "LocalLoss",
    "Probe",
    "SideProbe",
    "Spectrum",
    "Spread",
    "probe",
]
