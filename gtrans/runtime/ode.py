"""Neural differential equations: dy/dt = f(t, y), and three ways to the gradient of its solution.

    checkpoint        only the states between steps are kept, each step runs once more: the exact
                      gradient of the numbers that the solver computed
    reversible-heun   nothing is kept but the end: each step is inverted by algebra; exact up to
                      rounding (Kidger et al., NeurIPS 2021, arXiv:2105.13493)
    backsolve         nothing is kept; the adjoint equation is solved backwards in time along with y
                      (Chen et al., NeurIPS 2018, arXiv:1806.07366): the error of its own steps
                      remains, so the gradient is approximate, and better with smaller steps

Reversible Heun, with state (y, z, v) from (y0, y0, f(t0, y0)):

    z' = 2 y - z + h v,   v' = f(t + h, z'),   y' = y + h/2 (v + v')

Its region of stability is small: not for stiff equations.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from gtrans.errors import OptionError, did_you_mean

Adjoint = Literal["checkpoint", "reversible-heun", "backsolve"]
_State = tuple[torch.Tensor, ...]
_Field = Callable[[Any, torch.Tensor], torch.Tensor]


def _euler(f: _Field, t: float, h: float, y: torch.Tensor) -> torch.Tensor:
    return y + h * f(t, y)


def _heun(f: _Field, t: float, h: float, y: torch.Tensor) -> torch.Tensor:
    v = f(t, y)
    return y + h / 2 * (v + f(t + h, y + h * v))


def _rk4(f: _Field, t: float, h: float, y: torch.Tensor) -> torch.Tensor:
    a = f(t, y)
    b = f(t + h / 2, y + h / 2 * a)
    c = f(t + h / 2, y + h / 2 * b)
    return y + h / 6 * (a + 2 * b + 2 * c + f(t + h, y + h * c))


_SOLVERS = {"euler": _euler, "heun": _heun, "rk4": _rk4}
_ADJOINTS = ("checkpoint", "reversible-heun", "backsolve")


def integrate(
    f: nn.Module,
    y: torch.Tensor,
    times: torch.Tensor,
    *,
    adjoint: Adjoint = "checkpoint",
    solver: str = "heun",
) -> torch.Tensor:
    """The solution at the last of some times.

    Args:
        f: called as f(t, y), from a number and [*s] to [*s].
        y: the state at the first time, [*s].
        times: [n + 1], growing or falling; a step is made between each two.
        adjoint: see the module; "reversible-heun" is its own solver.
        solver: "euler", "heun" or "rk4".

    Raises:
        OptionError: no such adjoint or solver.
    """
    if adjoint not in _ADJOINTS:
        raise OptionError(f"unknown adjoint {adjoint!r}{did_you_mean(adjoint, _ADJOINTS)}")
    if solver not in _SOLVERS:
        raise OptionError(f"unknown solver {solver!r}{did_you_mean(solver, _SOLVERS)}")
    rule = {"checkpoint": _Checkpoint, "reversible-heun": _Reversible, "backsolve": _Backsolve}
    weights = [p for p in f.parameters() if p.requires_grad]
    steps = [(a, b - a) for a, b in pairwise(times.tolist())]
    found: torch.Tensor = rule[adjoint].apply(f, _SOLVERS[solver], steps, y, *weights)
    return found


def _pull(
    function: Callable[..., torch.Tensor | _State],
    inputs: _State,
    weights: _State,
    cotangents: _State,
) -> tuple[_State, _State]:
    """Cotangents of inputs and weights of a function of the inputs."""
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in inputs]
        out = function(*leaves)
        results = out if isinstance(out, tuple) else (out,)
        kept = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
        found = torch.autograd.grad(
            [r for r, _ in kept], [*leaves, *weights], [c for _, c in kept], allow_unused=True
        )
    pairs = zip(found, [*leaves, *weights], strict=True)
    read = [torch.zeros_like(v) if g is None else g for g, v in pairs]
    return tuple(read[: len(leaves)]), tuple(read[len(leaves) :])


def _added(a: _State, b: _State) -> _State:
    return tuple(x + y for x, y in zip(a, b, strict=True))


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Any, solver: Any, steps: Any, y: torch.Tensor, *weights: Any) -> Any:
        ctx.f, ctx.solver, ctx.steps, ctx.weights = f, solver, steps, weights
        states = [y]
        for t, h in steps:
            states.append(solver(f, t, h, states[-1]))
        ctx.save_for_backward(*states[:-1])
        return states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        (w,), sums = given, tuple(torch.zeros_like(p) for p in ctx.weights)
        for (t, h), y in zip(reversed(ctx.steps), reversed(ctx.saved_tensors), strict=True):
            step = _bound(ctx.solver, ctx.f, t, h)
            (w,), more = _pull(step, (y,), ctx.weights, (w,))
            sums = _added(sums, more)
        return None, None, None, w, *sums


def _bound(solver: Any, f: Any, t: float, h: float) -> Callable[..., Any]:
    return lambda *state: solver(f, t, h, *state)


def _reversible_step(
    f: _Field, t: float, h: float, y: torch.Tensor, z: torch.Tensor, v: torch.Tensor
) -> _State:
    after = 2 * y - z + h * v
    slope = f(t + h, after)
    return y + h / 2 * (v + slope), after, slope


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Any, solver: Any, steps: Any, y: torch.Tensor, *weights: Any) -> Any:
        state: _State = (y, y, f(steps[0][0], y)) if steps else (y, y, y)
        for t, h in steps:
            state = _reversible_step(f, t, h, *state)
        ctx.f, ctx.steps, ctx.weights = f, steps, weights
        ctx.save_for_backward(*state)
        return state[0].clone()

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        f, sums = ctx.f, tuple(torch.zeros_like(p) for p in ctx.weights)
        y, z, v = ctx.saved_tensors
        w: _State = (given[0], torch.zeros_like(y), torch.zeros_like(y))
        for t, h in reversed(ctx.steps):
            before = 2 * y - z - h * v  # z of the step before, by its own formula turned round
            slope = f(t, before)
            y, z, v = y - h / 2 * (slope + v), before, slope
            w, more = _pull(_bound(_reversible_step, f, t, h), (y, z, v), ctx.weights, w)
            sums = _added(sums, more)
        total = w[0] + w[1]
        if ctx.steps:
            first = ctx.steps[0][0]
            (into,), more = _pull(lambda y: f(first, y), (y,), ctx.weights, (w[2],))
            total, sums = total + into, _added(sums, more)
        return None, None, None, total, *sums


class _Backsolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Any, solver: Any, steps: Any, y: torch.Tensor, *weights: Any) -> Any:
        for t, h in steps:
            y = solver(f, t, h, y)
        ctx.f, ctx.solver, ctx.steps, ctx.weights = f, solver, steps, weights
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        (y,) = ctx.saved_tensors
        sizes = [t.numel() for t in (y, y, *ctx.weights)]
        state = torch.cat([y.flatten(), given[0].flatten(), y.new_zeros(sum(sizes[2:]))])

        def field(t: float, state: torch.Tensor) -> torch.Tensor:
            now, w = (part.view_as(y) for part in state.split(sizes)[:2])
            (into,), more = _pull(lambda y: ctx.f(t, y), (now,), ctx.weights, (w,))
            with torch.no_grad():
                slope = ctx.f(t, now)
            return torch.cat([slope.flatten(), *(-g.flatten() for g in (into, *more))])

        for t, h in reversed(ctx.steps):
            state = ctx.solver(field, t + h, -h, state)
        _, w, *sums = state.split(sizes)
        shaped = (g.view_as(p) for g, p in zip(sums, ctx.weights, strict=True))
        return None, None, None, w.view_as(y), *shaped
