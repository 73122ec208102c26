"""How many bytes an optimizer keeps between steps, asked of the optimizer itself.

    bytes = what it keeps already + what its step makes of parameters that it keeps nothing for yet

State is made in the first step, when the peak has long been planned. So a copy of the optimizer
takes that step beforehand, on parameters without any memory behind them (the device "meta").
"""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from gtrans.errors import OptionError


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state once it has taken a step; the optimizer stays as it is.

    Raises:
        OptionError: its step cannot be taken on parameters without memory.
    """
    kept = sum(map(_tensor_bytes, pytree.tree_leaves(list(optimizer.state.values()))))
    fresh = _on_meta(optimizer)
    if any(group["params"] for group in fresh.param_groups):
        try:
            fresh.step()
        except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
            raise OptionError(
                f"how much memory {type(optimizer).__name__} keeps cannot be told before its first "
                f"step ({type(error).__name__}: {error}); take that step first, or say it in "
                "bytes: passes='default,plan{reserve=1GiB}'"
            ) from error
    return kept + sum(map(_tensor_bytes, pytree.tree_leaves(list(fresh.state.values()))))


def _on_meta(optimizer: Optimizer) -> Optimizer:
    """A copy that updates parameters without memory, one for each that has no state yet."""
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k != "params"}
        # Neither a captured graph nor a fused kernel can run without memory; the state is the same.
        settings.update({k: False for k in ("capturable", "fused") if settings.get(k)})
        new = [p for p in group["params"] if p.requires_grad and p not in optimizer.state]
        twin.param_groups.append({**copy.deepcopy(settings), "params": [*map(_parameter, new)]})
    return twin


def _parameter(like: torch.Tensor) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.empty_like(like, device="meta"))
    made.grad = torch.empty_like(made)
    return made


def _tensor_bytes(leaf: Any) -> int:
    return leaf.nbytes if isinstance(leaf, torch.Tensor) else 0
