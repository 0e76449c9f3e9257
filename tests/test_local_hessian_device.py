"""``bm.local_hessian`` on a GPU, as far as that can be seen without one: no devices may mix."""

from __future__ import annotations

import cases
import pytest
import torch
import vision_cases
from hessian_cases import SEED, blocks_of, displacement_for, has_side
from pretend_device import PretendCuda, pretend, pretend_modules, pretends
from torch import Tensor, nn

import backmatch as bm
from backmatch.analysis import hessian, isolation

CATALOGUE = {**cases.NETS, **vision_cases.NETS}
NAMES = ["tanh", "frozen-block", "tied", "batch-norm", "conv-bn-relu", "bn-train", "dropout2d"]


def numbers(
    block: nn.Module, z: Tensor, side: str, r: Tensor | None, k: int | None
) -> list[Tensor]:
    """All that a Hessian answers with."""
    torch.manual_seed(SEED)
    H = bm.local_hessian(block, z, side, r, k=k)
    v = torch.ones(H.size, dtype=H.dtype, device=z.device)
    found = [H.eigenvalues, H.to_dense(), H @ v]
    if k is None:
        found.append(torch.tensor([H.trace, H.rank, H.condition_number, H.kappa(1)]))
    assert H.device == z.device
    return found


@pytest.fixture
def copies_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.Parameter's constructor makes its own tensor, which the pretence does not reach."""
    made = isolation._copy

    def copied(parameter: Tensor) -> Tensor:
        there = made(parameter)
        if pretends(parameter):
            pretend(there)
        return there

    monkeypatch.setattr(isolation, "_copy", copied)


@pytest.mark.parametrize("k", [None, 3], ids=["all", "lanczos"])
@pytest.mark.parametrize("full", [False, True], ids=["gauss-newton", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_is_as_on_the_cpu(
    pretend_cuda: list[str],
    copies_stay: None,
    name: str,
    full: bool,
    k: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if k is not None:
        monkeypatch.setattr(hessian, "DENSE_WORK", 0.0)
    for block, z in list(blocks_of(CATALOGUE[name]))[-2:]:
        r = displacement_for(block, z) if full else None
        for side in ("input", "weight"):
            if not has_side(block, z, side):
                continue
            want = numbers(block, z, side, r, k)
            pretend_modules([block])
            there = [t.clone() for t in (z, r) if t is not None]
            pretend(*there)
            with PretendCuda():
                got = numbers(block, there[0], side, there[1] if full else None, k)
                assert all(pretends(each) for each in got[:3])
                got = [each.cpu() for each in got]
            for each in (*block.parameters(), *block.buffers()):
                each.__dict__.clear()
            for left, right in zip(got, want, strict=True):
                torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9, equal_nan=True)
