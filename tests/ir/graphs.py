"""Small joint graphs for tests, captured from real modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

import gtrans.testing as kit
from gtrans.ir.forward import ForwardGraph
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


def forward_of(function: Callable[..., Any], *args: Any) -> ForwardGraph:
    """The graph that Dynamo makes of a function."""
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        graphs.append(module)
        return module

    torch.compiler.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*args)
    return ForwardGraph(graphs[0])


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
