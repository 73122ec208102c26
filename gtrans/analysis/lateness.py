"""Where in the backward a value is best made: where it is, or right before its first reader.

A later place saves the bytes of the value between the two places; it costs the bytes of those
inputs that nothing else keeps for as long.
"""

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement, Side, runs_in, tag
from gtrans.ir.ops import storage_of
from gtrans.ir.sizes import tensor_bytes

# What is smaller than a block of CUDA's allocator costs nothing to keep.
_BLOCK = 512


def may_move(node: fx.Node) -> bool:
    """Whether a node makes one tensor in the backward, and nothing but that."""
    if node.op != "call_function" or runs_in(node) is not Side.BACKWARD:
        return False
    if not isinstance(node.meta["val"], torch.Tensor) or ops.is_getitem(node):
        return False
    if ops.is_random(node) or ops.is_effect(node):
        return False
    storages = [storage_of(n) for n in ops.tensor_inputs(node)]
    return not any(ops.mutates(u) for s in storages for u in _uses(s))


def first_reader(node: fx.Node) -> fx.Node | None:
    """None for what only the end of the step reads: a gradient is best made where it is."""
    reader = min(node.users, default=None)
    return None if reader is None or reader.op == "output" else reader


def is_late(node: fx.Node, reader: fx.Node, candidates: frozenset[fx.Node]) -> bool:
    """Whether all that runs between a node and its reader is there for that reader, too."""
    between = node.next
    while between is not reader:
        if between not in candidates or min(between.users) > reader:
            return False
        between = between.next
    return True


def pays(graph: JointGraph, node: fx.Node, reader: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether a later place saves more than it costs, in bytes times steps."""
    if tag(node).placement is Placement.REBUILT:
        return True
    end, cost = place[reader], 0
    group, pending = {node}, ops.tensor_inputs(node)
    seen: set[fx.Node] = set()
    while pending:
        source = pending.pop()
        storage = storage_of(source)
        if set(source.users) <= group and may_move(source):
            group.add(source)  # it would follow
            pending += ops.tensor_inputs(source)
        elif storage not in seen and not _is_static(graph, storage):
            seen.add(storage)
            last = max((place[u] for u in _uses(storage) - group), default=place[storage])
            size = tensor_bytes(storage.meta["val"])
            since = max(last, place[node])
            cost += size * max(0, end - since) if size > _BLOCK else 0
    made = tensor_bytes(node.meta["val"]) if storage_of(node) is node else 0
    return cost < made * (end - place[node]) or cost == made == 0


def _is_static(graph: JointGraph, node: fx.Node) -> bool:
    """Parameters and buffers are in memory anyway."""
    return node in graph.primals and graph.input_of(node).kind in ("parameter", "buffer")


def _uses(storage: fx.Node) -> set[fx.Node]:
    """The nodes that read a value, itself or through views."""
    found: set[fx.Node] = set()
    pending = [storage]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending += [user] if ops.is_view(user) or ops.is_getitem(user) else []
    return found
