"""The rules that every pass must leave intact, each broken once."""

from collections.abc import Callable

import pytest
import torch
from torch import fx

from gtrans.errors import GraphError
from gtrans.ir.check import check_forward, check_joint
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import TAG, JointGraph, Side, Tag
from tests.ir.graphs import joint_with

aten = torch.ops.aten


def no_value(joint: JointGraph) -> None:
    del joint.calls(aten.tanh.default)[0].meta["val"]


def wrong_side(joint: JointGraph) -> None:
    joint.calls(aten.tanh.default)[0].meta[TAG] = Tag(Side.BACKWARD)


def output_from_tangent(joint: JointGraph) -> None:
    (y,) = [o for o in joint.forward_outputs if isinstance(o, fx.Node)]
    joint.output.replace_input_with(y, joint.tangents[0])


def other_order(joint: JointGraph) -> None:
    (y,) = joint.calls(aten.tanh.default)
    joint.graph.output_node().append(y)


def other_dtype(joint: JointGraph) -> None:
    gradient = joint.gradients[0]
    assert gradient is not None
    low = joint.insert_before(joint.output, aten._to_copy.default, gradient, dtype=torch.float16)
    joint.output.replace_input_with(gradient, low)


def lost_gradient(joint: JointGraph) -> None:
    outputs = list(joint.output.args[0])  # type: ignore[arg-type]
    outputs[joint.signature.num_forward_outputs] = None
    joint.output.args = (outputs,)


def fewer_outputs(joint: JointGraph) -> None:
    outputs = list(joint.output.args[0])  # type: ignore[arg-type]
    joint.output.args = (outputs[:-1],)


def renamed_input(joint: JointGraph) -> None:
    joint.primals[0].target = "other"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_value, "node tanh .* has no recorded value"),
        (wrong_side, "tagged backward but does not depend on a tangent"),
        (output_from_tangent, "forward output tangents_1 depends on a tangent"),
        (other_order, "torch.fx finds the graph broken"),
        (other_dtype, r"output 1 changed from f32\[4, 4\] to f16\[4, 4\]"),
        (lost_gradient, r"output 1 changed from f32\[4, 4\] to None"),
        (fewer_outputs, "the number of outputs changed from"),
        (renamed_input, "placeholders changed from"),
    ],
)
def test_a_broken_rule_is_named(spoil: Callable[[JointGraph], None], message: str) -> None:
    original = joint_with(torch.tanh)
    check_joint(original, original)
    broken = original.copy()
    spoil(broken)
    with pytest.raises(GraphError, match=message):
        check_joint(broken, original)


def test_a_forward_graph_must_keep_its_inputs() -> None:
    def module(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    graph = ForwardGraph(fx.symbolic_trace(module))
    twin = graph.copy()
    check_forward(twin, graph)
    twin.graph.find_nodes(op="placeholder")[0].target = "z"
    with pytest.raises(GraphError, match="placeholders changed"):
        check_forward(twin, graph)
