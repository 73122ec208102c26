"""Small models that the tests of debugging share."""

from typing import Any

import torch
from torch import nn

from gtrans.debugging.case import Case
from gtrans.debugging.recording import Recording
from gtrans.pipeline import Pipeline


class Layers(nn.Module):
    """Residual layers with a GELU each, and optionally dropout."""

    def __init__(self, depth: int = 3, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.drop(nn.functional.gelu(layer(x)))
        y: torch.Tensor = self.norm(x)
        return y


def layers(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    """The model and its input, always the same."""
    torch.manual_seed(0)
    return Layers(**options), torch.randn(6, 8)


def joint_case(passes: str, **options: Any) -> Case:
    """The joint graph of the model with the values of a step in float64, and a pipeline."""
    model, x = layers(**options)
    [case] = Recording(model, (x,), {}, dtype=torch.float64).joints
    return Case(case.graph, case.values, Pipeline.parse(passes), terms=case.terms)
