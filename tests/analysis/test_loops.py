"""Loops that capture unrolled: what is found again, and what is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gtrans.analysis.loops import Loop, find_loops
from tests.ir.graphs import forward_of


def loops_of(function: Callable[..., Any], *args: Any) -> list[Loop]:
    return find_loops(forward_of(function, *args))


@pytest.mark.parametrize("steps", [3, 4, 7])
def test_a_loop_over_a_cell_is_found_from_its_first_step(steps: int) -> None:
    cell, head, x = nn.GRUCell(3, 4), nn.Linear(4, 2), torch.randn(steps, 2, 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        h, outputs = x.new_zeros(2, 4), []
        for step in x:
            h = cell(step, h)
            outputs.append(head(h))
        return torch.stack(outputs)

    found = loops_of(model, x)
    assert len(found) == (steps >= 4)
    for loop in found:
        assert len(loop) == steps
        assert loop.tied
        assert [len(body) for body in loop.steps] == [1] * steps
        assert loop.starts[0].target == "new_zeros"


def test_two_layers_in_one_loop_are_two_loops_and_a_sum_is_told_apart() -> None:
    first, second, x = nn.LSTMCell(3, 4), nn.LSTMCell(4, 4), torch.randn(6, 2, 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        a = b = c = d = x.new_zeros(2, 4)
        total = x.new_zeros(2, 4)
        for step in x:
            a, b = first(step, (a, b))
            c, d = second(a, (c, d))
            total = total + c
        return total

    found = loops_of(model, x)
    assert sorted((len(loop.carried), loop.is_running_sum()) for loop in found) == [
        (1, True), (2, False), (2, False),
    ]  # fmt: skip


def test_an_integrator_that_each_step_reads_is_no_running_sum() -> None:
    layer, x = nn.Linear(3, 4), torch.randn(6, 2, 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        h, outputs = x.new_zeros(2, 4), []
        for step in x:
            h = h + layer(step)
            outputs.append(h.tanh())
        return torch.stack(outputs)

    (loop,) = loops_of(model, x)
    assert not loop.is_running_sum()


def test_blocks_with_weights_of_their_own_are_a_loop_that_is_not_tied() -> None:
    blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(5)])

    def model(x: torch.Tensor, tied: bool) -> torch.Tensor:
        for block in blocks:
            x = x + (blocks[0] if tied else block)(x)
        return x

    x = torch.randn(2, 4)
    assert [(len(loop), loop.tied) for loop in loops_of(model, x, False)] == [(5, False)]
    assert [(len(loop), loop.tied) for loop in loops_of(model, x, True)] == [(5, True)]


def test_a_step_without_a_bias_is_unlike_one_with_a_bias() -> None:
    with_bias, without = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def model(x: torch.Tensor) -> torch.Tensor:
        for i in range(10):
            x = torch.tanh(without(x) if i == 5 else with_bias(x))
        return x

    assert sorted(len(loop) for loop in loops_of(model, torch.randn(2, 4))) == [4, 5]


def test_what_every_other_step_does_makes_a_loop_of_pairs() -> None:
    a, b, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)

    def model(h: torch.Tensor) -> torch.Tensor:
        for t in range(10):
            h = a(h).tanh() if t % 2 else b(h).relu()
        return h

    (loop,) = loops_of(model, x)
    assert (len(loop), len(loop.steps[0]), loop.tied) == (5, 4, True)


def test_a_state_that_is_detached_hands_no_gradient_over() -> None:
    layer = nn.Linear(4, 4)

    def model(h: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            h = layer(h.detach()).tanh()
        return h

    assert loops_of(model, torch.randn(2, 4)) == []


def test_a_state_that_grows_or_is_read_two_steps_later_is_no_loop() -> None:
    layer = nn.Linear(4, 4)

    def growing(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = torch.cat([x, layer(x[:1])])
        return x

    def fibonacci(x: torch.Tensor) -> torch.Tensor:
        before, now = x, layer(x)
        for _ in range(6):
            before, now = now, layer(now) + before
        return now

    assert loops_of(growing, torch.randn(2, 4)) == []
    assert loops_of(fibonacci, torch.randn(2, 4)) == []


def test_a_last_step_of_which_nobody_reads_all_is_unfinished() -> None:
    cell, head, x = nn.LSTMCell(3, 4), nn.Linear(4, 4), torch.randn(6, 2, 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(2, 4)
        for step in x:
            h, c = cell(step, (h, c))
        return head(h)

    (loop,) = loops_of(model, x)
    assert (len(loop), loop.length) == (5, 6)
    (reader,) = loop.unfinished
    assert reader.target is loop.steps[0][0].target
