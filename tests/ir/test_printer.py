"""Graphs as text."""

import torch
import torch.nn.functional as F
from torch import nn

from gtrans.ir.printer import node_to_code, target_name, to_code, to_dot
from tests.ir.graphs import Written, joint_of, joint_with

aten = torch.ops.aten


def test_a_small_graph_prints_as_code() -> None:
    joint = joint_with(torch.relu)
    assert to_code(joint.graph, lines=False) == (
        "| primals_1 = input()  # f32[4, 4]\n"
        "| primals_2 = input()  # f32[2, 4]\n"
        "| primals_3 = input()  # f32[4, 4]\n"
        "< tangents_1 = input()  # f32[2, 4]\n"
        "| t = aten.t.default(primals_1)  # f32[4, 4]\n"
        "| mm = aten.mm.default(primals_2, t)  # f32[2, 4]\n"
        "| relu = aten.relu.default(mm)  # f32[2, 4]\n"
        "| t_1 = aten.t.default(primals_3)  # f32[4, 4]\n"
        "| mm_1 = aten.mm.default(relu, t_1)  # f32[2, 4]\n"
        "< t_2 = aten.t.default(tangents_1)  # f32[4, 2]\n"
        "< mm_2 = aten.mm.default(t_2, relu)  # f32[4, 4]\n"
        "< mm_3 = aten.mm.default(tangents_1, primals_3)  # f32[2, 4]\n"
        "< threshold_backward = aten.threshold_backward.default(mm_3, relu, 0)  # f32[2, 4]\n"
        "< t_6 = aten.t.default(threshold_backward)  # f32[4, 2]\n"
        "< mm_4 = aten.mm.default(t_6, primals_2)  # f32[4, 4]\n"
        "return [mm_1, mm_4, None, mm_2]\n"
    )


def test_lines_of_the_model_head_their_nodes() -> None:
    code = to_code(joint_with(torch.relu).graph)
    assert "# graphs.py:" in code
    assert "self.last(self.function(self.first(x)))" in code


def test_parts_of_tuples_are_printed_where_they_are_used() -> None:
    joint = joint_of(nn.Sequential(Written(F.gelu), nn.LayerNorm(4)), torch.randn(2, 4))
    assert "native_layer_norm[1]" in to_code(joint.graph, lines=False)
    assert "getitem" in to_code(joint.graph, lines=False, fold_getitem=False)


def test_the_author_of_a_node_is_printed() -> None:
    joint = joint_with(torch.relu)
    joint.author = "my-pass"
    (y,) = joint.calls(aten.relu.default)
    node = joint.insert_after(y, aten.le.Scalar, y, 0)
    assert node_to_code(node) == "le_scalar = aten.le.Scalar(relu, 0)  # b8[2, 4]  <- my-pass"
    assert target_name(node) == "aten.le.Scalar"


def test_dot_has_both_halves_and_marks_residuals() -> None:
    dot = to_dot(joint_with(torch.relu), title="t")
    assert dot.startswith("digraph joint {")
    assert dot.count("{") == dot.count("}")
    assert "cluster_forward" in dot
    assert "cluster_backward" in dot
    assert '"relu" -> "threshold_backward" [color=' in dot
    assert '"mm" -> "relu";' in dot
