"""A recurrent layer as one operator, whose states and whose cotangents are found as one chooses.

    x = input W_ih^T + b_ih                 one product for all times, outside of the operator
    states = recurrence(x, start, U, b)     by a forward method
    backward: all gates again, in one product with the states; cotangents w of the states by a
        backward rule; then dU, db, dx as one product or copy each

The backward is always that of the chain at the states that were found, whatever found them; it
never goes through the sweeps of the forward.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from gtrans.runtime.cells import CELLS, Linearised
from gtrans.runtime.scan import Carry
from gtrans.runtime.solve import Solution, send_nothing, solve_backward, solve_forward
from gtrans.runtime.watch import watch_ratio

METHODS = (
    "gauss-seidel", "jacobi", "jacobi-gs", "gs-jacobi", "picard", "gate", "quasi-newton", "newton",
)  # fmt: skip
RULES = ("loop", "scan", "sweeps", "cut", "feedback", "linspace")


@dataclass
class Recurrence:
    """The forward of one layer in one direction.

    Args:
        kind: a name of `CELLS`.
        x: products with the input, [T, B, g*d].
        start: state before the first step, [B, s*d].
        weight: U, [g*d, d].
        bias: [g*d] or None.
    """

    kind: str
    x: torch.Tensor
    start: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    _last: tuple[torch.Tensor, torch.Tensor] = field(init=False)

    def before(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """The states that the steps of a slice start from."""
        return torch.cat([self.start[None], states[:-1]])[part]

    def evaluate(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """The states after the steps of a slice."""
        before = self.before(states, part)
        after = CELLS[self.kind].advance(self.x[part], before, self.weight, self.bias)
        self._last = before, after
        return after

    def loop(self) -> torch.Tensor:
        """The states one after another, without a chain's bookkeeping."""
        cell = CELLS[self.kind]
        state, states = self.start[None], []
        for x in self.x.split(1):
            state = cell.advance(x, state, self.weight, self.bias)
            states.append(state)
        return torch.cat(states)

    def linearise(self, before: torch.Tensor, after: torch.Tensor, part: slice) -> Linearised:
        """The derivatives of the steps of a slice."""
        cell = CELLS[self.kind]
        return cell.linearise(self.x[part], before, after, self.weight, self.bias)

    def solve(self, method: str, tolerance: float, max_sweeps: int, block: int) -> Solution:
        """The states by a method of `METHODS`.

        Args:
            method: which.
            tolerance: of `solve_forward`.
            max_sweeps: of `solve_forward`; 0 for as many as it takes.
            block: steps of a block of "jacobi-gs" or of the window of "gs-jacobi".
        """
        if method == "gauss-seidel":
            return Solution(self.loop(), len(self.x), 0.0)

        def carry(states: torch.Tensor, part: slice) -> Carry:
            found = self.linearise(*self._last, part)
            if method == "newton":
                return found.matrices().transpose(-1, -2)
            return found.past if method == "gate" else found.diagonal()

        fixed: dict[str, float] = {"jacobi": 0.0, "jacobi-gs": 0.0, "gs-jacobi": 0.0, "picard": 1.0}
        guess = self.start.expand(len(self.x), *self.start.shape)
        return solve_forward(
            self.evaluate,
            guess,
            carry=fixed.get(method, carry),
            tolerance=tolerance,
            max_sweeps=max_sweeps or None,
            window=block if method == "gs-jacobi" else None,
            block=block if method == "jacobi-gs" else 1,
        )


def cotangents(found: Linearised, drive: torch.Tensor, rule: str, count: int) -> torch.Tensor:
    """The cotangents of all states by a rule of `RULES`.

    Args:
        found: the derivatives of the steps.
        drive: the cotangents that states get from outside, [T, B, s*d].
        rule: "loop" (exact, step by step), "scan" (exact, matrices in a logarithmic number of
            steps), "sweeps" (Highway-BP), "cut" (none across every `count`-th step), "feedback"
            and "linspace" (a constant diagonal instead of the Jacobians).
        count: sweeps, or steps between cuts.
    """
    if rule == "scan":
        return solve_backward(send_nothing, drive, keep=found.matrices(), sweeps=0).states
    if rule == "sweeps":

        def pull(w: torch.Tensor, part: slice) -> torch.Tensor:
            return found.at(part).rest(w)

        solved = solve_backward(pull, drive, keep=found.past, sweeps=count)
        watch_ratio(solved.states, solved.before, "a recurrence", count)
        return solved.states
    if rule == "cut":
        return _cut(found, drive, count)
    if rule in ("feedback", "linspace"):
        return solve_backward(send_nothing, drive, keep=_constant(found, rule), sweeps=0).states
    return _loop(found.local, found.product, found.gates, drive)


