"""Dropouts of every kind: diagonal by the mask they drew."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_checks import LayerCase, deviation, sweep
from torch import nn

import backmatch as bm

MASKS = {
    "alpha": (nn.AlphaDropout, (4, 6)),
    "feature-alpha": (nn.FeatureAlphaDropout, (4, 3, 2, 2)),
    "1d": (nn.Dropout1d, (4, 3, 5)),
    "2d": (nn.Dropout2d, (4, 3, 2, 2)),
    "3d": (nn.Dropout3d, (3, 2, 2, 2, 2)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_dropouts_drew(name, training):
    kind, shape = MASKS[name]
    case = LayerCase(lambda: nn.Sequential(nn.Tanh(), kind(0.4)).train(training), shape)
    for damping in (0.0, 1e-3, bm.Relative(0.1)):
        check_seeded(case, damping)


def check_seeded(case, damping):
    layer, z, r = case.make()
    steps = []
    for hooked in (False, True):
        block = copy.deepcopy(layer)
        if hooked:
            block.register_forward_hook(lambda *_: None)
        torch.manual_seed(3)
        found = sweep(block, z, r, bm.Cholesky(damping), order="sequential", newton_steps=1)
        steps.append((found.input_step, found.input.rank))
    assert deviation(steps[0][0], steps[1][0].numpy()) < 1e-12
    assert steps[0][1] == steps[1][1]
