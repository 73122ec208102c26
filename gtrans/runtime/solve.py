"""Two solvers for chains: states that follow one another, and cotangents that run back.

Forward, h[t] = f[t](h[0 .. t-1]), nonlinear. Given a guess H of all states, f is evaluated at all
of them at once, and the change is carried on through any A[t]:

    D[t] = f[t](H) - H[t] + A[t] D[t-1],   H'[t] = f[t](H) + A[t] D[t-1]

The solution is a fixed point whatever A is, and each sweep makes at least one state more exact, so
as many sweeps as states always are. A = 0 is Jacobi's iteration, A = 1 Picard's, the Jacobian of f
Newton's (DEER, DeepPCR), its diagonal a quasi-Newton one.

Backward, w[t] = e[t] + (J[t+1] + K[t+1])^T w[t+1], linear:

    w0 = S(e),   w(k+1) = w0 + S(v)   with   v[t] = J[t+1]^T wk[t+1]   and
    S(a)[t] = a[t] + K[t+1]^T S(a)[t+1]

for any split of the Jacobian with a K that is cheap to carry. Structural K is Highway-BP, K = 0
the plain fixed point, all of the Jacobian in K and no sweep the exact scan, a constant K and no J
stationary feedback, K = 0 and no sweep the truncation to one step.

Sources: Song et al., ICML 2021, arXiv:2002.03629 (Jacobi, Gauss-Seidel and their mixtures); Lim et
al., ICLR 2024, arXiv:2309.12252 (Newton by scans); Gonzalez et al., NeurIPS 2024, arXiv:2407.19115
(diagonal A); Fagnou et al., ICLR 2025, arXiv:2501.17086 (backward, theorem 2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gtrans.errors import OptionError
from gtrans.runtime.scan import Carry, Scan, affine_scan, apply_carry

Evaluate = Callable[[torch.Tensor, slice], torch.Tensor]
"""From all states [T, *s] and a slice of steps to the new states of those steps. The new state of
a step may read the states before it only."""

CarryOf = Callable[[torch.Tensor, slice], Carry]
"""The A of the steps in a slice, at some states."""


@dataclass(frozen=True)
class Solution:
    """States of a chain.

    Attributes:
        states: [T, *s].
        sweeps: evaluations in a row that it took; sequential evaluation takes T.
        residual: largest |f(H) - H| of the last sweep over the steps that were not exact yet.
        fell_back: whether the sweeps did not suffice, and the rest was evaluated step by step.
    """

    states: torch.Tensor
    sweeps: int
    residual: float
    fell_back: bool = False


def solve_forward(
    evaluate: Evaluate,
    guess: torch.Tensor,
    *,
    carry: Carry | CarryOf = 0.0,
    tolerance: float = 0.0,
    max_sweeps: int | None = None,
    window: int | None = None,
    block: int = 1,
) -> Solution:
    """The states of a chain, many at a time.

    Steps count as solved from the front, as far as a sweep changes none of them; they are not
    evaluated again. With no tolerance the states are those of sequential evaluation, up to the
    rounding of f on a batch of steps.

    Args:
        evaluate: the chain.
        guess: [T, *s], of any dtype; whole numbers (tokens) need `carry=0` and no tolerance.
        carry: A; a number, a tensor for all steps, or a function of states and a slice.
        tolerance: a state counts as unchanged below `tolerance * (1 + |h|)`, element by element.
        max_sweeps: after that many, the steps that are left are evaluated one by one.
        window: steps of one sweep, counted from the first unsolved one; all by default. Steps far
            ahead are not worth the work as long as those before them change. 1 is sequential
            evaluation.
        block: sweep over blocks of so many steps, all blocks at once and each step by step
            (Jacobi outside, Gauss-Seidel inside).

    Raises:
        OptionError: a number is out of range, or blocks come with a carry or a window.
    """
    steps = len(guess)
    if tolerance < 0 or block < 1 or (window or 1) < 1 or (max_sweeps or 1) < 1:
        raise OptionError(
            "tolerance must not be negative; block, window and max_sweeps must be at least 1"
        )
    plain = isinstance(carry, float | int) and carry == 0
    if block > 1 and (window is not None or not plain):
        raise OptionError("blocks are swept without carry and window: give one of the three")
    states, solved, sweeps, residual = guess.clone(), 0, 0, 0.0
    for _ in range(steps if max_sweeps is None else max_sweeps):
        if solved == steps:
            break
        if block > 1:
            new = _block_sweep(evaluate, states, solved, block)
            residual = _largest(new - states[solved:])
            sweeps += min(block, steps - solved)
        else:
            part = slice(solved, steps if window is None else min(steps, solved + window))
            new, residual = _sweep(evaluate, carry, states, part)
            sweeps += 1
        stop = solved + len(new)
        unchanged = _leading_unchanged(states[solved:stop], new, tolerance)
        states[solved:stop] = new
        solved = min(stop, solved + (unchanged // block + 1) * block)
    for step in range(solved, steps):
        states[step : step + 1] = evaluate(states, slice(step, step + 1))
    return Solution(states, sweeps + steps - solved, residual, solved < steps)


def _sweep(
    evaluate: Evaluate, carry: Carry | CarryOf, states: torch.Tensor, part: slice
) -> tuple[torch.Tensor, float]:
    """New states of one sweep, and its residual."""
    new = evaluate(states, part)
    change = new - states[part]
    residual = _largest(change)
    a = carry(states, part) if callable(carry) else carry
    if not callable(carry) and isinstance(a, torch.Tensor):
        a = a[part]
    if isinstance(a, float | int) and a == 0:
        return new, residual
    carried = affine_scan(a, change)[:-1]
    found = torch.cat([new[:1], new[1:] + apply_carry(_behind(a), carried)])
    # Far from the solution the carry may overflow; then the plain step is what is left.
    return torch.where(found.isfinite(), found, new), residual


def _behind(carry: Carry) -> Carry:
    """A carry without its first step."""
    return carry[1:] if isinstance(carry, torch.Tensor) else carry


def _block_sweep(evaluate: Evaluate, states: torch.Tensor, solved: int, block: int) -> torch.Tensor:
    """One sweep over the blocks behind the solved ones; `states` stays as it is."""
    new = states.clone()
    for inner in range(min(block, len(states) - solved)):
        part = slice(solved + inner, len(states), block)
        new[part] = evaluate(new, part)
    return new[solved:]


def _largest(change: torch.Tensor) -> float:
    return float(change.abs().max()) if change.numel() else 0.0


def _leading_unchanged(old: torch.Tensor, new: torch.Tensor, tolerance: float) -> int:
    close = tolerance * (1 + new.abs()) if tolerance > 0 else 0
    same = (new - old).abs() <= close
    steps = same.flatten(1).all(1) if same.dim() > 1 else same
    return int(steps.int().cumprod(0).sum())


Pull = Callable[[torch.Tensor, slice], torch.Tensor]
"""(w[t], t in a slice) to J[t]^T w[t], the cotangents that they send to the steps before."""


def send_nothing(w: torch.Tensor, part: slice) -> torch.Tensor:
    """A pull of zeros: all of the Jacobians is in what is kept."""
    return torch.zeros_like(w)


@dataclass(frozen=True)
class Cotangents:
    """Cotangents of the states of a chain.

    Attributes:
        states: w, [T, *s].
        before: those of one sweep less; None without a sweep.
    """

    states: torch.Tensor
    before: torch.Tensor | None = None


def solve_backward(
    pull: Pull, drive: torch.Tensor, *, keep: Carry = 0.0, sweeps: int | None = None
) -> Cotangents:
    """The cotangents of all states of a chain.

    Args:
        pull: the part of the Jacobians that is not in `keep`.
        drive: e, the cotangents that states get from outside the chain, [T, *s].
        keep: K^T of every step, so that it maps w[t] to a cotangent of step t - 1: a number, or
            a tensor with one diagonal or matrix for each of the T steps.
        sweeps: how many; T - 1 give the exact cotangents, and None gives them step by step.

    Raises:
        OptionError: a negative number of sweeps.
    """
    if sweeps is not None and sweeps < 0:
        raise OptionError(f"sweeps must be at least 0, got {sweeps}")
    steps, behind = len(drive), _behind(keep)
    if sweeps is None:
        return Cotangents(_step_by_step(pull, drive, behind))
    spread = _spread_along(keep, drive)
    first = w = spread(drive)
    last = None
    for _ in range(min(sweeps, steps - 1)):
        sent = pull(w[1:], slice(1, steps))
        last, w = w, first + spread(torch.cat([sent, torch.zeros_like(sent[:1])]))
    return Cotangents(w, last)


def _spread_along(keep: Carry, drive: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """S: from a to what is carried back from every step to all before it."""
    if not isinstance(keep, torch.Tensor):
        return partial(_by_number, keep)
    matrices = keep.dim() > drive.dim()
    # The value at step t comes by the carry of step t + 1, that at the last step from nowhere.
    carry = (keep if matrices else keep.expand_as(drive)).roll(-1, 0)
    return Scan(carry, matrices=matrices, reverse=True)


def _by_number(keep: float, a: torch.Tensor) -> torch.Tensor:
    return affine_scan(keep, a, reverse=True)


def _step_by_step(pull: Pull, drive: torch.Tensor, behind: Carry) -> torch.Tensor:
    w = [drive[-1:]]
    for step in range(len(drive) - 1, 0, -1):
        kept = behind[step - 1 : step] if isinstance(behind, torch.Tensor) else behind
        sent = apply_carry(kept, w[-1]) + pull(w[-1], slice(step, step + 1))
        w.append(drive[step - 1 : step] + sent)
    return torch.cat(w[::-1])
