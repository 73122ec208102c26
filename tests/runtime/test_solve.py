"""Scan and solvers against loops: exact at their knobs, an exact prefix before that."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtrans.errors import OptionError
from gtrans.runtime.scan import Carry, affine_scan, apply_carry
from gtrans.runtime.solve import Evaluate, solve_backward, solve_forward

FEW = settings(max_examples=25, deadline=None, derandomize=True)
STEPS = st.integers(1, 17)
KINDS = st.sampled_from(("zero", "one", "number", "diagonal", "matrix"))


def _carry(kind: str, steps: int, width: int, scale: float = 0.7) -> Carry:
    if kind == "diagonal":
        return scale * torch.randn(steps, 2, width, dtype=torch.float64)
    if kind == "matrix":
        return scale / math.sqrt(width) * torch.randn(steps, 2, width, width, dtype=torch.float64)
    return {"zero": 0.0, "one": 1.0, "number": scale}[kind]


def _at(carry: Carry, step: int) -> Carry:
    return carry[step] if isinstance(carry, torch.Tensor) else carry


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / (1 + b.abs().max()))


@FEW
@given(KINDS, STEPS, st.integers(1, 4), st.booleans(), st.booleans())
def test_a_scan_is_the_loop(kind: str, steps: int, width: int, reverse: bool, start: bool) -> None:
    torch.manual_seed(steps)
    carry, drive = _carry(kind, steps, width), torch.randn(steps, 2, width, dtype=torch.float64)
    h = torch.randn(2, width, dtype=torch.float64)
    found = affine_scan(carry, drive, h if start else None, reverse=reverse)
    h = h if start else torch.zeros_like(h)
    for t in reversed(range(steps)) if reverse else range(steps):
        h = apply_carry(_at(carry, t), h) + drive[t]
        assert _error(found[t], h) < 1e-10


def test_a_scan_of_no_steps() -> None:
    empty = torch.zeros(0, 3)
    assert affine_scan(0.5, empty, torch.ones(3)).shape == (0, 3)


def _chain(steps: int, width: int, gain: float) -> tuple[Evaluate, torch.Tensor]:
    """h[t] = tanh(W h[t-1] + x[t]) and its states one by one."""
    weight = gain / math.sqrt(width) * torch.randn(width, width, dtype=torch.float64)
    x = torch.randn(steps, 2, width, dtype=torch.float64)

    def evaluate(states: torch.Tensor, part: slice) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        # One product per step, so that a batch of steps rounds as each step alone does.
        return torch.stack(
            [torch.tanh(h @ weight + i) for h, i in zip(before[part], x[part], strict=True)]
        )

    states = torch.zeros_like(x)
    for t in range(steps):
        states[t : t + 1] = evaluate(states, slice(t, t + 1))
    return evaluate, states


@FEW
@given(KINDS, STEPS, st.integers(1, 4), st.sampled_from((0.5, 3.0)), st.data())
def test_any_carry_is_exact_after_as_many_sweeps_as_steps(
    kind: str, steps: int, width: int, gain: float, data: st.DataObject
) -> None:
    torch.manual_seed(steps)
    evaluate, exact = _chain(steps, width, gain)
    carry = _carry(kind, steps, width)
    window = data.draw(st.none() | st.integers(1, 6))
    guess = torch.randn_like(exact)
    found = solve_forward(evaluate, guess, carry=carry, window=window)
    assert _error(found.states, exact) < 1e-10
    assert found.sweeps <= steps
    assert not found.fell_back
    # After m sweeps the first m states are exact, whatever the others are.
    sweeps = data.draw(st.integers(1, steps))
    seen: list[torch.Tensor] = []

    def watched(states: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append(states.clone())
        return evaluate(states, part)

    solve_forward(watched, guess, carry=carry)
    if len(seen) > sweeps:
        assert _error(seen[sweeps][:sweeps], exact[:sweeps]) < 1e-10


@FEW
@given(STEPS, st.integers(2, 5))
def test_blocks_are_exact_after_as_many_sweeps_as_blocks(steps: int, block: int) -> None:
    torch.manual_seed(steps)
    evaluate, exact = _chain(steps, 3, 2.0)
    found = solve_forward(evaluate, torch.zeros_like(exact), block=block)
    assert torch.equal(found.states, exact)
    limit = -(-steps // block)
    again = solve_forward(evaluate, torch.zeros_like(exact), block=block, max_sweeps=limit)
    assert not again.fell_back


def test_sweeps_end_early_where_states_settle_and_fall_back_where_they_do_not() -> None:
    torch.manual_seed(0)
    evaluate, exact = _chain(40, 4, 0.3)
    found = solve_forward(evaluate, torch.zeros_like(exact), tolerance=1e-8)
    assert found.sweeps < 20
    assert found.residual < 1e-7
    assert _error(found.states, exact) < 1e-6
    evaluate, exact = _chain(40, 4, 8.0)  # chaotic
    found = solve_forward(evaluate, torch.zeros_like(exact), max_sweeps=5)
    assert found.fell_back
    assert torch.equal(found.states, exact)


def test_a_carry_that_overflows_gives_no_nan() -> None:
    torch.manual_seed(0)
    evaluate, exact = _chain(30, 3, 2.0)
    found = solve_forward(evaluate, torch.zeros_like(exact), carry=1e200)
    assert torch.equal(found.states, exact)


def test_whole_numbers_are_solved_to_the_last_one() -> None:
    def evaluate(states: torch.Tensor, part: slice) -> torch.Tensor:
        before = torch.cat([torch.ones_like(states[:1]), states[:-1]])
        return (before[part] * 5 + 3) % 17

    exact = torch.zeros(12, dtype=torch.long)
    for t in range(12):
        exact[t : t + 1] = evaluate(exact, slice(t, t + 1))
    for window in (None, 1, 4):
        found = solve_forward(evaluate, torch.zeros_like(exact), window=window)
        assert torch.equal(found.states, exact)


@FEW
@given(STEPS, st.integers(1, 4), KINDS, st.sampled_from((0.3, 3.0)))
def test_any_split_is_exact_after_as_many_sweeps_as_links(
    steps: int, width: int, kind: str, gain: float
) -> None:
    torch.manual_seed(steps)
    jacobian, pull, exact, drive = _linear(steps, width, gain)
    keep = _carry(kind, steps, width)

    def rest(w: torch.Tensor, part: slice) -> torch.Tensor:
        k = keep[part] if isinstance(keep, torch.Tensor) else keep
        return pull(w, part) - apply_carry(k, w)

    for sweeps in (None, steps - 1, steps):
        found = solve_backward(rest, drive, keep=keep, sweeps=sweeps).states
        assert _error(found, exact) < 1e-10
    for sweeps in range(steps):  # what is at most so many links from the end is exact
        found = solve_backward(rest, drive, keep=keep, sweeps=sweeps).states
        assert _error(found[steps - 1 - sweeps :], exact[steps - 1 - sweeps :]) < 1e-10
    scanned = solve_backward(_nothing, drive, keep=jacobian, sweeps=0).states
    assert _error(scanned, exact) < 1e-10


@FEW
@given(st.integers(2, 12), st.integers(0, 5))
def test_sweeps_are_linear_in_the_drive(steps: int, sweeps: int) -> None:
    torch.manual_seed(steps)
    _, pull, _, drive = _linear(steps, 3, 0.8)
    other = torch.randn_like(drive)

    def solve(e: torch.Tensor) -> torch.Tensor:
        return solve_backward(pull, e, keep=0.5, sweeps=sweeps).states

    assert _error(solve(drive - 2 * other), solve(drive) - 2 * solve(other)) < 1e-12


def test_the_result_comes_with_that_of_one_sweep_less() -> None:
    torch.manual_seed(0)
    _, pull, _, drive = _linear(9, 3, 0.4)
    found = solve_backward(pull, drive, sweeps=3).before
    assert found is not None
    assert torch.equal(found, solve_backward(pull, drive, sweeps=2).states)
    assert solve_backward(pull, drive, sweeps=0).before is None


def _linear(
    steps: int, width: int, gain: float
) -> tuple[torch.Tensor, Callable[[torch.Tensor, slice], torch.Tensor], torch.Tensor, torch.Tensor]:
    """Transposed Jacobians, the product with them, exact cotangents and what drives them."""
    jacobian = gain / math.sqrt(width) * torch.randn(steps, 2, width, width, dtype=torch.float64)
    drive = torch.randn(steps, 2, width, dtype=torch.float64)
    exact = drive.clone()
    for t in range(steps - 1, 0, -1):
        exact[t - 1] += apply_carry(jacobian[t], exact[t])

    def pull(w: torch.Tensor, part: slice) -> torch.Tensor:
        return apply_carry(jacobian[part], w)

    return jacobian, pull, exact, drive


def _nothing(w: torch.Tensor, part: slice) -> torch.Tensor:
    return torch.zeros_like(w)


def test_numbers_out_of_range_are_refused() -> None:
    evaluate, exact = _chain(3, 2, 1.0)
    with pytest.raises(OptionError, match="tolerance must not be negative; block, window and"):
        solve_forward(evaluate, exact, tolerance=-1.0)
    with pytest.raises(OptionError, match="blocks are swept without carry and window"):
        solve_forward(evaluate, exact, block=2, carry=1.0)
    with pytest.raises(OptionError, match="sweeps must be at least 0, got -1"):
        solve_backward(_nothing, exact, sweeps=-1)
