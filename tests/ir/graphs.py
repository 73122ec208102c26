"""Small joint graphs for tests, captured from real modules."""

from collections.abc import Callable

import torch
from torch import nn

import gtrans.testing as kit
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Pipeline


class Written(nn.Module):
    """Two products with a function between them.

    Args:
        function: what stands between them.
        width: of everything.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, width, bias=False)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.function(self.first(x)))
        return y


def joint_of(model: nn.Module, *inputs: torch.Tensor) -> JointGraph:
    """The joint graph of a model in normal form, before any pass."""
    runner = kit.Runner(model, inputs, Pipeline())
    runner.step()
    (captured,) = runner.captured
    assert captured.original is not None
    return captured.original


def joint_with(function: Callable[[torch.Tensor], torch.Tensor]) -> JointGraph:
    """The joint graph of `Written(function)` on a [2, 4] input."""
    return joint_of(Written(function), torch.randn(2, 4))
