"""How many products must run one after another in a graph, however many run side by side."""

from collections.abc import Callable

from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph


def backward_critical_path(
    joint: JointGraph, counts: Callable[[fx.Node], bool] = ops.is_contraction
) -> tuple[fx.Node, ...]:
    """The longest chain of products in the backward: each reads, in the end, the one before.

    Its length bounds the time of a backward from below on any number of processors. Products of
    the forward are not counted, nor forward work that a plan repeats in the backward.

    Args:
        joint: the graph; it is not changed.
        counts: which nodes count; matrix products, convolutions and attention kernels by default.

    Returns:
        The counted nodes of one longest chain, in graph order.
    """
    length: dict[fx.Node, int] = {}
    above: dict[fx.Node, fx.Node] = {}
    for node in joint.graph.nodes:
        if not joint.is_backward(node):
            continue
        sources = [n for n in node.all_input_nodes if n in length]
        longest = max(sources, key=lambda n: length[n], default=None)
        if longest is not None:
            above[node] = longest
        length[node] = int(counts(node)) + (0 if longest is None else length[longest])
    end = max(length, key=lambda n: length[n], default=None)
    path = []
    while end is not None:
        if counts(end):
            path.append(end)
        end = above.get(end)
    return tuple(reversed(path))
