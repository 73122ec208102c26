"""Equilibria, differential equations and stepwise training: each at its exact point."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtrans.errors import ModelError, OptionError
from gtrans.runtime.equilibrium import equilibrium
from gtrans.runtime.ode import integrate
from gtrans.runtime.stepwise import train_stepwise

FEW = settings(max_examples=10, deadline=None, derandomize=True)


class Contraction(nn.Module):
    """z to tanh(W z + x) with |W| given."""

    def __init__(self, width: int, norm: float) -> None:
        super().__init__()
        weight = torch.randn(width, width, dtype=torch.float64)
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ self.weight + x)


def _equilibrium_gradients(f: Contraction, x: torch.Tensor, **options: Any) -> torch.Tensor:
    z = equilibrium(
        lambda z: f(z, x), torch.zeros_like(x), tolerance=1e-13, max_steps=2000, **options
    )
    found = torch.autograd.grad(z.square().sum(), [f.weight, x])
    return torch.cat([g.flatten() for g in found])


def _dense_gradients(f: Contraction, x: torch.Tensor) -> torch.Tensor:
    """By solving the linear equation of every row with a dense matrix."""
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(3000):
            z = f(z, x)
        slope = 1 - z * z
        u = torch.stack([
            torch.linalg.solve(torch.eye(z.shape[1]) - f.weight * s, 2 * r)
            for s, r in zip(slope, z, strict=True)
        ])  # fmt: skip
        return torch.cat([(z.t() @ (u * slope)).flatten(), (u * slope).flatten()])


@FEW
@given(st.sampled_from((0.3, 0.7, 0.95)), st.integers(1, 5))
def test_the_implicit_gradient_is_the_dense_one_and_terms_converge_to_it(
    norm: float, width: int
) -> None:
    torch.manual_seed(width)
    torch.set_default_dtype(torch.float64)
    try:
        f = Contraction(width, norm)
        x = torch.randn(3, width, requires_grad=True)
        exact = _dense_gradients(f, x)
    finally:
        torch.set_default_dtype(torch.float32)

    def error(**options: Any) -> float:
        return float((_equilibrium_gradients(f, x, **options) - exact).norm() / exact.norm())

    assert error(backward="implicit") < 1e-10
    assert error(backward="neumann", terms=1000) < 1e-10
    jfb = error(backward="jfb")
    assert error(backward="neumann", terms=0) == pytest.approx(jfb, abs=1e-12)
    for k in (1, 2, 6):
        assert error(backward="neumann", terms=k) <= 10 * norm ** (k + 1) / (1 - norm) + 1e-10
        unrolled = _equilibrium_gradients(f, x, backward="phantom", terms=k)
        summed = _equilibrium_gradients(f, x, backward="neumann", terms=k - 1)
        torch.testing.assert_close(unrolled, summed, rtol=1e-8, atol=1e-10)
    assert error(backward="phantom", terms=400, damping=0.5) < 1e-8


def test_what_does_not_settle_says_so() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ModelError, match="the fixed point has not settled: after 20 steps"):
        equilibrium(lambda z: 2 * z + x, torch.ones(3), max_steps=20)
    with pytest.raises(OptionError, match="backward must be one of implicit, neumann"):
        equilibrium(lambda z: z, torch.ones(3), backward="exact")  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(equilibrium(lambda z: z / 2, torch.zeros(3)), torch.zeros(3))


class Field(nn.Module):
    """A small vector field that depends on time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).double()

    def forward(self, t: Any, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(y) * (1 + 0.1 * t)
        return out


def _loop(f: Field, y: torch.Tensor, times: torch.Tensor, *, reversible: bool) -> torch.Tensor:
    moments = times.tolist()
    z, v = y, f(moments[0], y)
    for t, after in pairwise(moments):
        h = after - t
        if reversible:
            z = 2 * y - z + h * v
            slope = f(after, z)
            y, v = y + h / 2 * (v + slope), slope
        else:
            a = f(t, y)
            y = y + h / 2 * (a + f(after, y + h * a))
    return y


def _all(out: torch.Tensor, y: torch.Tensor, f: nn.Module) -> torch.Tensor:
    found = torch.autograd.grad(out.square().sum(), [y, *f.parameters()])
    return torch.cat([g.flatten() for g in found])


@FEW
@given(st.integers(1, 40), st.integers(1, 4), st.booleans())
def test_exact_adjoints_are_autograd_through_the_solver(
    steps: int, width: int, backwards: bool
) -> None:
    torch.manual_seed(steps)
    f, times = Field(width), torch.linspace(0, 2, steps + 1, dtype=torch.float64)
    times = times.flip(0) if backwards else times
    y = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    for adjoint, reversible in (("checkpoint", False), ("reversible-heun", True)):
        expected = _loop(f, y, times, reversible=reversible)
        found = integrate(f, y, times, adjoint=adjoint)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(_all(found, y, f), _all(expected, y, f), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_backsolve_is_as_near_as_its_solver(solver: str, order: int) -> None:
    torch.manual_seed(0)
    f = Field(3)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def error(steps: int) -> float:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        exact = _all(integrate(f, y, times, solver=solver), y, f)
        found = _all(integrate(f, y, times, solver=solver, adjoint="backsolve"), y, f)
        return float((found - exact).norm() / exact.norm())

    assert error(16) / error(32) > 0.7 * 2**order
    assert error(32) > 1e-13


def test_unknown_adjoints_and_solvers_are_refused() -> None:
    y, times = torch.zeros(1, 2).double(), torch.zeros(2)
    with pytest.raises(OptionError, match="unknown adjoint 'checkpoints'; did you mean"):
        integrate(Field(2), y, times, adjoint="checkpoints")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown solver 'rk5'; did you mean 'rk4'"):
        integrate(Field(2), y, times, solver="rk5")


class Spikes(torch.autograd.Function):
    """A step with the slope of a triangle."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        (u,) = ctx.saved_tensors
        return given[0] * (1 - u.abs()).clamp(min=0)


class Leaky(nn.Module):
    """A layer of leaky integrate-and-fire neurons."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.inner, self.leak = nn.Linear(3, 5).double(), leak

    def forward(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u = self.leak * u + self.inner(x)
        s: torch.Tensor = Spikes.apply(u - 1.0)  # type: ignore[no-untyped-call]
        return s + u, u - s


def _through_time(model: Leaky, xs: torch.Tensor, *, detach: bool) -> torch.Tensor:
    u, total = torch.zeros(2, 5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in xs:
        out, u = model(x, u.detach() if detach else u)
        total = total + out.square().sum()
    found = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def _stepwise(model: Leaky, xs: torch.Tensor, **options: Any) -> torch.Tensor:
    model.zero_grad()
    start = torch.zeros(2, 5, dtype=torch.float64)
    train_stepwise(model, list(xs), start, lambda out, t: out.square().sum(), **options)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@FEW
@given(st.sampled_from((0.0, 0.5, 0.9)), st.integers(1, 6))
def test_stepwise_is_the_detached_graph_and_exact_without_a_carry(leak: float, steps: int) -> None:
    torch.manual_seed(steps)
    model, xs = Leaky(leak), torch.randn(steps, 2, 3, dtype=torch.float64) * 2
    found = _stepwise(model, xs)
    torch.testing.assert_close(found, _through_time(model, xs, detach=True), rtol=1e-12, atol=1e-12)
    if steps == 1:
        exact = _through_time(model, xs, detach=False)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_some_steps_are_right_on_average() -> None:
    torch.manual_seed(0)
    model, xs = Leaky(0.5), torch.randn(6, 2, 3, dtype=torch.float64)
    expected = _through_time(model, xs, detach=True)
    generator = torch.Generator().manual_seed(0)
    draws = [_stepwise(model, xs, steps=2, generator=generator) for _ in range(400)]
    mean = torch.stack(draws).mean(0)
    assert float((mean - expected).norm() / expected.norm()) < 0.1
    with pytest.raises(OptionError, match="steps must be between 1 and 6, got 7"):
        _stepwise(model, xs, steps=7)
