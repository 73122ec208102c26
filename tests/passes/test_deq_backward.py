"""The gradient of a loop that settles: exact at its length, and near the fixed point's before."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gtrans
from gtrans.errors import OptionError
from gtrans.pipeline import Pipeline
from gtrans.runtime.watch import forget


class Equilibrium(nn.Module):
    """z = tanh(W z + x), iterated; `keep` steps from the end are differentiated."""

    def __init__(self, steps: int, scale: float = 0.3, keep: int | None = None) -> None:
        super().__init__()
        self.inner, self.first, self.last = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        nn.init.orthogonal_(self.inner.weight, gain=scale)
        self.steps, self.keep = steps, keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.first(x)
        z = torch.zeros_like(u)
        for t in range(self.steps):
            if self.keep is not None and self.steps - t == self.keep:
                z = z.detach()
            z = torch.tanh(self.inner(z) + u)
        out: torch.Tensor = self.last(z)
        return out


def _step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    out = model(x)
    out.sin().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _rewritten(model: nn.Module, x: torch.Tensor, passes: str) -> list[torch.Tensor]:
    torch.compiler.reset()
    return _step(gtrans.optimize(copy.deepcopy(model), passes=passes, backend="eager"), x)


@settings(max_examples=6)
@given(steps=st.integers(4, 8), terms=st.integers(0, 8))
def test_it_is_differentiating_the_last_steps(steps: int, terms: int) -> None:
    torch.manual_seed(0)
    model, x = Equilibrium(steps).double(), torch.randn(2, 3, dtype=torch.float64)
    by_hand = copy.deepcopy(model)
    by_hand.keep = terms + 1
    expected = _step(by_hand, x)
    found = _rewritten(model, x, f"deq-backward{{terms={terms}}}")
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_error_falls_with_the_terms() -> None:
    torch.manual_seed(0)
    model, x = Equilibrium(24).double(), torch.randn(2, 3, dtype=torch.float64)
    exact = _step(copy.deepcopy(model), x)
    errors = []
    for terms in (0, 2, 6):
        found = _rewritten(model, x, f"deq-backward{{terms={terms}}}")
        pairs = zip(found, exact, strict=True)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert errors[0] > 0.01
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.02 * errors[1]


def test_a_loop_that_has_not_settled_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    forget()
    x = torch.randn(2, 3)
    with caplog.at_level(logging.WARNING, "gtrans"):
        _rewritten(Equilibrium(6, scale=3.0), x, "deq-backward{terms=1}")
    assert "has not settled" in caplog.text
    caplog.clear()
    forget()
    with caplog.at_level(logging.WARNING, "gtrans"):
        _rewritten(Equilibrium(12), x, "deq-backward{terms=1}")
    assert "has not settled" not in caplog.text


def test_other_loops_stay_and_say_why() -> None:
    def report(model: nn.Module, x: torch.Tensor) -> str:
        torch.compiler.reset()
        return str(gtrans.explain(model, x, passes="deq-backward"))

    class Driven(Equilibrium):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = torch.zeros_like(self.first(x[0]))
            for u in x.unbind(0):
                z = torch.tanh(self.inner(z) + self.first(u))
            return z

    class Seen(Equilibrium):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            u = self.first(x)
            z, total = torch.zeros_like(u), []
            for _ in range(self.steps):
                z = torch.tanh(self.inner(z) + u)
                total.append(self.last(z))
            return torch.stack(total)

    x = torch.randn(2, 3)
    driven = report(Driven(9), torch.randn(9, 2, 3))
    assert "its steps read something new each time, so it settles nowhere" in driven
    assert "a state on the way is read as well" in report(Seen(9), x)
    assert "no more steps than terms" in report(Equilibrium(5), x)


@pytest.mark.parametrize("option", ["terms=-1", "min_steps=0"])
def test_options_out_of_range_are_refused(option: str) -> None:
    name = option.split("=")[0]
    with pytest.raises(OptionError, match=f"deq-backward: {name} must be at least"):
        Pipeline.parse(f"deq-backward{{{option}}}")
