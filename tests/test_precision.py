"""A sweep keeps the bits of float32 whatever the process allows, and leaves the setting alone."""

import pytest
import torch
from torch import nn

import backmatch as bm
from backmatch import precision
from backmatch.precision import full_precision


def settings():
    return [getattr(owner, name) for owner, name, _ in precision._settings()]


@pytest.fixture(params=["highest", "high", "medium"])
def allowed(request):
    torch.set_float32_matmul_precision(request.param)
    yield settings()
    torch.set_float32_matmul_precision("highest")


def test_the_setting_comes_back(allowed):
    with full_precision():
        assert set(settings()) == {"ieee"}
    assert settings() == allowed
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == allowed


def test_solves_run_in_full_precision_and_the_loss_as_allowed(allowed):
    seen = {}

    class Watched(nn.Linear):
        def forward(self, z):
            seen["forward"] = settings()
            return super().forward(z)

    def loss(out):
        seen["loss"] = settings()
        return out.square().mean()

    matcher = bm.BackMatching([Watched(3, 4), nn.ReLU()], order="sequential")
    matcher.backward(torch.ones(5, 3), loss)
    assert set(seen["forward"]) == {"ieee"}
    assert seen["loss"] == allowed
    assert settings() == allowed
