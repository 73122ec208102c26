"""Run what the backward needs as late as possible: right before its first reader.

    m  = mul(dl, h)          # of a loss in the middle of the model
    ...                                               ...
    da = mm(dy, W)                         -->        da = mm(dy, W)
    dh = add(da, m)                                   m  = mul(dl, h)
                                                      dh = add(da, m)

Saves: the bytes of m between its old place and its new one.
Costs: nothing; not a node more or less.
Contract: exact, bit for bit: the same operators run on the same values.
Needs: nothing. After `plan`, recomputed values are moved as well. A node stays where it is if that
    would keep as much of its inputs alive (bytes times steps) as it saves; so do random draws.
Source: gtrans; late recomputation as in PaReprop (arXiv:2306.09342), on one stream.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement, Side, runs_in, tag
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan.cut import storage_of

KEEPS_MORE = "its inputs would be kept longer, which costs as much"

# What is smaller than a block of CUDA's allocator costs nothing to keep.
_BLOCK = 512


@dataclass(frozen=True)
class LateRecompute(Pass[JointGraph]):
    """Move pure backward work to where it is first read."""

    name: ClassVar[str] = "late-recompute"
    knob: ClassVar[Knob] = Knob.SCHEDULE

    @property
    def contract(self) -> Contract:
        """The same gradient, bit for bit."""
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Moves nodes, last ones first, until each stands where it should."""
        candidates = frozenset(n for n in graph.nodes if _may_move(n))
        early: set[fx.Node] = set()
        moved: set[fx.Node] = set()
        answers: dict[fx.Node, bool] = {}
        pending = True
        while pending:
            pending = False
            place = {n: i for i, n in enumerate(graph.nodes)}
            for node in sorted(candidates, reverse=True):
                reader = _first_reader(node)
                if reader is None or _is_late(node, reader, candidates):
                    continue
                early.add(node)
                if not _pays(graph, node, reader, place):
                    continue
                if node not in answers:
                    answers[node] = permitted(node.name)
                if answers[node]:
                    graph.move_before(node, reader)
                    moved.add(node)
                    pending = True
        stats = Stats(len(early), len(moved))
        for node in sorted(early - moved):
            stats.refuse(node, KEEPS_MORE if answers.get(node, True) else HELD_BACK)
        return stats


def _may_move(node: fx.Node) -> bool:
    """Whether a node makes one tensor in the backward, and nothing but that."""
    if node.op != "call_function" or runs_in(node) is not Side.BACKWARD:
        return False
    if not isinstance(node.meta["val"], torch.Tensor) or ops.is_getitem(node):
        return False
    if ops.is_random(node) or ops.is_effect(node):
        return False
    storages = [storage_of(n) for n in ops.tensor_inputs(node)]
    return not any(ops.mutates(u) for s in storages for u in _uses(s))


def _first_reader(node: fx.Node) -> fx.Node | None:
    """None for what only the end of the step reads: a gradient is best made where it is."""
    reader = min(node.users, default=None)
    return None if reader is None or reader.op == "output" else reader


def _is_late(node: fx.Node, reader: fx.Node, candidates: frozenset[fx.Node]) -> bool:
    """Whether all that runs between a node and its reader is there for that reader, too."""
    between = node.next
    while between is not reader:
        if between not in candidates or min(between.users) > reader:
            return False
        between = between.next
    return True


def _pays(graph: JointGraph, node: fx.Node, reader: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether a later place saves more than it costs, in bytes times steps."""
    if tag(node).placement is Placement.REBUILT:
        return True
    end, cost = place[reader], 0
    group, pending = {node}, ops.tensor_inputs(node)
    seen: set[fx.Node] = set()
    while pending:
        source = pending.pop()
        storage = storage_of(source)
        if set(source.users) <= group and _may_move(source):
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
