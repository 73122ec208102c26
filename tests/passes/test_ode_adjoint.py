"""Solvers written as loops: their gradient without their stages, exact, or as it is inverted."""

import copy
import logging

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import gtrans
from gtrans.errors import OptionError
from gtrans.passes.wire.ode_adjoint import OdeAdjoint
from gtrans.pipeline import Pipeline
from gtrans.rewrite.numbers import numbers_as_tensors
from gtrans.runtime.watch import forget
from tests.ir.graphs import forward_of
from tests.passes.stepping import Gradients, step_of, step_of_rewritten


class Solved(nn.Module):
    """dy/dt = f(t, y), in fixed steps.

    Args:
        kind: "euler", "midpoint", "heun" or "rk4".
        steps: T.
        scale: of the last layer of f.
        path: whether all states are read, or the last one only.
    """

    def __init__(
        self, kind: str = "euler", steps: int = 8, scale: float = 1.0, path: bool = False
    ) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.kind, self.steps, self.scale, self.path = kind, steps, scale, path

    def field(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(torch.cat([y, t.expand(len(y), 1)], 1))
        return out * self.scale

    def move(self, t: torch.Tensor, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.kind == "euler":
            return h * self.field(t, y)
        if self.kind == "midpoint":
            return h * self.field(t + h / 2, y + h / 2 * self.field(t, y))
        a = self.field(t, y)
        if self.kind == "heun":
            return h / 2 * (a + self.field(t + h, y + h * a))
        b = self.field(t + h / 2, y + h / 2 * a)
        c = self.field(t + h / 2, y + h / 2 * b)
        return h / 6 * (a + 2 * b + 2 * c + self.field(t + h, y + h * c))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        times = torch.linspace(0, 1, self.steps + 1, dtype=y.dtype)
        states = []
        for i in range(self.steps):
            y = y + self.move(times[i], times[i + 1] - times[i], y)
            states.append(y)
        return torch.stack(states) if self.path else y


def _error(found: Gradients, expected: Gradients) -> float:
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


KINDS = ("euler", "midpoint", "heun", "rk4")


@settings(max_examples=3)
@example(kind="euler", steps=5, path=True)
@given(kind=st.sampled_from(KINDS), steps=st.integers(4, 9), path=st.booleans())
def test_checkpoints_are_exact_and_an_inversion_that_has_settled_is(
    kind: str, steps: int, path: bool
) -> None:
    torch.manual_seed(0)
    model = Solved(kind, steps, path=path).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    expected, gradients = step_of(copy.deepcopy(model), x)
    for passes in ("ode-adjoint", "ode-adjoint{method=backsolve,iterations=60}"):
        out, found = step_of_rewritten(model, x, passes)
        assert torch.equal(out, expected)
        assert _error(found, gradients) < 1e-10


class Scheduled(nn.Module):
    """Steps whose times and sizes are numbers of Python."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.inner, self.steps = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)), steps

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        for i in range(self.steps):
            t, h = i / self.steps, 0.1 + 0.2 * i / self.steps
            y = y + h * (self.inner(y) - t * y) / (1 + t)
        return 2.0 * y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_may_differ_in_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Scheduled(7).to(dtype), torch.randn(2, 3, dtype=dtype)
    expected, gradients = step_of(copy.deepcopy(model), x)
    assert "matched 1, rewrote 1" in str(gtrans.explain(model, x, passes="ode-adjoint"))
    for passes in ("ode-adjoint", "parallel-feedforward{min_steps=2,tolerance=0.0}"):
        out, found = step_of_rewritten(model, x, passes)
        close = 1e-10 if dtype is torch.float64 else 1e-5
        torch.testing.assert_close(out, expected, rtol=close, atol=close)
        assert torch.equal(out, expected) or "parallel" in passes
        assert _error(found, gradients) < close


class Timed(nn.Module):
    """Runge-Kutta steps of order four over a network that reads the time as a channel."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def slope(self, t: float, y: torch.Tensor) -> torch.Tensor:
        if self.how == "full_like":
            times = torch.full_like(y[:, :1], t)
        elif self.how == "by name":
            times = torch.full_like(input=y[:, :1], fill_value=t)
        else:
            times = y.new_full((len(y), 1), t)
        return torch.as_tensor(self.inner(torch.cat([y, times], 1)))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        h = 1 / 6
        for i in range(6):
            t = i * h
            a = self.slope(t, y)
            b = self.slope(t + h / 2, y + h / 2 * a)
            c = self.slope(t + h / 2, y + h / 2 * b)
            y = y + h / 6 * (a + 2 * b + 2 * c + self.slope(t + h, y + h * c))
        return y


@pytest.mark.parametrize("how", ["full_like", "by name", "new_full"])
def test_times_that_tensors_are_filled_with(how: str) -> None:
    torch.manual_seed(0)
    model, x = Timed(how).double(), torch.randn(2, 3, dtype=torch.float64)
    expected, gradients = step_of(copy.deepcopy(model), x)
    for passes in (
        "ode-adjoint{min_steps=2}",
        "ode-adjoint{min_steps=2,method=backsolve,iterations=60}",
        "parallel-feedforward{min_steps=2,tolerance=0.0}",
    ):
        torch.compiler.reset()
        # The stages of a step look like a loop of three, but are none of their own.
        assert "matched 1, rewrote 1" in str(gtrans.explain(model, x, passes=passes))
        out, found = step_of_rewritten(model, x, passes)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        assert _error(found, gradients) < 1e-10


def test_numbers_of_a_loop_that_stays_are_put_back() -> None:
    model, x = Scheduled(7), torch.randn(2, 3)
    graph = forward_of(model, x)
    before = graph.module.code
    with numbers_as_tensors(graph):
        graph.module.recompile()
        assert graph.module.code.count("torch.full") >= 14
    graph.module.recompile()
    assert graph.module.code == before


def test_the_error_of_backsolve_falls_with_its_iterations_and_with_the_step() -> None:
    torch.manual_seed(0)
    model, x = Solved("heun", 8).double(), torch.randn(2, 3, dtype=torch.float64)
    _, exact = step_of(copy.deepcopy(model), x)
    passes = "ode-adjoint{{method=backsolve,iterations={}}}".format
    errors = [_error(step_of_rewritten(model, x, passes(k))[1], exact) for k in (1, 2, 4)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    model.steps = 16
    _, exact = step_of(copy.deepcopy(model), x)
    assert _error(step_of_rewritten(model, x, passes(1))[1], exact) < 0.7 * errors[0]


def test_what_is_kept() -> None:
    x, kept = torch.randn(4, 3), []
    for steps in (6, 12):
        torch.compiler.reset()
        row = []
        for passes in ("plan", "ode-adjoint,plan", "ode-adjoint{method=backsolve},plan"):
            torch.compiler.reset()
            row.append(gtrans.explain(Solved("rk4", steps), x, passes=passes).saved_bytes)
        kept.append(row)
    plain, checkpoint, backsolve = zip(*kept, strict=True)
    assert plain[1] > 1.8 * plain[0] > 4 * checkpoint[1]
    # The times are what each step reads besides: two numbers.
    assert backsolve[1] - backsolve[0] <= 6 * 2 * 4
    assert checkpoint[1] - checkpoint[0] >= 6 * 4 * 3 * 4


def test_a_way_back_that_misses_the_start_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    forget()
    with caplog.at_level(logging.WARNING, "gtrans"):
        model = Solved("euler", 5, scale=20.0)
        step_of_rewritten(model, torch.randn(2, 3), "ode-adjoint{method=backsolve,iterations=1}")
    assert "taken backwards, misses its first state by" in caplog.text


@pytest.mark.parametrize("kind", ["fixed point", "leaky"])
def test_steps_that_do_not_add_can_be_run_again_but_not_taken_backwards(kind: str) -> None:
    class Iterated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = torch.zeros_like(x)
            for step in range(6):
                after, share = torch.tanh(self.inner(z) + x), 1 / (step + 2)
                z = after if kind == "fixed point" else (1 - share) * z + share * after
            return z

    torch.manual_seed(0)
    forget()
    model, x = Iterated().double(), torch.randn(2, 3, dtype=torch.float64)
    found = str(gtrans.explain(model, x, passes="ode-adjoint{method=backsolve}"))
    assert "a step does not add to what it carries; method=checkpoint takes any" in found
    expected, gradients = step_of(copy.deepcopy(model), x)
    out, again = step_of_rewritten(model, x, "ode-adjoint")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert _error(again, gradients) < 1e-10
    assert "matched 1, rewrote 1" in str(gtrans.explain(model, x, passes="ode-adjoint"))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(
        OptionError, match=r"method must be 'checkpoint' or 'backsolve' \(reversible"
    ):
        OdeAdjoint(method="reversible")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"ode-adjoint: iterations must be at least 1"):
        Pipeline.parse("ode-adjoint{iterations=0}")
