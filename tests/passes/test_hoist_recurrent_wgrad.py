"""Weight gradients of a recurrence as one product."""

from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.contract import Exact
from gtrans.core import HELD_BACK
from gtrans.debugging.recording import Recording
from gtrans.errors import OptionError
from gtrans.ir.joint import JointGraph
from gtrans.passes.rule.hoist_recurrent_wgrad import HoistRecurrentWgrad
from gtrans.pipeline import Gate, Pipeline
from gtrans.testing.laws import check_pass

aten = torch.ops.aten


class Unrolled(nn.Module):
    """A recurrent cell in a Python loop, and a last layer."""

    def __init__(self, kind: type[nn.RNNCellBase], width: int = 5) -> None:
        super().__init__()
        self.cell = kind(width, width)  # type: ignore[call-arg]
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        y: torch.Tensor = self.last(h)
        return y


class Layer(nn.Module):
    """A recurrent layer of torch, all its outputs."""

    def __init__(self, kind: type[nn.RNN | nn.GRU | nn.LSTM], width: int = 5) -> None:
        super().__init__()
        self.layer = kind(width, width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)[0]
        return y


class Tied(nn.Module):
    """The same layer several times, and once more where its gradient is a sum of other things."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x + self.layer.weight.square().sum()


def _rewritten(model: nn.Module, x: torch.Tensor, gate: Gate | None = None) -> tuple[Any, Any, Any]:
    (captured,) = Recording(model, (x,), {}).captured
    assert captured.original is not None
    pipeline = Pipeline((HoistRecurrentWgrad(),))
    graph, (step,) = pipeline.run(captured.original, gate=gate)
    return captured.original, graph, step


def _products(joint: JointGraph) -> int:
    """Matrix products in the backward."""
    return sum(joint.is_backward(n) for n in joint.calls(aten.mm.default))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "model",
    [Unrolled(nn.RNNCell), Unrolled(nn.GRUCell), Layer(nn.GRU), Layer(nn.RNN), Layer(nn.LSTM)],
    ids=["rnn cell", "gru cell", "gru", "rnn", "lstm"],
)
def test_the_same_gradients(model: nn.Module, batch: int) -> None:
    x = torch.randn(batch, 6, 5, requires_grad=True)
    result = gtrans.verify(model, x, passes="hoist-recurrent-wgrad").require()
    assert result.contract == Exact(bitwise=False)
    assert any(s.stats.rewritten for c in result.explanation.captured for s in c.steps)


def test_one_product_for_each_weight_of_a_cell() -> None:
    before, after, step = _rewritten(Unrolled(nn.RNNCell), torch.randn(3, 8, 5))
    assert step.stats.matched == step.stats.rewritten == 4  # two weights, two biases
    # Eight steps: of 16 products for two weights two remain.
    assert _products(before) - _products(after) == 14
    assert len(after.gradient_accumulations()) == len(before.gradient_accumulations()) - 4 * 7
    # Biases and weights of a cell share one concatenation of cotangents; inputs and states differ.
    assert len(after.calls(aten.cat.default)) - len(before.calls(aten.cat.default)) == 3


def test_what_else_is_added_stays() -> None:
    model, x = Tied(5), torch.randn(3, 5)
    gtrans.verify(model, x, passes="hoist-recurrent-wgrad").require()
    before, after, _ = _rewritten(model, x)
    assert _products(before) - _products(after) == 4


def test_few_steps_are_left_alone() -> None:
    _, _, step = _rewritten(Tied(3), torch.randn(3, 5))
    assert dict(step.stats.skipped) == {"fewer steps than min_terms": 2}
    assert step.stats.rewritten == 0


def test_a_rewrite_that_is_held_back() -> None:
    _, _, step = _rewritten(Tied(5), torch.randn(3, 5), Gate(allowed=()))
    assert dict(step.stats.skipped) == {HELD_BACK: 2}


def test_all_laws() -> None:
    check_pass("hoist-recurrent-wgrad", Unrolled(nn.RNNCell), (torch.randn(2, 5, 5),))


def test_options() -> None:
    text = "hoist-recurrent-wgrad{min_terms=8}"
    assert str(Pipeline.parse(text)) == text
    with pytest.raises(OptionError, match="min_terms must be at least 2, got 1"):
        HoistRecurrentWgrad(min_terms=1)
