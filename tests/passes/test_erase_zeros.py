"""The pass `erase-zeros`, and `gtrans.restructure`, which runs passes on parameters."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans
from gtrans.errors import CaptureError, ModelError, OptionError
from gtrans.ir.program import export_program
from gtrans.pipeline import Pipeline


class Perceptron(nn.Module):
    """Two layers with functional calls; the activation maps zero to `activation(0)`."""

    def __init__(self, activation: str = "gelu") -> None:
        super().__init__()
        self.inner = nn.Linear(6, 10)
        self.outer = nn.Linear(10, 3)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = getattr(F, self.activation)(self.inner(x))
        return F.linear(hidden, self.outer.weight, self.outer.bias)


def with_zero_units(model: Perceptron) -> Perceptron:
    with torch.no_grad():
        model.inner.weight[[1, 4, 7]] = 0
        model.inner.bias[[1, 4, 7]] = 0
    return model


def test_zero_units_of_a_perceptron_go_and_nothing_else_changes() -> None:
    model, x = with_zero_units(Perceptron()).double(), torch.randn(5, 6, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    smaller = gtrans.restructure(model, x, passes="erase-zeros")
    kept = [0, 2, 3, 5, 6, 8, 9]
    state = smaller.state_dict()
    assert torch.equal(state["inner.weight"], model.inner.weight[kept])
    assert torch.equal(state["inner.bias"], model.inner.bias[kept])
    assert torch.equal(state["outer.weight"], model.outer.weight[:, kept])
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-12, atol=1e-14)
    for loss in (smaller(x).square().sum(), model(x).square().sum()):
        loss.backward()
    found = dict(smaller.named_parameters())["outer.weight"].grad
    assert model.outer.weight.grad is not None
    torch.testing.assert_close(found, model.outer.weight.grad[:, kept], rtol=1e-12, atol=1e-14)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    (step,) = smaller.meta["steps"]
    assert step.stats.notes == ["inner.weight[0]: 3 of 10 indices erased"]


def test_zeros_that_an_activation_makes_something_of_stay() -> None:
    model, x = with_zero_units(Perceptron("sigmoid")), torch.randn(5, 6)
    program = export_program(model, (x,), {})
    after, (step,) = Pipeline.parse("erase-zeros").run(program)
    assert after is not program
    assert (step.stats.matched, step.stats.rewritten) == (1, 0)
    (reason,) = step.stats.skipped
    assert reason.startswith("zeros would not vanish: linear (test_erase_zeros.py")


def test_nothing_to_erase_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gtrans"):
        gtrans.restructure(Perceptron(), torch.randn(5, 6), passes="erase-zeros")
    assert caplog.messages == [
        "Perceptron is restructured in nothing (erase-zeros: matched 1, rewrote 0; skipped 1: no "
        "index of it is zero in everything that produces it)"
    ]


def test_the_result_shares_no_memory_and_trains_under_optimize() -> None:
    model, x = with_zero_units(Perceptron()), torch.randn(5, 6)
    smaller = gtrans.restructure(model, x, passes="erase-zeros")
    addresses = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in addresses for p in smaller.parameters())
    expected = smaller(x)
    optimized = gtrans.optimize(smaller, backend="eager")
    torch.testing.assert_close(optimized(x), expected)
    optimized(x).sum().backward()
    assert all(p.grad is not None for p in optimized.parameters())


def test_a_pass_on_parameters_cannot_be_part_of_a_step() -> None:
    with pytest.raises(OptionError, match=r"'erase-zeros' changes which parameters.*restructure"):
        gtrans.optimize(Perceptron(), passes="erase-zeros,plan")
    with pytest.raises(OptionError, match=r"cannot be part of a compiled step"):
        gtrans.explain(Perceptron(), torch.randn(5, 6), passes="erase-zeros")


def test_a_pass_on_the_step_cannot_restructure() -> None:
    with pytest.raises(OptionError, match=r"'relu-mask' rewrites the training step.*optimize"):
        gtrans.restructure(Perceptron(), torch.randn(5, 6), passes="relu-mask")


def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(CaptureError, match="cannot be captured as one graph"):
        gtrans.restructure(Branching(), torch.randn(3), passes="erase-zeros")
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, got function"):
        gtrans.restructure(with_zero_units, torch.randn(3), passes="")  # type: ignore[arg-type]
