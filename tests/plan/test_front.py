"""Schedules, segments and the front of plans, on graphs small enough to try everything."""

from collections.abc import Callable
from itertools import chain, combinations, pairwise
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.analysis.cost import device_named
from gtrans.analysis.liveness import simulate
from gtrans.analysis.schedule import schedule_of
from gtrans.errors import PlanError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.plan.cut import minimum_cut, read_directly
from gtrans.plan.front import Front
from gtrans.plan.realise import realise, write
from gtrans.plan.rebuild import Choice, Rebuilder
from gtrans.plan.waists import Waists

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]
CPU = device_named("cpu")


def _joint(built: tuple[nn.Module, tuple[Any, ...]]) -> JointGraph:
    model, inputs = built
    original = gtrans.explain(model, *inputs, passes="none").captured[0].original
    assert original is not None
    return original.copy()


def test_no_plan_beats_the_front_by_much(build: Build) -> None:
    joint = _joint(build("mlp"))
    front = Front(joint, CPU)
    values = [
        n
        for n in joint.nodes
        if joint.is_forward(n) and n.op == "call_function" and not ops.is_view(n)
    ]
    inputs = frozenset((*joint.primals,))
    everything = []
    for kept in chain.from_iterable(combinations(values, k) for k in range(len(values) + 1)):
        schedule = front.rebuilder.schedule(Choice(inputs | frozenset(kept)))
        if schedule is not None:
            everything.append((front.simulate(schedule).peak, front.seconds(schedule)))
    plain = front.candidates[0].peak
    smallest = min(peak for peak, _ in everything)
    for share in (0.95, 0.85, 0.75, 0.65):
        limit = max(share * plain, 1.02 * smallest)
        optimum = min(seconds for peak, seconds in everything if peak <= limit)
        found = min(c.seconds for c in front.best() if c.peak <= limit)
        assert found <= 1.1 * optimum


def test_front_is_sorted_and_what_is_written_is_what_was_simulated(build: Build) -> None:
    joint = _joint(build("gpt"))
    front = Front(joint, CPU)
    best = front.best()
    assert len(best) > 5
    for faster, smaller in pairwise(best):
        assert faster.seconds < smaller.seconds
        assert faster.peak > smaller.peak
    for candidate in (best[0], best[len(best) // 2], best[-1]):
        twin = joint.copy()
        same = dict(zip(joint.nodes, twin.nodes, strict=True))
        hold = candidate.choice.hold
        choice = Choice(
            frozenset(same[n] for n in candidate.choice.save),
            None if hold is None else frozenset(same[n] for n in hold),
            candidate.choice.window,
        )
        schedule = Rebuilder(twin).schedule(choice)
        assert schedule is not None
        assert write(twin, schedule) == len(schedule.again)
        assert simulate(schedule_of(twin)).peak == candidate.peak


class Stream(nn.Module):
    """A residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 16]. Returns: a scalar."""
        for layer in self.layers:
            x = x + torch.sin(layer(x))
        return x.sum()


def test_recomputing_per_reader_lowers_the_peak() -> None:
    """The stream is the sum of its branches: all of it is computed again for the last layer.

    If the earlier parts of it then wait for the layers that read them, all are in memory at once.
    """
    joint = _joint((Stream(), (torch.randn(256, 16),)))
    rebuilder = Rebuilder(joint)
    branches = frozenset(joint.calls(torch.ops.aten.addmm.default))
    waiting = rebuilder.schedule(Choice(branches))
    fresh = rebuilder.schedule(Choice(branches, frozenset(), 2))
    assert waiting is not None
    assert fresh is not None
    assert len(fresh.again) > len(waiting.again)
    assert simulate(fresh).peak < 0.8 * simulate(waiting).peak


def test_late_recomputation_against_early(build: Build) -> None:
    """Right before its reader, against in front of the backward as torch's own split has it."""
    joint = _joint(build("gpt"))
    cut = minimum_cut(joint, lambda n: None if "add" in n.name else 1.0)
    late = joint.copy()
    realise(late, [dict(zip(joint.nodes, late.nodes, strict=True))[n] for n in cut])
    assert late.cut is not None
    early = late.copy()
    first = next(n for n in early.nodes if early.is_backward(n) and n.op == "call_function")
    for node in early.nodes:
        if node > first and early.is_forward(node) and node.op == "call_function":
            first.prepend(node)
    assert simulate(schedule_of(late)).peak < 0.75 * simulate(schedule_of(early)).peak


def test_segments_of_a_transformer_end_at_its_residual_stream(build: Build) -> None:
    joint = _joint(build("gpt"))
    waists = Waists(joint, read_directly(joint))
    boundaries = waists.boundaries(3)
    assert len(boundaries) == 2
    for position in boundaries:
        (crossing,) = waists.values_at(position)
        assert tuple(crossing.meta["val"].shape) == (4, 32, 16)
    assert waists.boundaries(1) == ()
    assert Waists(joint, []).boundaries(4) == ()


def test_a_cut_that_does_not_suffice_is_refused(build: Build) -> None:
    joint = _joint(build("gpt"))
    with pytest.raises(PlanError, match="cannot be computed again, and the plan does not keep it"):
        realise(joint, list(joint.primals))
