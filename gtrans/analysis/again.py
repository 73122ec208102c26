"""What can run again in the backward without drawing, updating or reading anything changed."""

from collections.abc import Collection

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import Offer
from gtrans.runtime.again import drop, normalise

aten = torch.ops.aten

# Both return (y, mean, rstd, ...); they differ in what they do with the running statistics. The
# number is the position of the argument that says whether the batch's own statistics are used.
BATCH_NORMS = {
    aten._native_batch_norm_legit_functional.default: 5,
    aten._native_batch_norm_legit.no_stats: 3,
    aten.native_batch_norm.default: 5,
}


def formula(node: fx.Node) -> Offer | None:
    """The output of a dropout or training batch norm from its input and what the forward kept.

    Args:
        node: any node; the outputs meant are getitem nodes.

    Returns:
        None where the node is no such output, or the mask or statistics are not at hand.
    """
    if not ops.is_getitem(node) or node.args[1] != 0:
        return None
    whole = node.args[0]
    assert isinstance(whole, fx.Node)
    parts = ops.parts(whole)
    if whole.target is aten.native_dropout.default and 1 in parts:
        x, p, train = whole.args
        if train is False or not isinstance(p, (int, float)):
            return None
        return Offer(drop, (x, parts[1], 0.0 if p == 1 else 1 / (1 - p)))
    if uses_batch_statistics(whole) and 1 in parts and 2 in parts:
        x, weight, bias = whole.args[:3]
        return Offer(normalise, (x, parts[1], parts[2], weight, bias))
    return None


def uses_batch_statistics(node: fx.Node) -> bool:
    """Whether the node is a batch norm in training mode."""
    op = ops.overload(node)
    return op in BATCH_NORMS and node.args[BATCH_NORMS[op]] is True


def is_fixed(node: fx.Node, overwritten: Collection[fx.Node]) -> bool:
    """Whether a value must come from the forward: drawn, an effect, or made of a changed buffer.

    Args:
        node: any forward value.
        overwritten: inputs that the forward overwrites, and views of them.
    """
    if formula(node) is not None:
        return False
    if ops.is_getitem(node):
        node = node.all_input_nodes[0]
    if ops.is_random(node) or ops.is_effect(node) or uses_batch_statistics(node):
        return True
    return not ops.is_view(node) and any(n in overwritten for n in node.all_input_nodes)


def overwritten_inputs(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """The values that some node writes into, and the views of them."""
    written = {_origin(n.all_input_nodes[0]) for n in nodes if ops.mutates(n)}
    for node in nodes:
        if ops.is_view(node) and node.all_input_nodes[0] in written:
            written.add(node)
    return written


def _origin(node: fx.Node) -> fx.Node:
    while ops.is_view(node):
        node = node.all_input_nodes[0]
    return node
