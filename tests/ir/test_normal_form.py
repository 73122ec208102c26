"""What every pass may rely on in a captured graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans
from gtrans.ir import ops
from tests.ir.graphs import Written, joint_of, joint_with

aten = torch.ops.aten


def test_the_backward_of_relu_reads_relu_itself() -> None:
    joint = joint_with(torch.relu)
    (relu,) = joint.calls(aten.relu.default)
    (backward,) = joint.calls(aten.threshold_backward.default)
    assert backward.args[1] is relu
    assert not joint.calls(aten.detach.default, aten.alias.default)


def test_chains_of_reshapes_become_one() -> None:
    joint = joint_with(lambda x: torch.tanh(x).view(4, 2).view(8).view(2, 4) * 2)
    (y,) = joint.calls(aten.tanh.default)
    (product,) = [n for n in joint.calls(aten.mul.Tensor) if joint.is_forward(n)]
    assert product.args[0] is y


def test_a_reshape_of_a_strided_value_stays() -> None:
    joint = joint_with(lambda x: torch.tanh(x).t().reshape(2, 4))
    (y,) = joint.calls(aten.tanh.default)
    (product,) = [
        n
        for n in joint.calls(aten.mm.default)
        if joint.is_forward(n) and n.args[1] is not y and n.args[0] is not joint.primals[1]
    ][-1:]
    assert product.args[0] is not y


def test_what_an_operator_in_place_copies_is_read_itself() -> None:
    joint = joint_with(lambda x: F.silu(torch.sin(x), inplace=True))
    (y,) = joint.calls(aten.sin.default)
    assert not joint.calls(aten.clone.default)
    assert [n for n in y.users if joint.is_backward(n)]


def test_copies_of_arguments_of_results_and_of_parts_stay() -> None:
    def of_a_part(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sin(x).narrow(0, 0, 1).clone().exp()] * 2)

    class Returned(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.sin(x.clone().exp())
            return y, y.clone().exp()

    assert len(joint_with(of_a_part).calls(aten.clone.default)) == 1
    x = torch.randn(2, 4, requires_grad=True)
    assert len(joint_of(Returned(), x).calls(aten.clone.default)) == 2


def test_equal_computations_are_one_node() -> None:
    joint = joint_with(lambda x: torch.sin(x) + torch.sin(x) * 2)
    assert len([n for n in joint.calls(aten.sin.default) if joint.is_forward(n)]) == 1


def test_equal_numbers_of_other_types_are_not_merged() -> None:
    joint = joint_with(lambda x: (x * 1).sum(1, keepdim=True) + x * 1.0)
    assert len([n for n in joint.calls(aten.mul.Tensor) if joint.is_forward(n)]) == 2


def test_two_draws_stay_two() -> None:
    joint = joint_with(lambda x: F.dropout(x, 0.5) + F.dropout(x, 0.5))
    assert len([n for n in joint.nodes if ops.is_random(n) and joint.is_forward(n)]) == 2


def test_every_node_has_a_value_and_its_own_metadata() -> None:
    joint = joint_of(nn.Sequential(Written(F.gelu), nn.LayerNorm(4)), torch.randn(2, 4))
    nested: list[int] = []
    for node in joint.nodes:
        if node.op not in ("output", "get_attr"):
            assert "val" in node.meta
        nested += [id(v) for v in node.meta.values() if type(v) is dict]
    assert len(nested) == len(set(nested))


def test_no_decomposition_has_happened() -> None:
    joint = joint_of(nn.Sequential(Written(F.gelu), nn.LayerNorm(4)), torch.randn(2, 4))
    for target in (
        aten.gelu.default,
        aten.gelu_backward.default,
        aten.native_layer_norm.default,
        aten.native_layer_norm_backward.default,
    ):
        assert len(joint.calls(target)) == 1


def test_updated_statistics_have_the_type_that_the_operator_returns() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).to(torch.bfloat16)
    joint = joint_of(model, torch.randn(4, 3, dtype=torch.bfloat16))
    (norm,) = joint.calls(aten._native_batch_norm_legit_functional.default)
    one = torch.ones(3, dtype=torch.bfloat16)
    x = torch.randn(4, 3).bfloat16()
    real = aten._native_batch_norm_legit_functional(x, one, one, one, one, True, 0.1, 1e-5)
    assert [v.dtype for v in norm.meta["val"]] == [v.dtype for v in real]
    for part in filter(ops.is_getitem, norm.users):
        assert part.meta["val"].dtype == real[part.args[1]].dtype


def test_assertions_have_no_result_and_stay() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.inner(x) * F.one_hot(y, 4)).sum()

    torch.compiler.reset()
    model = gtrans.optimize(Chosen(), backend="eager", on_error="raise")
    x = torch.randn(2, 3)
    model(x, torch.tensor([0, 3])).backward()
    (record,) = gtrans.report(model).captured
    assert record.rewritten is not None
    checks = [n for n in record.rewritten.nodes if ops.has_no_result(n)]
    assert checks
    assert all(n.meta["val"] is None for n in checks)
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        model(x, torch.tensor([0, 4]))
