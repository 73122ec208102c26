"""Insert what a residual pass keeps: encoded in the forward, decoded in the backward.

packed = encode(value)        forward, right behind the value
value' = decode(packed)       backward, right before its reader; never kept
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from gtrans.ir.joint import JointGraph
from gtrans.runtime.noise import NOISE_SEEDS, salt_of


def splice_late(
    graph: JointGraph, anchor: fx.Node, function: Callable[..., Any], *args: Any
) -> tuple[fx.Node, ...]:
    """`JointGraph.splice_before` a backward node; what it makes is never kept.

    Args:
        graph: the graph to edit.
        anchor: the backward node that will read the results.
        function: plain torch code; returns a tensor or a tuple of tensors.
        args: nodes of the graph, or constants.
    """
    before = anchor.prev
    made = graph.splice_before(anchor, function, *args)
    node = before.next
    while node is not anchor:
        if graph.is_forward(node):
            graph.rebuild_in_backward(node)
        node = node.next
    return made


def seed_of(graph: JointGraph, name: str) -> fx.Node:
    """The seed of a draw of noise; those of all draws are made at the beginning of a step.

    Args:
        graph: the graph to edit.
        name: of the draw; another name is another draw.
    """
    made = graph.calls(NOISE_SEEDS)
    fresh, salts = made[0].args if made else (_fresh(graph), [])
    assert isinstance(salts, list)
    salts = [*salts, salt_of(name)]
    step = graph.insert_after(graph.primals[-1], NOISE_SEEDS, fresh, salts)
    for old in made:
        for part in list(old.users):
            part.replace_input_with(old, step)
        graph.erase(old)
    return graph.insert_after(step, operator.getitem, step, len(salts) - 1)


def _fresh(graph: JointGraph) -> list[fx.Node]:
    """A parameter that the step updates and an input, if there are such, on one device."""
    tensors = [p for p in graph.primals if hasattr(p.meta.get("val"), "device")]
    trained = [p for p in tensors if graph.gradient_of(p) is not None]
    inputs = [p for p in tensors if graph.input_of(p).kind == "input"]
    device = (trained or tensors)[0].meta["val"].device
    found = dict.fromkeys(trained[:1] + inputs[:1] or tensors[:1])
    return [n for n in found if n.meta["val"].device == device]