def _constant(found: Linearised, rule: str) -> torch.Tensor:
    """A diagonal that is the same at all times: the mean of the true ones, or the paper's ramp."""
    if rule == "feedback":
        return found.diagonal().mean((0, 1)).expand_as(found.past)
    width = found.product.shape[-1]
    ramp = torch.linspace(0, 1, width, dtype=found.past.dtype, device=found.past.device)
    return ramp.repeat(found.past.shape[-1] // width).expand_as(found.past)


def _loop(
    local: torch.Tensor, product: torch.Tensor, gates: int, drive: torch.Tensor
) -> torch.Tensor:
    """w[t] = e[t] + J[t+1]^T w[t+1] in as few operators a step as there can be."""
    (steps, batch), (states, width) = drive.shape[:2], local.shape[-3::2]
    drive = drive.contiguous()
    if batch * local[0, 0].numel() * states * width <= _ONE_PRODUCT:
        return _short_loop(local, product, gates, drive)
    split = (steps, batch, states, width)
    result = torch.empty_like(drive)
    result[-1].copy_(drive[-1])
    # All views are made before the loop, and nothing is allocated in it.
    rows, given = result.view(split).unbind(0), drive.view(split).unbind(0)
    wide, outputs = result.view(split).unsqueeze(-2).unbind(0), result[..., -width:].unbind(0)
    products = local.new_empty(local.shape[1:])
    y = products[:, 0] if states == 1 else local.new_empty(batch, gates + states, width)
    deltas, past = y.view(batch, -1)[:, : gates * width], y[:, gates:]
    for t, coefficients in zip(range(steps - 1, 0, -1), reversed(local.unbind(0)), strict=False):
        torch.mul(wide[t], coefficients, out=products)
        if states > 1:
            torch.sum(products, 1, out=y)
        torch.add(given[t - 1], past, out=rows[t - 1])
        outputs[t - 1].addmm_(deltas, product)
    return result


_ONE_PRODUCT = 1 << 16
"""Multiplications of a step up to which a larger product costs less than more calls."""


def _short_loop(
    local: torch.Tensor, product: torch.Tensor, gates: int, drive: torch.Tensor
) -> torch.Tensor:
    """The same for small states: what goes past, and the sum over states, are in the product."""
    steps, batch, states, rows, width = local.shape
    result = torch.empty_like(drive)
    result[-1].copy_(drive[-1])
    # From all rows, of gates and of what goes past, to the states; the same for every state.
    one = product.new_zeros(rows * width, states * width)
    one[: gates * width, -width:] = product
    one[gates * width :].fill_diagonal_(1.0)
    whole = one.repeat(states, 1)
    coefficients, given, next_ = local.unbind(0), drive.unbind(0), result.unbind(0)
    wide = result.view(steps, batch, states, 1, width).unbind(0)
    products = torch.empty_like(coefficients[0])
    flat = products.view(batch, -1)
    for t in range(steps - 1, 0, -1):
        torch.mul(wide[t], coefficients[t], out=products)
        torch.addmm(given[t - 1], flat, whole, out=next_[t - 1])
    return result


def _cut(found: Linearised, drive: torch.Tensor, every: int) -> torch.Tensor:
    """No cotangent crosses from step m * every to the one before; the parts run side by side."""
    steps, batch = drive.shape[:2]
    every = min(every, steps)
    parts = -(-steps // every)

    def fold(a: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([a, a.new_zeros(parts * every - steps, *a.shape[1:])])
        return torch.unflatten(padded, 0, (parts, every)).transpose(0, 1).flatten(1, 2)

    w = _loop(fold(found.local), found.product, found.gates, fold(drive))
    return torch.unflatten(w, 1, (parts, batch)).transpose(0, 1).flatten(0, 1)[:steps]


@torch.library.custom_op("gtrans::recurrence", mutates_args=())
def recurrence(
    x: torch.Tensor,
    start: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    method: str,
    tolerance: float,
    max_sweeps: int,
    block: int,
    rule: str,
    count: int,
) -> torch.Tensor:
    """The states of a recurrent layer, [T, B, s*d]; see `Recurrence` and `cotangents`."""
    layer = Recurrence(kind, x, start, weight, bias)
    return layer.solve(method, tolerance, max_sweeps, block).states


@torch.library.custom_op("gtrans::recurrence_backward", mutates_args=())
def recurrence_backward(
    drive: torch.Tensor,
    states: torch.Tensor,
    x: torch.Tensor,
    start: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    rule: str,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, start, weight and bias (of zeros if there is none)."""
    part = max(1, _ONE_PART // max(1, x[0].numel()))
    if rule != "loop" or len(x) <= part:
        return _gradients(drive, states, x, start, weight, bias, kind, rule, count)
    # From the last steps to the first: what leaves a part enters the one before it.
    dx, dweight = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.zeros_like(weight),
    )
    dbias, carried = weight.new_zeros(len(weight)), torch.zeros_like(start)
    for end in range(len(x), 0, -part):
        at = slice(max(0, end - part), end)
        own = drive[at].clone()
        own[-1] += carried
        before = states[at.start - 1] if at.start else start
        given = own, states[at], x[at], before, weight, bias, kind, rule, count
        dx[at], carried, more, of_bias = _gradients(*given)
        dweight += more
        dbias += of_bias
    return dx, carried, dweight, dbias


_ONE_PART = 1 << 20
"""Products with the input up to which all steps are worked on at once; more leave the caches."""


def _gradients(
    drive: torch.Tensor,
    states: torch.Tensor,
    x: torch.Tensor,
    start: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    rule: str,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = Recurrence(kind, x, start, weight, bias)
    everything = slice(0, len(x))
    before = layer.before(states, everything)
    found = layer.linearise(before, states, everything)
    w = cotangents(found, drive.contiguous(), rule, count)
    deltas = found.deltas(w)
    dx = found.input_deltas(w, deltas).flatten(-2)
    flat = deltas.flatten(0, 1).flatten(-2)
    dweight = flat.t() @ CELLS[kind].output(before).flatten(0, 1)
    if rule in ("feedback", "linspace"):
        dstart = w[0] * _constant(found, rule)[0]
    else:
        dstart = found.at(slice(0, 1)).pull(w[:1])[0]
    return dx, dstart.contiguous(), dweight, flat.sum(0)


@recurrence.register_fake
def _(x: torch.Tensor, start: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], *start.shape)


@recurrence_backward.register_fake
def _(
    drive: torch.Tensor,
    states: torch.Tensor,
    x: torch.Tensor,
    start: torch.Tensor,
    weight: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, start, weight)]
    return made[0], made[1], made[2], weight.new_empty(weight.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, start, weight, bias, kind, *_, rule, count = inputs
    ctx.save_for_backward(output, x, start, weight, bias)
    ctx.options = kind, rule, count


def _backward(ctx: Any, drive: torch.Tensor) -> tuple[Any, ...]:
    dx, dstart, dweight, dbias = recurrence_backward(drive, *ctx.saved_tensors, *ctx.options)
    has_bias = ctx.saved_tensors[-1] is not None
    return dx, dstart, dweight, dbias if has_bias else None, *[None] * 7


recurrence.register_autograd(_backward, setup_context=_remember)


def recurrent_network(
    kind: str,
    input: torch.Tensor,
    hx: Any,
    weights: list[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    method: str = "gauss-seidel",
    tolerance: float = 0.0,
    max_sweeps: int = 0,
    block: int = 16,
    rule: str = "loop",
    count: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """What `torch.gru`, `torch.lstm`, `torch.rnn_tanh` and `torch.rnn_relu` return.

    Args:
        kind: "gru", "lstm", "rnn_tanh" or "rnn_relu".
        input: [T, B, n], or [B, T, n] if batch_first.
        hx: h before the first step, [layers * directions, B, d]; for an LSTM h and c.
        weights: W_ih, W_hh and the two biases if there are any, layer by layer and direction by
            direction, as `nn.GRU` has them.
        has_biases: whether there are.
        num_layers: how many layers.
        bidirectional: whether each runs both ways.
        batch_first: layout of the input and the output.
        method: of the forward, see `Recurrence.solve`; so are tolerance, max_sweeps and block.
        rule: of the backward, see `cotangents`; so is count.
        dtype: of the results, if it is not that of the weights. Under autocast the products with
            the input are taken in 16 bits, and the states in the type of the weights.

    Returns:
        output, last h; for an LSTM last c as well.
    """
    options = (kind, method, tolerance, max_sweeps, block, rule, count)
    hidden = (hx,) if isinstance(hx, torch.Tensor) else tuple(hx)
    x = input.transpose(0, 1) if batch_first else input
    each = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    last: list[torch.Tensor] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, w_hh, *biases = weights[index * each : (index + 1) * each]
            b_ih, b_hh = biases if has_biases else (None, None)
            start = torch.cat([h[index] for h in reversed(hidden)], -1).to(w_hh.dtype)
            # Flipped afterwards, as torch does: a row's rounding depends on where it stands.
            products = F.linear(x, w_ih, b_ih).to(w_hh.dtype)
            products = products.flip(0) if direction else products
            states = recurrence(products, start, w_hh, b_hh, *options)
            last.append(states[-1])
            width = w_hh.shape[-1]
            h = states[..., -width:]
            outputs.append(h.flip(0) if direction else h)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    ends = torch.stack(last)
    found = (x.transpose(0, 1) if batch_first else x), *reversed(ends.chunk(len(hidden), -1))
    return found if dtype is None else tuple(part.to(dtype) for part in found)
