"""straight-through: rounding lets cotangents pass."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gtrans
import gtrans.testing as kit
from gtrans.contract import Aligned
from gtrans.errors import ContractError, OptionError
from gtrans.ir.printer import node_to_code
from gtrans.pipeline import Pipeline
from tests.ir.graphs import joint_with

Function = Callable[[torch.Tensor], torch.Tensor]

aten = torch.ops.aten


def test_the_zeros_give_way_to_the_cotangent() -> None:
    before = joint_with(torch.round)
    (zeros,) = before.calls(aten.zeros_like.default)
    assert node_to_code(zeros) == "zeros_like = aten.zeros_like.default(mm_3)  # f32[2, 4]"
    (reader,) = zeros.users
    after, (step,) = Pipeline.parse("straight-through").run(before)
    assert after.calls(aten.zeros_like.default) == []
    (same,) = [n for n in after.nodes if n.name == reader.name]
    assert node_to_code(same) == node_to_code(reader).replace("zeros_like", "mm_3")
    assert (step.stats.matched, step.stats.rewritten) == (1, 1)


class Quantised(nn.Module):
    """A scaled rounding between two products; as the identity with `straight`."""

    def __init__(self, function: Function, straight: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        self.last = nn.Linear(6, 2)
        self.function = function
        self.straight = straight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 4 * self.first(x).clamp(-1, 1)
        rounded = self.function(y)
        if self.straight:  # the estimator as it is written by hand
            rounded = y + (rounded - y).detach()
        loss: torch.Tensor = self.last(rounded / 4).square().sum()
        return loss


ROUNDINGS: dict[str, Function] = {
    "round": torch.round,
    "to decimals": lambda x: torch.round(x, decimals=1),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "fix": torch.fix,
    "sign": torch.sign,
    "in place": lambda x: (x * 1.0).round_(),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_gradients_are_those_of_the_estimator_written_by_hand(name: str) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    by_hand = Quantised(ROUNDINGS[name], straight=True).double()
    by_hand(x).backward()
    model = Quantised(ROUNDINGS[name], straight=False).double()
    gtrans.optimize(model, passes="straight-through", backend="eager", on_error="raise")
    model(x).backward()
    for (path, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=path)
    assert model.first.weight.grad is not None
    assert bool(model.first.weight.grad.any())
    assert gtrans.report(model).contract == Aligned()


@pytest.mark.parametrize(
    "function",
    [torch.zeros_like, lambda x: x.to(torch.int32).to(x.dtype), torch.relu],
    ids=["zeros of the model", "cast to integers", "no rounding"],
)
def test_other_operators_are_left_alone(function: Function) -> None:
    _, (step,) = Pipeline.parse("straight-through").run(joint_with(function))
    assert step.stats.matched == 0


def test_laws() -> None:
    model, inputs = kit.ModelSpec(layers=("round", "linear", "round")).build()
    assert kit.check_pass("straight-through", model, inputs) == 2


def test_it_promises_no_gradient_and_has_no_options() -> None:
    with pytest.raises(ContractError, match="pass 'straight-through' is aligned, weaker than"):
        Pipeline.parse("straight-through").require("exact")
    with pytest.raises(OptionError, match="pass 'straight-through' has no option 'bits'"):
        Pipeline.parse("straight-through{bits=2}")
