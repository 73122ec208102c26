"""What is computed again at once, because larger values wait for it."""

from collections import Counter

import pytest
import torch
from torch import nn

import gtrans
import gtrans.plan.rebuild
from gtrans.analysis.cost import device_named
from gtrans.analysis.liveness import simulate
from gtrans.analysis.schedule import Schedule, schedule_of
from gtrans.ir.joint import JointGraph, tag
from gtrans.plan.front import Front
from tests.passes.coupled import Attention, Branch, NormConv, Perceptron, Streams

CPU = device_named("cpu")


def planned(model: nn.Module, x: torch.Tensor, passes: str) -> JointGraph:
    torch.compiler.reset()
    (captured,) = gtrans.explain(model, x, passes=passes).captured
    assert captured.rewritten is not None
    return captured.rewritten


def require_valid(schedule: Schedule) -> None:
    """Every task reads what ran before it, in its own half if it cannot read the other."""
    for number, task in enumerate(schedule.tasks):
        assert all(read < number for read in task.reads)
        assert not (task.again and number < schedule.boundary)


@pytest.mark.parametrize(
    ("branch", "shape", "dim"),
    [(Perceptron, (64, 16), -1), (Attention, (4, 8, 16), -1), (NormConv, (4, 16, 8, 8), 1)],
)
def test_less_waits_than_right_before_the_first_reader(
    branch: Branch, shape: tuple[int, ...], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Streams(8, 4, branch, dim=dim), torch.randn(shape)
    at_once = schedule_of(planned(model, x, "reversible,plan"))
    monkeypatch.setattr(gtrans.plan.rebuild, "prompt", lambda schedule: schedule)
    late = schedule_of(planned(model, x, "reversible,plan"))
    for schedule in (at_once, late):
        require_valid(schedule)
    targets = [Counter(t.node.target for t in s.tasks) for s in (at_once, late)]
    assert targets[0] == targets[1]
    found, before = simulate(at_once), simulate(late)
    assert found.peak <= before.peak
    assert sum(found.timeline) < sum(before.timeline)


def test_a_stream_is_there_before_its_branch_is_differentiated() -> None:
    joint = planned(Streams(8, 3, Perceptron), torch.randn(16, 16), "reversible,plan")
    place = {n: i for i, n in enumerate(joint.nodes)}
    activations = sorted(place[n] for n in joint.calls(torch.ops.aten.gelu_backward.default))
    forward = max(place[n] for n in joint.forward_outputs)
    rebuilt = sorted(
        place[n]
        for n in joint.nodes
        if n.op != "output" and tag(n).recovers is not None and place[n] > forward
    )
    assert len(activations) == 6
    # Nothing reads the streams that the network starts with but what comes before them.
    assert len(rebuilt) >= 5
    assert all(stream < gradient for stream, gradient in zip(rebuilt, activations, strict=False))


def test_every_plan_of_a_front_stays_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front(planned(Streams(8, 2, Perceptron), torch.randn(64, 16), "reversible"), CPU)
    moved = 0
    for candidate in front.candidates:
        schedule = front.schedule(candidate)
        require_valid(schedule)
        with monkeypatch.context() as patch:
            patch.setattr(gtrans.plan.rebuild, "prompt", lambda schedule: schedule)
            late = front.schedule(candidate)
        assert Counter(t.node for t in schedule.tasks) == Counter(t.node for t in late.tasks)
        # While a value is made where it moved to, it is there beside what it lets go of.
        assert sum(simulate(schedule).timeline) <= 1.001 * sum(simulate(late).timeline)
        moved += schedule.tasks != late.tasks
    assert moved > 0
