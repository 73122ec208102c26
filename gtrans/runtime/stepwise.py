"""Training a spiking or other recurrent network step by step, without a carried gradient.

    for t = 1 .. T:  state = step(x[t], state.detach());  loss(state, t).backward()

Each step's backward follows its forward at once, so the memory does not grow with T, and the carry
of the state gets no gradient: spatial learning through time. Of T steps, only some may run a
backward.

Exact where the carry has no gradient anyway (a leak of zero, or one step); otherwise a direction.
The loss must be a sum over steps.

Source: Meng et al., ICCV 2023, arXiv:2302.14311 (SLTT and SLTT-K). The paper divides by T also
where K steps run; here their gradients are scaled by T / K, so that they are those of a random
choice of steps without bias. `rescale=False` is the paper's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gtrans.errors import OptionError


def train_stepwise(
    step: Callable[[Any, Any], tuple[torch.Tensor, Any]],
    inputs: Sequence[Any],
    state: Any,
    loss: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    steps: int | None = None,
    rescale: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, Any]:
    """Runs all steps and adds their gradients to the parameters.

    Args:
        step: (input, state) to (output, state); the state is a tensor or a tree of tensors.
        inputs: one for each of T steps.
        state: the first state.
        loss: of an output and the number of its step; the sum over steps is what is trained.
        steps: how many of the steps, drawn anew in every call, run a backward; all by default.
        rescale: scale their gradients by T / steps.
        generator: for the draw.

    Returns:
        The summed loss of all steps, detached, and the last state.

    Raises:
        OptionError: `steps` is not between 1 and T.
    """
    count = len(inputs)
    if steps is not None and not 1 <= steps <= count:
        raise OptionError(f"steps must be between 1 and {count}, got {steps}")
    chosen = torch.randperm(count, generator=generator)[:steps].tolist()
    scale = count / len(chosen) if rescale and chosen else 1.0
    total = torch.zeros(())
    for t, x in enumerate(inputs):
        with torch.set_grad_enabled(t in chosen):
            output, state = step(x, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state))
            found = loss(output, t)
        if t in chosen:
            (found * scale).backward()
        total = total + found.detach()
    return total, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state)
