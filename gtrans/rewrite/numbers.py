"""Numbers that differ between the steps of a Python loop, as tensors that the steps read.

    y = 0.1 * a;  ..;  z = 0.3 * b        -->        u = full((), 0.1);  y = u * a;  ..
    t = full_like(a, 0.1);  ..            -->        t = full(a.shape, 0.1);  ..

The steps of a loop are found by their text, and a number that is another one in each step (a time,
the coefficient of a schedule) makes each step a text of its own. In what is left of the loop
afterwards, and everywhere else, the numbers of arithmetic are put back; what is filled with one
reads nothing of the loop, and stays so.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from gtrans.ir.forward import ForwardGraph, value

# With these, a tensor of no dimensions computes what a number does, to the bit. A GPU multiplies by
# the inverse of a number that divides: there, the last bit of a quotient may differ.
_ARITHMETIC = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.truediv,
        torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div",
    }
)  # fmt: skip
_FILLS = (torch.full_like, "new_full")
# In narrower types a number keeps digits that a tensor loses.
_WIDE = (torch.float32, torch.float64)


@contextmanager
def numbers_as_tensors(graph: ForwardGraph) -> Iterator[None]:
    """Lets calls that differ in a number read tensors, until the end of the block."""
    made: list[tuple[_Call, fx.Node]] = []
    for fills in _fills(graph).values():
        if len({number for _, number in fills}) > 1:
            for node, number in fills:
                _fill(graph, node, number)
    try:
        for calls in _groups(graph).values():
            if len({call.number for call in calls}) > 1:
                made += [(call, _tensor(graph, call)) for call in calls]
        yield
    finally:
        for call, tensor in made:
            if call.node in tensor.users:
                call.node.update_arg(call.place, call.number)
            if not tensor.users:
                graph.graph.erase_node(tensor)


class _Call(NamedTuple):
    """A call of arithmetic with a number, and the place of the number in its arguments."""

    node: fx.Node
    place: int
    number: float


def _groups(graph: ForwardGraph) -> dict[Any, list[_Call]]:
    """The calls of one function with a number at one place."""
    found: dict[Any, list[_Call]] = defaultdict(list)
    for node in graph.nodes:
        if node.target not in _ARITHMETIC or node.kwargs or len(node.args) != 2:
            continue
        numbers = [(i, a) for i, a in enumerate(node.args) if type(a) in (int, float)]
        val = value(node)
        if len(numbers) == 1 and isinstance(val, torch.Tensor) and val.dtype in _WIDE:
            (place, number) = numbers[0]
            found[node.target, place].append(_Call(node, place, cast(float, number)))
    return found


def _fills(graph: ForwardGraph) -> dict[Any, list[tuple[fx.Node, float]]]:
    """What is filled with a number in the likeness of something, with that number."""
    found: dict[Any, list[tuple[fx.Node, float]]] = defaultdict(list)
    for node in graph.nodes:
        if node.target not in _FILLS:
            continue
        number, val = node.kwargs.get("fill_value", (None, *node.args)[-1]), value(node)
        sized = isinstance(val, torch.Tensor) and all(isinstance(n, int) for n in val.shape)
        if type(number) in (int, float) and sized and val.is_contiguous():
            found[node.target, val.shape].append((node, cast(float, number)))
    return found


def _fill(graph: ForwardGraph, node: fx.Node, number: float) -> None:
    """Fills it by its sizes, without what it was to be like."""
    val = value(node)
    kind = {"dtype": val.dtype, "device": val.device}
    made = graph.insert_before(node, torch.full, tuple(val.shape), number, **kind)
    made.meta["example_value"] = val
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)


def _tensor(graph: ForwardGraph, call: _Call) -> fx.Node:
    """The number as a tensor of the call's type, which the call reads."""
    val = value(call.node)
    kind = {"dtype": val.dtype, "device": val.device}
    made = graph.insert_before(call.node, torch.full, (), call.number, **kind)
    made.meta["example_value"] = val.new_full((), call.number)
    call.node.update_arg(call.place, made)
    return made
