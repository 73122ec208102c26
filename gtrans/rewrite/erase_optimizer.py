"""Cuts an optimizer's state by the masks that cut its parameters, so that training goes on.

State with the shape of its parameter (momentum, Adam moments, master weights) is cut alike; state
of another shape (step counts) is kept.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gtrans.errors import ModelError
from gtrans.rewrite.erase_graph import cut


def cut_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    erased: nn.Module,
    masks: Mapping[str, list[torch.Tensor]],
) -> torch.optim.Optimizer:
    """A new optimizer of the same class over the parameters of an erased model.

    Args:
        optimizer: the old one; it stays as it is.
        parameters: the old model's parameters by path.
        erased: the erased model.
        masks: which indices of each parameter stay.

    Raises:
        ModelError: a parameter of the optimizer belongs to another model, or the erased model's
            shapes are not those of the masks.
    """
    paths = {p: name for name, p in parameters.items()}
    new = dict(erased.named_parameters(remove_duplicate=False))
    groups: list[dict[str, Any]] = []
    pairs: list[tuple[nn.Parameter, nn.Parameter, list[torch.Tensor]]] = []
    for group in optimizer.param_groups:
        made: list[nn.Parameter] = []
        for old in group["params"]:
            name = paths.get(old)
            if name is None:
                raise ModelError("the optimizer holds a parameter that is not of this plan's model")
            if name not in new:
                continue  # never used in the forward: a graph does not have it
            shape = tuple(int(keep.sum()) for keep in masks[name])
            if tuple(new[name].shape) != shape:
                raise ModelError(
                    f"the erased model has {tuple(new[name].shape)} for {name!r}, the selection "
                    f"leaves {shape}; pass the selection that the model was erased with"
                )
            made.append(new[name])
            pairs.append((old, new[name], masks[name]))
        groups.append({**group, "params": made})
    # Some optimizers keep more among their defaults than their constructor takes.
    known = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in known}
    twin = type(optimizer)(groups, **options)
    for old, parameter, keep in pairs:
        if old in optimizer.state:
            twin.state[parameter] = {
                key: _cut_state(value, old, keep) for key, value in optimizer.state[old].items()
            }
    return twin


def _cut_state(value: Any, parameter: nn.Parameter, keep: list[torch.Tensor]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == parameter.shape and value.ndim:
        return cut(value, keep)
    return value.clone()
