"""The minimum cut, against every subset of small graphs."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from gtrans.errors import PlanError
from gtrans.ir.joint import Input, JointGraph, Signature
from gtrans.ir.ops import storage_of
from gtrans.plan.cut import minimum_cut, read_directly
from gtrans.plan.saved import saved_bytes, saved_values
from tests.ir.graphs import Written, joint_of, joint_with

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """A value of a random graph: its size, what it is computed from, and at which price."""

    size: int
    inputs: tuple[int, ...]
    price: int | None
    read: bool


@st.composite
def graphs(draw: st.DrawFn) -> list[Value]:
    values: list[Value] = []
    for i in range(draw(st.integers(1, 7))):
        inputs = draw(st.lists(st.integers(0, i - 1), max_size=2, unique=True)) if i else []
        values.append(
            Value(
                draw(st.integers(1, 40)),
                tuple(inputs),
                draw(st.none() | st.integers(1, 120)) if inputs else None,
                draw(st.booleans()),
            )
        )
    return values


def built(values: list[Value]) -> tuple[JointGraph, list[fx.Node]]:
    """A joint graph of additions; values without inputs are inputs of the model."""
    graph = fx.Graph()
    count = sum(not v.inputs for v in values)
    placeholders = [graph.placeholder(f"primals_{i}") for i in range(count)]
    tangent = graph.placeholder("tangents_1")
    tangent.meta["val"] = torch.empty(1, device="meta")
    free = iter(placeholders)
    nodes: list[fx.Node] = []
    for v in values:
        arguments = [nodes[i] for i in v.inputs]
        made = (
            graph.call_function(aten.add.Tensor, (arguments[0], arguments[-1]))
            if arguments
            else next(free)
        )
        made.meta["val"] = torch.empty(v.size, device="meta")
        nodes.append(made)
    gradients = []
    for v, node in zip(values, nodes, strict=True):
        if v.read:
            reader = graph.call_function(aten.mul.Tensor, (tangent, node))
            reader.meta["val"] = torch.empty(1, device="meta")
            gradients.append(reader)
    padded = [*gradients, *[None] * count][:count] if len(gradients) < count else gradients
    graph.output([nodes[-1], *padded])
    inputs = tuple(Input(f"x{i}", "input") for i in range(count))
    return JointGraph(fx.GraphModule(nn.Module(), graph), Signature(inputs, 1)), nodes


def price_of(values: list[Value], saved: frozenset[int]) -> float:
    """Saved bytes plus the price of what is computed again; infinite where that is impossible."""
    again: set[int] = set()
    pending = [i for i, v in enumerate(values) if v.read]
    while pending:
        i = pending.pop()
        if i in saved or i in again:
            continue
        if values[i].price is None:
            return float("inf")
        again.add(i)
        pending += values[i].inputs
    prices = [values[i].price or 0 for i in again]
    return sum(4 * values[i].size for i in saved) + sum(prices)


@settings(max_examples=150)
@given(graphs())
def test_no_subset_is_cheaper(values: list[Value]) -> None:
    joint, nodes = built(values)
    cut = minimum_cut(joint, lambda n: values[nodes.index(n)].price)
    found = price_of(values, frozenset(nodes.index(n) for n in cut))
    everything = range(len(values))
    best = min(
        price_of(values, frozenset(chosen))
        for count in range(len(values) + 1)
        for chosen in itertools.combinations(everything, count)
    )
    assert found == pytest.approx(best, abs=1e-3)


@settings(max_examples=50)
@given(graphs(), st.data())
def test_what_a_pass_fixed_is_kept(values: list[Value], data: st.DataObject) -> None:
    joint, nodes = built(values)
    read = [i for i, v in enumerate(values) if v.read and v.inputs]
    if not read:
        return
    chosen = data.draw(st.sampled_from(read))
    joint.save_for_backward(nodes[chosen])
    assert nodes[chosen] in minimum_cut(joint, lambda n: 1e-3)
    joint.rebuild_in_backward(nodes[chosen])
    assert nodes[chosen] not in minimum_cut(joint, lambda n: None if n is not nodes[chosen] else 1)


def test_autograd_keeps_what_is_read_and_views_count_as_their_storage() -> None:
    joint = joint_with(lambda x: torch.tanh(x).t().reshape(2, 4))
    (y,) = joint.calls(aten.tanh.default)
    assert y in read_directly(joint)
    views = [n for n in joint.nodes if storage_of(n) is not n]
    assert views
    assert not set(views) & set(read_directly(joint))


def test_a_random_draw_cannot_be_rebuilt() -> None:
    joint = joint_with(lambda x: nn.functional.dropout(x, 0.5))
    (draw,) = joint.calls(aten.native_dropout.default)
    joint.rebuild_in_backward(next(part for part in draw.users if part.args[1] == 1))
    with pytest.raises(PlanError, match=r"no plan keeps what was asked of .*test_cut\.py"):
        minimum_cut(joint, lambda n: 1.0)


def test_a_value_overwritten_by_the_forward_is_not_read_again() -> None:
    joint = joint_of(nn.Sequential(Written(torch.tanh), nn.BatchNorm1d(4)), torch.randn(3, 4))
    (norm,) = [n for n in joint.nodes if "batch_norm" in str(n.target) and joint.is_forward(n)]
    joint.rebuild_in_backward(norm)
    with pytest.raises(PlanError, match="overwrites"):
        minimum_cut(joint, lambda n: 1.0)


def test_a_view_cannot_be_saved_itself() -> None:
    joint = joint_with(lambda x: torch.tanh(x).t().reshape(2, 4) * 2)
    (view,) = [n for n in joint.calls(aten.t.default) if n.args[0].target is aten.tanh.default]  # type: ignore[union-attr]
    joint.save_for_backward(view)
    with pytest.raises(PlanError, match="Views and tuples are not saved"):
        minimum_cut(joint, lambda n: 1.0)


def test_saved_values_are_described_and_parameters_cost_nothing() -> None:
    joint = joint_with(torch.relu)
    cut = read_directly(joint)
    described = {s.name: s for s in saved_values(joint, cut)}
    relu = described["relu"]
    assert (relu.shape, relu.bytes, relu.kind) == ("f32[2, 4]", 32, "activation")
    assert "aten.threshold_backward.default" in relu.readers
    assert relu.location.file.endswith("graphs.py")
    assert described["x"].kind == "input"
    assert described["last.weight"].kind == "parameter"
    assert saved_bytes(joint, cut) == 64
