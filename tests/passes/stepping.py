"""One step of a model and of its rewritten twin, for tests of passes over loops."""

import copy

import torch
from torch import nn

import gtrans

Gradients = dict[str, torch.Tensor]


def step_of(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """Outputs and gradients, those of the input included."""
    x = x.clone().requires_grad_()
    out = model(x)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    (out.sin() * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return out.detach(), {**found, "x": x.grad}


def step_of_rewritten(
    model: nn.Module, x: torch.Tensor, passes: str
) -> tuple[torch.Tensor, Gradients]:
    """The same of a copy of the model behind some passes."""
    torch.compiler.reset()
    twin = copy.deepcopy(model)
    return step_of(gtrans.optimize(twin, passes=passes, backend="eager", on_error="raise"), x)
