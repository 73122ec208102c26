"""What one step of a Python loop holds: several loops, and what is between and around them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gtrans.analysis.stages import Stage, find_stages
from tests.ir.graphs import forward_of


def stages_of(function: Callable[..., Any], *args: Any) -> list[Stage]:
    return find_stages(forward_of(function, *args))


first, second, head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)


def leak(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(0.5 * v + x)


def test_layers_of_a_step_are_one_stage_and_a_sum_stays_outside() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        a = b = x.new_zeros(2, 4)
        total = x.new_zeros(2, 2)
        for step in x:
            a = leak(a, first(step))
            b = leak(b, second(a))
            total = total + head(b)
        return total

    (stage,) = stages_of(model, torch.randn(6, 2, 3))
    assert len(stage.parts) == 2
    assert (len(stage.whole), len(stage.whole.carried)) == (6, 2)
    called = [getattr(n.target, "__name__", n.target) for n in stage.whole.steps[0]]
    assert called.count("linear") == 3
    assert called.count("relu") == 2
    assert all(len(set(c)) > 1 or c[0].op == "placeholder" for c in stage.whole.inputs)


def test_a_state_that_the_first_step_makes_is_told() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        a = None
        for step in x:
            drive = first(step)
            a = leak(torch.zeros_like(drive) if a is None else a, drive)
        assert a is not None
        return head(a)

    (stage,) = stages_of(model, torch.randn(6, 2, 3))
    assert (len(stage.whole), stage.ahead, stage.length) == (5, 1, 6)


def test_what_remembers_without_a_gradient_stays_outside() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, trace = x.new_zeros(2, 4), x.new_zeros(2, 4)
        for step in x:
            a = leak(a, first(step))
            trace = 0.9 * trace + a.detach()
        return head(a), trace

    (stage,) = stages_of(model, torch.randn(6, 2, 3))
    assert len(stage.whole.carried) == 1
    assert len(stage.whole) == 6


def test_layer_by_layer_there_is_a_stage_for_each() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        for layer in (first, second):
            drive, a, states = layer(x), x.new_zeros(2, 4), []
            for u in drive.unbind(0):
                a = leak(a, u)
                states.append(a)
            x = torch.stack(states)
        return head(x)

    found = stages_of(model, torch.randn(6, 2, 3))
    assert [len(stage.whole) for stage in found] == [6, 6]
