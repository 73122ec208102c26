"""The planner against the optimum by mixed-integer programming, on graphs of up to 12 nodes."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from gtrans.analysis.cost import Device, node_seconds
from gtrans.ir import ops
from gtrans.ir.joint import Input, JointGraph, Signature
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan.front import Front
from gtrans.plan.rebuild import Choice, Rebuilder
from tests.plan.oracle import Step, least_seconds

aten = torch.ops.aten
# Slow enough at products that they are dear, and without a price for each launch.
DEVICE = Device("test", 1e9, 1e9, 1e9, 0.0)


@dataclass(frozen=True)
class Value:
    """A forward value of a random graph; besides these inputs it reads the value before it."""

    size: int
    inputs: tuple[int, ...]
    dear: bool
    read: bool


def random_values(seed: int) -> list[Value]:
    """Forward values and, for each that is read, a backward node: 12 nodes at most."""
    draw = random.Random(seed)
    count = draw.randint(3, 7)
    readers = draw.sample(range(count), draw.randint(2, min(count, 12 - count)))
    return [
        Value(
            draw.randint(4, 40),
            (draw.randint(0, i - 2),) if i > 1 and draw.random() < 0.5 else (),
            draw.random() < 0.5,
            i in readers,
        )
        for i in range(count)
    ]


def built(values: list[Value]) -> JointGraph:
    """The joint graph; its backward reads the values from the last to the first."""
    graph = fx.Graph()
    x, tangent = graph.placeholder("primals_1"), graph.placeholder("tangents_1")
    x.meta["val"] = torch.empty(8, device="meta")
    tangent.meta["val"] = torch.empty(1, device="meta")
    nodes: list[fx.Node] = []
    for i, v in enumerate(values):
        before = nodes[i - 1] if i else x
        target = aten.mm.default if v.dear else aten.add.Tensor
        other = nodes[v.inputs[0]] if v.inputs else before
        made = graph.call_function(target, (before, other))
        made.meta["val"] = torch.empty(v.size, device="meta")
        nodes.append(made)
    cotangent = tangent
    for v, node in reversed(list(zip(values, nodes, strict=True))):
        if v.read:
            cotangent = graph.call_function(aten.mul.Tensor, (cotangent, node))
            cotangent.meta["val"] = torch.empty(v.size, device="meta")
    graph.output([nodes[-1], cotangent])
    return JointGraph(fx.GraphModule(nn.Module(), graph), Signature((Input("x", "input"),), 1))


def as_numbers(joint: JointGraph) -> Step:
    calls = [n for n in joint.nodes if n.op == "call_function"]
    number = {n: i for i, n in enumerate(calls)}
    outputs = [number[o] for o in joint.forward_outputs if isinstance(o, fx.Node)]
    return Step(
        inputs=[tuple({number[i] for i in ops.tensor_inputs(n) if i in number}) for n in calls],
        bytes=[tensor_bytes(n.meta["val"]) for n in calls],
        seconds=[node_seconds(n, DEVICE) for n in calls],
        forward=sum(joint.is_forward(n) for n in calls),
        outputs=frozenset(outputs),
        constants=sum(tensor_bytes(n.meta["val"]) for n in joint.primals),
        tangents=sum(tensor_bytes(n.meta["val"]) for n in joint.tangents),
    )


@settings(max_examples=40, derandomize=True)
@given(st.integers(0, 10**6))
def test_within_ten_percent_of_the_optimum_and_never_below_it(seed: int) -> None:
    """Of random graphs, at budgets all over what the planner reaches."""
    joint = built(random_values(seed))
    step, front = as_numbers(joint), Front(joint, DEVICE)
    best = front.best()
    base, plain, smallest = sum(step.seconds), front.candidates[0].peak, best[-1].peak
    for share in (0.0, 0.25, 0.5, 0.75):
        budget = smallest + share * (plain - smallest)
        extra = least_seconds(step, budget)
        assert extra is not None  # the planner's own plan is one
        found = min(c.seconds for c in best if c.peak <= budget)
        assert base + extra <= found * (1 + 1e-9)  # or the two disagree about a plan
        assert found <= 1.1 * (base + extra)


def test_what_is_dropped_is_computed_again_for_a_later_reader() -> None:
    """a and b are read last, by 3 and 4: in between b may be let go of, saved or not."""
    values = [Value(40, (), True, True), Value(30, (), False, True), Value(60, (), True, True)]
    joint = built(values)
    a, b, c = joint.calls(aten.mm.default, aten.add.Tensor)
    rebuilder = Rebuilder(joint)
    kept = rebuilder.schedule(Choice(frozenset((a, b, c))))
    dropped = rebuilder.schedule(Choice(frozenset((a, b, c)), dropped=frozenset({(b, 1)})))
    early = rebuilder.schedule(Choice(frozenset((a, b, c)), dropped=frozenset({(b, 0)})))
    assert kept is not None
    assert dropped is not None
    assert early is not None
    assert [t.node for t in kept.again] == []
    assert [t.node for t in dropped.again] == [b]
    assert [t.node for t in early.again] == [b]
    assert b not in early.cut
    held = rebuilder.schedule(Choice(frozenset((a, c)), dropped=frozenset({(joint.primals[0], 1)})))
    assert held is not None
    assert joint.primals[0] not in {t.node for t in held.again}  # an input cannot be had again


def test_the_program_on_a_graph_that_is_solved_by_hand() -> None:
    """x -> a (40) -> b (4); the backward reads b, then a. Without a kept, a runs again."""
    values = [Value(40, (), True, True), Value(4, (), False, True)]
    step = as_numbers(built(values))
    assert step.inputs == [(), (0,), (1,), (0, 2)]
    # Keeping a: x, tangent, a, b, and both cotangents at the end.
    everything = 4 * (8 + 1 + 40 + 4 + 4 + 40)
    assert least_seconds(step, everything) == 0.0
    assert least_seconds(step, everything - 1) is None
    # a (40) -> b (60) -> c (4), all read: while b's backward node runs, a need not be there.
    wide = [Value(40, (), True, True), Value(60, (), False, True), Value(4, (), False, True)]
    step = as_numbers(built(wide))
    assert least_seconds(step, 4 * (8 + 1 + 40 + 60 + 4 + 4 + 60)) == 0.0
    again = pytest.approx(step.seconds[0])
    assert least_seconds(step, 4 * (8 + 1 + 40 + 60 + 4 + 4 + 60) - 1) == again
    assert least_seconds(step, 4 * (8 + 1 + 40 + 4 + 60 + 40)) == again
    assert least_seconds(step, 4 * (8 + 1 + 40 + 4 + 60 + 40) - 1) is None
