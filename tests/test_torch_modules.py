"""Models whose forward is torch's own code, which Dynamo skips, are captured all the same."""

import pytest
import torch
from torch import nn

import gtrans

BUILT_IN = {
    "sequential": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
    "linear": nn.Linear(8, 8),
    "encoder layer": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_explain_captures_one_training_graph(name: str) -> None:
    assert len(gtrans.explain(BUILT_IN[name], torch.randn(2, 4, 8)).training) == 1


def test_optimize_captures_and_calls_the_hooks() -> None:
    first = nn.Linear(8, 8)
    model = nn.Sequential(first, nn.Tanh())
    x = torch.randn(4, 8)
    model(x).sum().backward()
    assert first.weight.grad is not None
    expected = first.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    model.register_forward_hook(lambda module, args, output: 2 * output)
    gtrans.optimize(model, backend="eager")
    model(x).sum().backward()
    assert len(gtrans.report(model).training) == 1
    torch.testing.assert_close(first.weight.grad, 2 * expected)


def test_models_do_not_share_a_recompilation_limit() -> None:
    for width in range(2, 16):  # more than Dynamo's limit of eight for one code object
        model = gtrans.optimize(nn.Sequential(nn.Linear(width, 4)), backend="eager")
        model(torch.randn(3, width)).sum().backward()
        assert len(gtrans.report(model).training) == 1


def test_names_and_lines_are_those_of_the_model() -> None:
    found = gtrans.explain(BUILT_IN["sequential"], torch.randn(2, 4, 8))
    joint = found.training[0].original
    assert joint is not None
    assert set(joint.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not any("capture.py" in row.example.location.file for row in found.saved)
    assert {row.example.location.module for row in found.saved} <= {"", "0", "1", "2"}
