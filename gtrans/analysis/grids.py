"""Which values of a forward lie on a grid 2^-bits, where sums and differences are exact.

`gtrans.runtime.streams.on_grid` is traced into `mul(round(...), 2^-bits)` in float64; sums,
differences and rearrangements of such values stay on the grid. Then x = (x + t) - t to the bit, as
long as all stay below 2^(53 - bits).
"""

import math
from collections.abc import Iterable

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.runtime.streams import HALVE, SCALE

aten = torch.ops.aten

_MOVES = frozenset({aten.clone.default, aten.flip.default, aten.roll.default, aten.neg.default})
_JOINS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default})
_SHUFFLES = frozenset({aten.pixel_shuffle.default, aten.pixel_unshuffle.default})


def grids(forward: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """The values on a grid, with its bits.

    Args:
        forward: nodes in order.
    """
    found: dict[fx.Node, int] = {}
    for node in forward:
        bits = _bits(node, found)
        if bits is not None:
            found[node] = bits
    return found


def _bits(node: fx.Node, known: dict[fx.Node, int]) -> int | None:
    if node.op != "call_function":
        return None
    if ops.is_getitem(node):
        whole = node.args[0]
        assert isinstance(whole, fx.Node)
        if whole.target in (SCALE, HALVE):
            bits = whole.args[-1]
            return bits if node.args[1] == 0 and isinstance(bits, int) else None
        return known.get(whole)
    if node.target is aten.round.default and node.meta["val"].dtype is torch.float64:
        return 0
    if node.target is aten.mul.Tensor and (finer := _exponent(node.args[1])) is not None:
        bits = known.get(node.all_input_nodes[0])
        return None if bits is None else bits + finer
    if node.target in _JOINS and ops.argument(node, "alpha", 1) == 1:
        sources = list(node.all_input_nodes)
        numbers = [a for a in node.args if isinstance(a, float) and a != 0]
        places = [known.get(n) for n in sources]
        if numbers or not sources or any(b is None for b in places):
            return None
        return max(b for b in places if b is not None)
    if node.target in _MOVES or node.target in _SHUFFLES or ops.is_view(node):
        return known.get(node.all_input_nodes[0]) if node.all_input_nodes else None
    return None


def _exponent(factor: object) -> int | None:
    """b of 2^-b; None for any other number."""
    if not isinstance(factor, float) or factor <= 0:
        return None
    mantissa, exponent = math.frexp(factor)
    return 1 - exponent if mantissa == 0.5 and exponent <= 1 else None
