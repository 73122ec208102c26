"""Recurrent cells by their formulas: a step, and the derivative of a step at all times at once.

A state holds s tensors of width d (one of a GRU, two of an LSTM: c and h) in one of [B, s*d]. The
transposed Jacobian of every cell here is element by element but for one product:

    y = sum over s of w[s] * E[s]           [B, g + s, d]: deltas of g gates, and what goes past
    J^T w = y[g:],  with  y[:g] U  added to the cotangent of h          U: [g*d, d]

The deltas of the gates are also what weights and inputs need: dU = delta^T h. The input's deltas
are the same, but for the new gate of a GRU, whose product with h is multiplied by r.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Linearised:
    """The derivative of a cell at some states.

    Attributes:
        local: E, [T, B, s, g + s, d].
        product: U, [g*d, d].
        last_input: [T, B, d]: w times it is the input's delta of the last gate, where it is another
            than that of the gate.
        past: the diagonal way past the cell, K, [T, B, s*d].
    """

    local: torch.Tensor
    product: torch.Tensor
    last_input: torch.Tensor | None
    past: torch.Tensor

    @property
    def gates(self) -> int:
        """How many gates the product is for."""
        return self.local.shape[-2] - self.local.shape[-3]

    def at(self, part: slice) -> "Linearised":
        """The same for some of the times."""
        last = None if self.last_input is None else self.last_input[part]
        return Linearised(self.local[part], self.product, last, self.past[part])

    def deltas(self, w: torch.Tensor) -> torch.Tensor:
        """Cotangents of states [..., s*d] to those of the gates, [..., g, d]."""
        return self._spread(w, slice(self.gates))

    def input_deltas(self, w: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        """The same for the products with the input; `deltas` are those of the gates."""
        if self.last_input is None:
            return deltas
        return torch.cat([deltas[..., :-1, :], (w * self.last_input).unsqueeze(-2)], -2)

    def pull(self, w: torch.Tensor) -> torch.Tensor:
        """J^T w, of [T, B, s*d]."""
        y = self._spread(w)
        past = y[..., self.gates :, :].flatten(-2)
        through = y[..., : self.gates, :].flatten(-2) @ self.product
        width = through.shape[-1]
        if past.shape[-1] == width:
            return past + through
        return torch.cat([past[..., :-width], past[..., -width:] + through], -1)

    def matrices(self) -> torch.Tensor:
        """J^T of every time, [T, B, s*d, s*d]; for small states."""
        size = self.past.shape[-1]
        basis = torch.eye(size, dtype=self.past.dtype, device=self.past.device)
        shape = (size, *self.past.shape)
        columns = self.pull(basis.view(size, 1, 1, size).expand(shape))
        return torch.movedim(columns, 0, -1)

    def diagonal(self) -> torch.Tensor:
        """The diagonal of every Jacobian, [T, B, s*d]."""
        gates, width = self.gates, self.product.shape[-1]
        own = self.product.view(gates, width, width).diagonal(dim1=1, dim2=2)
        states = self.local.shape[-3]
        parts = []
        for s in range(states):
            found = self.local[..., s, gates + s, :]
            if s == states - 1:
                found = found + (self.local[..., s, :gates, :] * own).sum(-2)
            parts.append(found)
        return torch.cat(parts, -1)

    def rest(self, w: torch.Tensor) -> torch.Tensor:
        """J^T w without the way past the cell: what `pull` gives, less past * w."""
        gates, (states, width) = self.gates, self.local.shape[-3::2]
        through = self._spread(w, slice(gates)).flatten(-2) @ self.product
        if states == 1:
            return through
        wide = torch.unflatten(w, -1, (states, width)).unbind(-2)
        ends: list[torch.Tensor] = []
        for end in range(states):
            found = through if end == states - 1 else None
            for source in range(states):
                if source != end:
                    row = self.local[..., source, gates + end, :]
                    found = _add_product(found, wide[source], row)
            assert found is not None  # there is a source, or it is the last end
            ends.append(found)
        return torch.cat(ends, -1)

    def _spread(self, w: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        states, width = self.local.shape[-3], self.local.shape[-1]
        wide = torch.unflatten(w, -1, (states, width))
        spread = wide[..., :1, :] * self.local[..., 0, rows, :]
        for state in range(1, states):
            part = self.local[..., state, rows, :]
            spread = torch.addcmul(spread, wide[..., state : state + 1, :], part)
        return spread


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * b if total is None else torch.addcmul(total, a, b)


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        gates: how many of width d its products make.
        states: how many tensors of width d a state holds; the last one is the output.
        step: (products with the input, products with h, state before) to the state after.
        derivative: of a step, (same arguments, state after, U) to `Linearised`.
    """

    gates: int
    states: int
    step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    derivative: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Linearised
    ]

    def output(self, state: torch.Tensor) -> torch.Tensor:
        """h of a state."""
        width = state.shape[-1] // self.states
        return state[..., -width:]

    def advance(
        self,
        x: torch.Tensor,
        before: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The states after some steps, each from the state before it.

        Args:
            x: products with the input, [..., g*d].
            before: [..., s*d].
            weight: [g*d, d].
            bias: [g*d] or None.
        """
        return self.step(x, F.linear(self.output(before), weight, bias), before)

    def linearise(
        self,
        x: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Linearised:
        """The derivatives of steps [T, B, ...] whose results are known."""
        q = F.linear(self.output(before), weight, bias)
        return self.derivative(x, q, before, after, weight)


def _gru_step(x: torch.Tensor, q: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    # In torch's order and layouts: vectorised and plain sigmoids differ in the last bit.
    (q_r, q_z, q_n), (x_r, x_z, x_n) = q.chunk(3, -1), x.chunk(3, -1)
    r = (q_r + x_r).sigmoid()
    z = (q_z + x_z).sigmoid()
    n = (x_n + (q_n * r)).tanh()
    return (before - n) * z + n


def _gru_derivative(
    x: torch.Tensor,
    q: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    weight: torch.Tensor,
) -> Linearised:
    width = before.shape[-1]
    r, z = (x[..., : 2 * width] + q[..., : 2 * width]).sigmoid().chunk(2, -1)
    own = q[..., 2 * width :]
    n = (x[..., 2 * width :] + own * r).tanh()
    new = (1 - z) * (1 - n * n)
    reset = new * own * r * (1 - r)
    update = (before - n) * z * (1 - z)
    local = torch.stack([reset, update, new * r, z], -2).unsqueeze(-3)
    return Linearised(local, weight, new, z)


def _lstm_step(x: torch.Tensor, q: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    i, f, g, o = (q + x).chunk(4, -1)
    c = f.sigmoid() * before.chunk(2, -1)[0] + (i.sigmoid() * g.tanh())
    return torch.cat([c, o.sigmoid() * c.tanh()], -1)


def _lstm_derivative(
    x: torch.Tensor,
    q: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    weight: torch.Tensor,
) -> Linearised:
    i, f, g, o = (q + x).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    wide = after.chunk(2, -1)[0].tanh()
    of_c = torch.stack([g * i * (1 - i), before.chunk(2, -1)[0] * f * (1 - f), i * (1 - g * g)], -2)
    nothing = torch.zeros_like(f).unsqueeze(-2)
    to_c = (o * (1 - wide * wide)).unsqueeze(-2)  # what reaches c by way of h
    of_h = (wide * o * (1 - o)).unsqueeze(-2)
    f_row = f.unsqueeze(-2)
    from_c = torch.cat([of_c, nothing, f_row, nothing], -2)
    from_h = torch.cat([of_c * to_c, of_h, f_row * to_c, nothing], -2)
    past = torch.cat([f, torch.zeros_like(f)], -1)
    return Linearised(torch.stack([from_c, from_h], -3), weight, None, past)


def _plain(slope: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Linearised]:
    def derivative(
        x: torch.Tensor,
        q: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        weight: torch.Tensor,
    ) -> Linearised:
        nothing = torch.zeros_like(after)
        local = torch.stack([slope(after), nothing], -2).unsqueeze(-3)
        return Linearised(local, weight, None, nothing)

    return derivative


CELLS: dict[str, Cell] = {
    "gru": Cell(3, 1, _gru_step, _gru_derivative),
    "lstm": Cell(4, 2, _lstm_step, _lstm_derivative),
    "rnn_tanh": Cell(1, 1, lambda x, q, h: (q + x).tanh(), _plain(lambda y: 1 - y * y)),
    "rnn_relu": Cell(1, 1, lambda x, q, h: (q + x).relu(), _plain(lambda y: (y > 0).to(y.dtype))),
}
"""By torch's names, with torch's order of gates: r, z, n and i, f, g, o."""
