"""The joint graph: reading and editing."""

import pytest
import torch
from torch import nn

from gtrans.errors import GraphError
from gtrans.ir.check import check_joint
from gtrans.ir.joint import TAG, Input, JointGraph, Placement, Signature, names, sources, tag
from tests.ir.graphs import Written, joint_of, joint_with

aten = torch.ops.aten


@pytest.fixture
def joint() -> JointGraph:
    return joint_with(torch.tanh)


def test_primals_are_known_by_their_path_in_the_model(joint: JointGraph) -> None:
    assert list(joint.parameters) == ["first.weight", "last.weight"]
    assert [joint.input_of(p) for p in joint.primals if p not in joint.parameters.values()] == [
        Input("x", "input")
    ]
    weight = joint.parameters["first.weight"]
    gradient = joint.gradient_of(weight)
    assert gradient is not None
    assert gradient.meta["val"].shape == weight.meta["val"].shape
    assert joint.gradient_of(next(p for p in joint.primals if p.name == "primals_2")) is None


def test_a_node_is_backward_if_and_only_if_a_tangent_reaches_it(joint: JointGraph) -> None:
    (forward,) = joint.calls(aten.tanh.default)
    (backward,) = joint.calls(aten.tanh_backward.default)
    assert joint.is_forward(forward)
    assert not joint.is_backward(forward)
    assert joint.is_backward(backward)
    assert not joint.is_forward(joint.output)
    assert not joint.is_forward(None)


def test_regions_pair_forward_and_backward_and_name_the_residual(joint: JointGraph) -> None:
    (forward,) = joint.calls(aten.tanh.default)
    (region,) = [r for r in joint.regions().values() if forward in r.forward]
    assert joint.calls(aten.tanh_backward.default)[0] in region.backward
    assert forward in joint.residual(region)


def test_readers_are_found_through_views() -> None:
    joint = joint_with(lambda x: torch.tanh(x).view(4, 2).t().reshape(2, 4))
    (y,) = joint.calls(aten.tanh.default)
    targets = {r.target for r in joint.backward_readers(y)}
    assert aten.tanh_backward.default in targets


def test_accumulations_of_a_value_used_twice_are_marked() -> None:
    joint = joint_with(lambda x: torch.tanh(x) * torch.sin(x))
    assert len(joint.gradient_accumulations()) == 1
    assert joint_with(torch.tanh).gradient_accumulations() == []


def test_an_inserted_node_has_value_side_region_and_author(joint: JointGraph) -> None:
    (y,) = joint.calls(aten.tanh.default)
    joint.author = "me"
    twice = joint.insert_after(y, aten.mul.Tensor, y, 2)
    assert twice.meta["val"].shape == (2, 4)
    assert joint.is_forward(twice)
    assert tag(twice).made_by == "me"
    assert tag(twice).region == tag(y).region
    dy = joint.insert_before(joint.output, aten.neg.default, joint.tangents[0])
    assert joint.is_backward(dy)
    check_joint(joint)


def test_inserting_after_an_input_goes_after_all_of_them(joint: JointGraph) -> None:
    node = joint.insert_after(joint.primals[0], aten.neg.default, joint.primals[0])
    assert node.prev is joint.tangents[-1]
    joint.graph.lint()


def test_sides_follow_when_an_edit_changes_what_a_node_depends_on(joint: JointGraph) -> None:
    (y,) = joint.calls(aten.tanh.default)
    first = joint.insert_before(joint.output, aten.neg.default, y)
    second = joint.insert_before(joint.output, aten.neg.default, first)
    (dx,) = joint.calls(aten.tanh_backward.default)
    joint.replace_uses(y, dx, [first])
    assert joint.is_backward(first)
    assert joint.is_backward(second)


def test_replacing_by_another_shape_or_dtype_is_refused(joint: JointGraph) -> None:
    (y,) = joint.calls(aten.tanh.default)
    other = joint.insert_after(y, aten._to_copy.default, y, dtype=torch.float64)
    with pytest.raises(GraphError, match=r"cannot replace tanh .*float32.*by _to_copy"):
        joint.replace(y, other)
    narrow = joint.insert_after(y, aten.select.int, y, 0, 0)
    with pytest.raises(GraphError, match="cannot replace"):
        joint.replace(y, narrow)


def test_only_forward_values_can_be_placed_or_offered(joint: JointGraph) -> None:
    (y,) = joint.calls(aten.tanh.default)
    (dx,) = joint.calls(aten.tanh_backward.default)
    joint.save_for_backward(y)
    assert tag(y).placement is Placement.SAVED
    joint.rebuild_in_backward(y)
    assert tag(y).placement is Placement.REBUILT
    with pytest.raises(GraphError, match="only forward values can be placed"):
        joint.save_for_backward(dx)
    with pytest.raises(GraphError, match="offers are about forward values"):
        joint.offer(y, torch.neg, dx)


def test_a_copy_is_independent(joint: JointGraph) -> None:
    joint.cut = (joint.calls(aten.tanh.default)[0],)
    twin = joint.copy()
    assert twin.cut is not None
    assert twin.cut[0].name == "tanh"
    assert twin.cut[0] not in joint.nodes
    before = len(joint.nodes)
    (y,) = twin.calls(aten.tanh.default)
    twin.insert_after(y, aten.neg.default, y)
    twin.save_for_backward(y)
    assert len(joint.nodes) == before
    assert tag(joint.calls(aten.tanh.default)[0]).placement is Placement.AUTO


def test_an_edit_drops_the_cut(joint: JointGraph) -> None:
    joint.cut = ()
    joint.insert_before(joint.output, aten.neg.default, joint.primals[0])
    assert joint.cut is None


def test_dead_code_goes_and_effects_stay() -> None:
    joint = joint_of(nn.Sequential(Written(torch.tanh), nn.BatchNorm1d(4)), torch.randn(3, 4))
    copies = joint.calls(aten.copy_.default)
    joint.insert_before(joint.output, aten.neg.default, joint.primals[0])
    assert joint.eliminate_dead_code() == 1
    assert joint.calls(aten.copy_.default) == copies


def test_a_node_from_the_bare_graph_is_refused_with_the_way_out(joint: JointGraph) -> None:
    (y,) = joint.calls(aten.tanh.default)
    with joint.graph.inserting_after(y):
        node = joint.graph.call_function(aten.neg.default, (y,))
    with pytest.raises(GraphError, match=r"no gtrans tag.*insert nodes through"):
        tag(node)


def test_a_signature_that_does_not_fit_is_refused(joint: JointGraph) -> None:
    with pytest.raises(GraphError, match="its signature 99 primals"):
        JointGraph(joint.module, Signature((Input("x", "input"),) * 99, 1))


def test_sources_and_names(joint: JointGraph) -> None:
    (y,) = joint.calls(aten.tanh.default)
    assert names(list(sources([y]))) == y.all_input_nodes[0].name
    assert TAG in y.meta
