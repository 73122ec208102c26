"""Transfer rules of recurrent layers and cells: the hidden units are one axis of all their weights.

    weight_ih[gates · H, I]   weight_hh[gates · H, H]   bias[gates · H]   state[..., H]

A unit whose rows are zero in every gate keeps a state of zero if it starts at zero: with
n = tanh(0) = 0 a GRU has h' = z·h, an LSTM c' = f·c and h' = o·tanh(c'), an RNN h' = tanh(0). So
the state that is given is what must be zero, and the columns of weight_hh are only cut.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import Axis, concatenate, freeze, split, unify
from gtrans.analysis.axis_rules.context import Axes, Context, Rule, Unsupported, packet_of, shape

aten = torch.ops.aten

GATES = {
    **{aten.gru: 3, aten.lstm: 4, aten.rnn_tanh: 1, aten.rnn_relu: 1},
    **{aten.gru_cell: 3, aten.lstm_cell: 4, aten.rnn_tanh_cell: 1, aten.rnn_relu_cell: 1},
}
"""Recurrent operators, and how many rows of a weight a unit has."""


@dataclass(frozen=True)
class Recurrence:
    """The arguments of a recurrent layer or cell.

    Attributes:
        x: the input.
        states: the first hidden state (and cell state).
        layers: for each layer and direction its input weight, hidden weight and biases.
        directions: 1 or 2.
        cell: whether it is a single step.
        time: which dimension of the input is time.
    """

    x: fx.Node
    states: list[fx.Node]
    layers: list[list[fx.Node]]
    directions: int
    cell: bool
    time: int


def arguments(a: dict[str, Any]) -> Recurrence:
    """Reads the arguments of a recurrent operator.

    Raises:
        Unsupported: packed sequences, or an LSTM with projections.
    """
    hx = a["hx"]
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if "w_ih" in a:
        weights = [w for w in (a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"]) if w is not None]
        return Recurrence(a["input"], states, [weights], 1, True, -1)
    if "batch_sizes" in a:
        raise Unsupported("packed sequences")
    params, each = list(a["params"]), 4 if a["has_biases"] else 2
    directions = 2 if a["bidirectional"] else 1
    if len(params) != each * directions * a["num_layers"]:
        raise Unsupported("projections of the state")
    layers = [params[i : i + each] for i in range(0, len(params), each)]
    return Recurrence(a["input"], states, layers, directions, False, 1 if a["batch_first"] else 0)


def recurrent(c: Context, node: fx.Node, a: dict[str, Any]) -> Any:
    """All layers and directions share the hidden units: their states are one tensor."""
    r, gates = arguments(a), GATES[packet_of(node)]
    xs, states = c.of(r.x), [c.of(s) for s in r.states]
    if len(xs) != len(states[0]):
        raise Unsupported("input and state of different ranks")
    hidden = states[0][-1]
    for other in states[1:]:
        for mine, theirs in zip(states[0], other, strict=True):
            unify(mine, theirs)
    for i in range(0, len(r.layers), r.directions):
        first = i == 0
        below = xs[-1] if first else _output(hidden, r.directions)
        for weights in r.layers[i : i + r.directions]:
            _layer(c, node, weights, gates, below, hidden)
        # What a layer reads is zero where the units of the one below are, so nothing is needed.
        if first:
            c.need(node, below, (r.x, len(xs) - 1))
    for state in r.states:
        c.need(node, hidden, (state, len(states[0]) - 1))
    batch = xs[0]
    if not r.cell:
        freeze(xs[r.time], "time of a recurrence")
        freeze(states[0][0], "layers of a recurrence")
        batch = xs[1 - r.time]
    unify(batch, states[0][-2])
    after: list[Axes] = [list(s) for s in states]
    if r.cell:
        return after if len(after) > 1 else after[0]
    return [[*xs[:-1], _output(hidden, r.directions)], *after]


def _layer(
    c: Context, node: fx.Node, weights: list[fx.Node], gates: int, below: Axis, hidden: Axis
) -> None:
    inward, across, *biases = weights
    units = shape(across)[1]
    cut = split(c.of(inward)[0], [gates, units])
    if cut is None:
        raise Unsupported("gates that cross other structure")
    freeze(cut[0], "gates of a recurrence")
    unify(cut[1], hidden)
    for other in (across, *biases):
        unify(c.of(other)[0], c.of(inward)[0])
    unify(c.of(inward)[1], below)
    unify(c.of(across)[1], hidden)
    c.consume(node, inward, 1, c.of(inward)[1])
    c.consume(node, across, 1, c.of(across)[1])


def _output(hidden: Axis, directions: int) -> Axis:
    return hidden if directions == 1 else concatenate([hidden] * directions)


RULES: dict[Any, Rule] = dict.fromkeys(GATES, recurrent)
