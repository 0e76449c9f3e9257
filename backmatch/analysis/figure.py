"""``analysis.png``: one band of panels per study."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from . import panels

_RC: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
#: Inches.
_WIDTH = 12.5
#: Study -> height of its band in inches, for so many methods of training.
_HEIGHTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "init": lambda study: 3.6,
    "skip": lambda study: 3.8,
    "norm": lambda study: 3.4,
    "depth": lambda study: 3.5,
    "width": lambda study: 3.5,
    "training": lambda study: 0.7 + 4.4 * len(panels.methods(study)),
}
_TITLES = {
    "init": "init: initialisation of one block",
    "skip": "skip: T = z + a f(z), weight a of the branch",
    "norm": "norm: one Linear on inputs uniform on [0.5, 1.5]",
    "depth": "depth: blocks of deep nets at initialisation",
    "width": "width: nets of four blocks at initialisation",
    "training": "training: blocks of nets while they learn",
}
_DRAW = {
    "init": panels.init,
    "skip": panels.skip,
    "norm": panels.norm,
    "depth": panels.depth,
    "width": panels.width,
    "training": panels.training,
}


def draw(result: dict[str, Any]) -> bytes:
    """The page as a PNG, 1375 pixels wide; the same result gives the same bytes.

    Args:
        result: what ``analysis.json`` holds; of its ``studies`` those that are there are drawn.

    Raises:
        ValueError: there is none.
    """
    studies = {name: study for name, study in result["studies"].items() if name in _DRAW}
    if not studies:
        raise ValueError("result must hold at least one study, got none")
    heights = [_HEIGHTS[name](study) for name, study in studies.items()]
    with matplotlib.style.context(["default", _RC]):  # whatever the user's own file says
        page = Figure(figsize=(_WIDTH, sum(heights)), dpi=110, layout="constrained")
        bands = page.subfigures(len(studies), 1, height_ratios=heights, squeeze=False)[:, 0]
        for band, (name, study) in zip(bands, studies.items(), strict=True):
            title = _TITLES[name] + panels.about(study)
            band.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
            _DRAW[name](band, study["rows"])
        buffer = io.BytesIO()
        page.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
