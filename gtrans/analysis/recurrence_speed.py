"""How long the backward of a recurrence takes on this machine, by each rule: measured.

Whether sweeps over all steps beat a loop of steps depends on the machine, and on batch and width
more than on anything that could be counted: a step of a small cell is all waiting, one of a large
cell all work. So a size is tried, once a process, on random numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from gtrans.analysis.measure import interleaved_seconds
from gtrans.runtime.cells import CELLS
from gtrans.runtime.fused_lstm import fused_lstm_backward, fused_lstm_layer
from gtrans.runtime.recurrence import Recurrence, recurrence_backward
from gtrans.runtime.watch import unwatched

_ELEMENTS, _LEAST_STEPS, _ROUNDS = 1 << 19, 32, 3

Rule = tuple[str, int]
"""A rule of `gtrans.runtime.recurrence.cotangents` and its count; or "autograd", "fused", and 0."""


@dataclass(frozen=True)
class RecurrenceSize:
    """One layer in one direction.

    Attributes:
        kind: a name of `CELLS`.
        steps: T.
        batch: B.
        width: d.
        dtype: of states and weights.
        device: where they are.
    """

    kind: str
    steps: int
    batch: int
    width: int
    dtype: torch.dtype
    device: str


@cache
def backward_seconds(size: RecurrenceSize, rules: tuple[Rule, ...]) -> tuple[float, ...]:
    """The least seconds of the backward by some rules, tried in turns.

    Where states have many elements, fewer steps are tried and the time is taken as proportional:
    a step of such a size costs what its elements cost.

    Args:
        size: of the layer.
        rules: which; "autograd" unrolls the steps as torch does where it compiles a layer, and
            "fused" is oneDNN's LSTM.
    """
    fit = max(_LEAST_STEPS, _ELEMENTS // max(1, size.batch * size.width))
    tried = replace(size, steps=min(size.steps, fit))
    with unwatched():
        runs = {rule: _backward(tried, rule) for rule in rules}
        found = interleaved_seconds(
            {f"{name} {count}": run for (name, count), run in runs.items()},
            rounds=_ROUNDS,
            device=size.device,
        )
    scale = size.steps / tried.steps
    return tuple(scale * min(found[f"{name} {count}"]) for name, count in rules)


def _backward(size: RecurrenceSize, rule: Rule) -> Callable[[], object]:
    """A backward to run; its forward has run."""
    cell, (name, count) = CELLS[size.kind], rule
    chance = torch.Generator(size.device).manual_seed(0)  # the user's own stays where it is
    like, rows = torch.empty(0, dtype=size.dtype, device=size.device), cell.gates * size.width
    x = like.new_empty(size.steps, size.batch, rows).normal_(generator=chance)
    start = like.new_zeros(size.batch, cell.states * size.width)
    weight = like.new_empty(rows, size.width).normal_(generator=chance) / size.width
    bias = like.new_zeros(rows)
    wanted = [x, start, weight, bias]
    if name == "fused":
        return _fused_backward(x[..., : size.width], weight, bias)
    if name == "autograd":
        with torch.enable_grad():
            leaves = [t.requires_grad_() for t in wanted]
            states = Recurrence(size.kind, *leaves).loop()
        drive = torch.ones_like(states)
        return partial(torch.autograd.grad, states, leaves, drive, retain_graph=True)
    with torch.no_grad():
        states = Recurrence(size.kind, x, start, weight, bias).loop()
    drive = torch.ones_like(states)
    return partial(recurrence_backward, drive, states, *wanted, size.kind, name, count)


def _fused_backward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> Callable[[], object]:
    """The backward of oneDNN's LSTM; inputs are as wide as states."""
    state = x.new_zeros(x.shape[1:])
    tensors = x.contiguous(), weight, weight, bias, bias, state, state
    with torch.no_grad():
        output, h, c, workspace = fused_lstm_layer(*tensors, False, True, True)
    args = torch.ones_like(output), h, c, *tensors, output, h, c, workspace, False
    return partial(fused_lstm_backward, *args)
