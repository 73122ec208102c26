"""Under Inductor, what a plan computes again stays right before its reader."""

import copy

import pytest
import torch
from torch import nn

import gtrans
from gtrans.analysis.measure import measured_peak
from gtrans.backends.inductor import Inductor


class Block(nn.Module):
    """A gated feed-forward network with a norm, all of whose inner values can be had again."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y: torch.Tensor = x + self.down(torch.sigmoid(self.gate(h)) * self.up(h))
        return y


class Blocks(nn.Module):
    """Blocks and a loss, so that the plan knows the whole step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32, 96) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.inductor
@pytest.mark.skipif(Inductor().unavailable() is not None, reason="no C++ compiler")
def test_the_order_of_the_plan_survives_lowering() -> None:
    torch.manual_seed(0)
    plain = Blocks()
    x = torch.randn(1024, 32)
    peaks = {}
    budget = None
    for reuse in (False, True):
        model = copy.deepcopy(plain)
        options = {"allow_buffer_reuse": True, "reorder_for_peak_memory": True} if reuse else None
        gtrans.optimize(model, memory=0.5, backend="inductor", options=options, on_error="raise")

        def step(model: nn.Module = model) -> None:
            model(x).backward()
            model.zero_grad(set_to_none=True)

        peaks[reuse] = measured_peak(step).bytes
        budget = gtrans.report(model).budget
    resident = x.nbytes + sum(p.nbytes for p in plain.parameters())
    assert budget is not None
    assert peaks[False] + resident <= budget
    assert peaks[False] < peaks[True]
