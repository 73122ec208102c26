"""guided-relu: only positive cotangents pass a ReLU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans
import gtrans.testing as kit
from gtrans.contract import Attribution
from gtrans.errors import ContractError, OptionError
from gtrans.ir.printer import node_to_code
from gtrans.pipeline import Pipeline
from tests.ir.graphs import joint_with

Function = Callable[[torch.Tensor], torch.Tensor]

aten = torch.ops.aten


def test_the_cotangent_is_rectified() -> None:
    after, (step,) = Pipeline.parse("guided-relu").run(joint_with(F.relu))
    (backward,) = after.calls(aten.threshold_backward.default)
    assert node_to_code(backward).startswith(
        "threshold_backward_default = aten.threshold_backward.default(relu_default, relu, 0)"
    )
    assert node_to_code(backward.all_input_nodes[0]) == (
        "relu_default = aten.relu.default(mm_3)  # f32[2, 4]  <- guided-relu"
    )
    assert (step.stats.matched, step.stats.rewritten) == (1, 1)


def _guide(module: nn.Module, into: Any, out: Any) -> Any:
    return (into[0] * (out[0] > 0),)


def by_hand(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Guided backpropagation to the input with hooks, one Linear and ReLU after another."""
    x = x.clone().requires_grad_()
    handles = [m.register_full_backward_hook(_guide) for m in model if isinstance(m, nn.ReLU)]
    model(x).sum().backward()
    for handle in handles:
        handle.remove()
    assert x.grad is not None
    return x.grad


def test_attributions_are_those_of_hooks_on_every_relu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5)
    ).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = by_hand(model, x.detach())
    plain = x.detach().clone().requires_grad_()
    model(plain).sum().backward()

    gtrans.optimize(model, passes="guided-relu", backend="eager", on_error="raise")
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert not torch.allclose(expected, plain.grad)  # type: ignore[arg-type]  # or nothing is shown
    assert gtrans.report(model).contract == Attribution(law="dx = relu(dy) * [y > 0]")


@pytest.mark.parametrize(
    ("function", "reason"),
    [(lambda x: F.threshold(x, 0.5, 0.0), "not the backward of a forward ReLU")],
)
def test_each_reason_to_leave_a_backward_alone(function: Function, reason: str) -> None:
    _, (step,) = Pipeline.parse("guided-relu").run(joint_with(function))
    assert step.stats.skipped == {reason: 1}


def test_a_guided_relu_is_not_guided_again() -> None:
    _, (_, again) = Pipeline.parse("guided-relu,guided-relu").run(joint_with(F.relu))
    assert again.stats.skipped == {"its cotangent is rectified already": 1}


def test_laws() -> None:
    model, inputs = kit.ModelSpec(layers=("relu", "linear", "relu")).build()
    assert kit.check_pass("guided-relu", model, inputs) == 2


def test_it_promises_no_gradient_and_has_no_options() -> None:
    with pytest.raises(ContractError, match="pass 'guided-relu' is attribution, weaker than"):
        Pipeline.parse("guided-relu").require("exact")
    with pytest.raises(OptionError, match="pass 'guided-relu' has no option 'threshold'"):
        Pipeline.parse("guided-relu{threshold=1}")
