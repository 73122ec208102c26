"""The simulated peak, against the reference allocator and against the profiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.analysis.allocator import replayed_peak, zeros_like
from gtrans.analysis.liveness import simulate
from gtrans.analysis.measure import measured_peak
from gtrans.analysis.schedule import schedule_of
from gtrans.analysis.workspace import workspaces
from gtrans.capture import split
from gtrans.errors import PlanError
from gtrans.ir.joint import JointGraph

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]
PIPELINES = ("plan{recompute=none}", "default", "plan{memory=0.9}")


def _replayed(joint: JointGraph) -> int:
    forward, backward = split(joint)
    inputs = [zeros_like(n.meta["val"]) for n in forward.graph.find_nodes(op="placeholder")]
    return replayed_peak(forward, backward, inputs, joint.signature.num_forward_outputs)


def _joint(model: nn.Module, inputs: tuple[Any, ...], passes: str) -> JointGraph:
    rewritten = gtrans.explain(model, *inputs, passes=passes).captured[0].rewritten
    assert rewritten is not None
    return rewritten


@pytest.mark.parametrize("passes", PIPELINES)
@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_agrees_with_the_reference_allocator(build: Build, name: str, passes: str) -> None:
    model, inputs = build(name)
    joint = _joint(model, inputs, passes)
    assert simulate(schedule_of(joint), extra={}).peak == _replayed(joint)


@pytest.mark.parametrize("passes", PIPELINES)
@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_agrees_with_the_profiler(build: Build, name: str, passes: str) -> None:
    model, inputs = build(name)
    gtrans.optimize(model, passes=passes, backend="eager")

    def step() -> None:
        model(*inputs).backward()
        model.zero_grad(set_to_none=True)

    measured = measured_peak(step).bytes
    (liveness,) = gtrans.report(model).liveness
    assert liveness.peak - liveness.constant_bytes == pytest.approx(measured, rel=0.05)


class Aliases(nn.Module):
    """Views of views, parts of tuples that nobody reads, an operator that returns views."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = (x @ self.weight).view(-1, 4, 6).transpose(0, 1)
        first, second = wide.split(2)
        best, _ = first.exp().max(-1)
        parts = second.sin().unbind(0)
        total: torch.Tensor = best.sum() * parts[0].cos().sum()
        return total + wide.expand(2, 4, -1, 6).tanh().sum()


@pytest.mark.parametrize("passes", PIPELINES[:2])
def test_views_and_tuples_share_storage(passes: str) -> None:
    joint = _joint(Aliases(), (torch.randn(32, 24),), passes)
    assert simulate(schedule_of(joint), extra={}).peak == _replayed(joint)


def test_a_backward_of_dropout_needs_room_for_its_scaled_mask() -> None:
    """On a CPU; it was at the peak of small budgets, which were exceeded by it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))
    joint = _joint(model, (torch.randn(128, 64),), "plan")
    (dropout,) = joint.calls(torch.ops.aten.native_dropout_backward.default)
    assert 0 <= workspaces(joint.nodes)[dropout] - 128 * 64 * 4 < 64  # and some numbers


def test_in_place_operators_allocate_nothing() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.seen: torch.Tensor
            self.register_buffer("seen", torch.zeros(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x)
            with torch.no_grad():
                self.seen.add_(y.mean(0))
            return y.relu_().square().sum()

    joint = _joint(Buffered(), (torch.randn(32, 64),), "plan")
    assert simulate(schedule_of(joint), extra={}).peak == _replayed(joint)


def test_what_is_alive_adds_up_to_the_peak(build: Build) -> None:
    model, inputs = build("gpt")
    liveness = simulate(schedule_of(_joint(model, inputs, "default")), extra={})
    assert sum(a.bytes for a in liveness.alive()) == liveness.peak
    constants = [a.bytes for a in liveness.alive() if a.role == "constant"]
    expected = sum(p.nbytes for p in model.parameters()) + inputs[0].nbytes
    assert sum(constants) == liveness.constant_bytes == expected


def test_gradients_stay_to_the_end(build: Build) -> None:
    model, inputs = build("mlp")
    liveness = simulate(schedule_of(_joint(model, inputs, "default")), extra={})
    last = len(liveness.timeline) - 1
    gradients = [a for a in liveness.alive(last) if a.role == "gradient"]
    assert sum(a.bytes for a in gradients) == sum(p.nbytes for p in model.parameters())


def test_symbolic_sizes_count_as_traced() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    gtrans.optimize(model, backend="eager", dynamic=True)
    model(torch.randn(40, 16)).sum().backward()
    dynamic = gtrans.report(model).liveness[0]
    assert any("s" in str(n.meta["val"].shape) for n in _tensors(dynamic))
    torch._dynamo.reset()
    gtrans.optimize(model, backend="eager", dynamic=False)
    model(torch.randn(40, 16)).sum().backward()
    assert dynamic.peak == gtrans.report(model).liveness[0].peak


def _tensors(liveness: Any) -> list[Any]:
    nodes = [t.node for t in liveness.schedule.tasks]
    return [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def test_refuses_a_graph_without_a_plan(build: Build) -> None:
    model, inputs = build("mlp")
    joint = _joint(model, inputs, "default")
    joint.cut = None
    with pytest.raises(PlanError, match="has no plan yet; run the 'plan' pass"):
        schedule_of(joint)
