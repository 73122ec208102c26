"""What the forward overwrites is never read by a computation that runs again after it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gtrans


class Buffer(nn.Module):
    """A sum of a parameter and a buffer, cheap to compute again; then the buffer may change."""

    def __init__(self, overwrites: bool = True) -> None:
        super().__init__()
        self.overwrites = overwrites
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.register_buffer("scale", torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 64]. Returns: a scalar."""
        assert isinstance(self.scale, torch.Tensor)
        y = x @ F.gelu(self.weight + self.scale).T
        if self.overwrites:
            self.scale.mul_(-0.5)
        return torch.sin(y).sum()


class Argument(nn.Module):
    """The same with an argument in place of the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 64]; state: [64, 64], overwritten. Returns: a scalar."""
        y = x @ F.gelu(self.weight + state).T
        state.mul_(-0.5)
        return torch.sin(y).sum()


class Normed(nn.Module):
    """Batch norms whose statistics are updated by the forward and read nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.GELU()) for _ in range(3))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 16]. Returns: a scalar."""
        y: torch.Tensor = self.layers(x)
        return y.square().sum()


Case = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
CASES: dict[str, Case] = {
    "buffer": lambda: (Buffer(), (torch.randn(32, 64),)),
    "argument": lambda: (Argument(), (torch.randn(32, 64), torch.randn(64, 64))),
    "statistics": lambda: (Normed(), (torch.randn(64, 16),)),
}


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *((name, "plan{price=1e-6}") for name in CASES),
        ("statistics", "plan{memory=0.95}"),
    ],
)
def test_recomputation_reads_what_the_forward_read(name: str, passes: str) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    before = [b.clone() for b in model.buffers()]
    expected = _gradients(model, inputs)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.data.copy_(value)
    gtrans.optimize(model, passes=passes, backend="eager", on_error="raise")
    for gradient, found in zip(expected, _gradients(model, inputs), strict=True):
        assert torch.equal(gradient, found)


@pytest.mark.parametrize("overwrites", [False, True])
def test_the_sum_runs_again_only_if_what_it_reads_is_left_alone(overwrites: bool) -> None:
    explained = gtrans.explain(Buffer(overwrites), torch.randn(32, 64), passes="plan{price=1e-6}")
    (record,) = explained.training
    assert record.rewritten is not None
    sums = record.rewritten.calls(torch.ops.aten.add.Tensor)
    assert len(sums) == (1 if overwrites else 2)


def _gradients(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    model(*(x.clone() for x in inputs)).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found
