"""Run parts of a graph that are alike, and do not wait for each other, as one batch.

    a[i] = f(x[i], w[i])   i = 1 .. n    -->    a = vmap(f)(stack(x), stack(w))

Products of n matrices become one `bmm`. What is stacked is stacked once: where some parts at the
front have dropped out, the others read a slice of it.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.runtime.batch_rules import batched_form, quiet_loops

aten = torch.ops.aten

# Torch loops over a batch for operators that have no kernel under any of these keys.
_RULES = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "CompositeImplicitAutograd")


@dataclass(frozen=True)
class Part:
    """What computes a node from outside values.

    Attributes:
        nodes: in an order that depends on their structure only; the last one is the result.
        read: the values from outside, likewise.
        key: equal for parts that differ in what they read only.
    """

    nodes: tuple[fx.Node, ...]
    read: tuple[fx.Node, ...]
    key: Hashable

    @property
    def products(self) -> list[fx.Node]:
        """Its products of matrices."""
        return [n for n in self.nodes if ops.is_contraction(n)]

    def can_be_batched(self) -> bool:
        """Whether torch runs more products as one than it has operators to loop over."""
        calls = [(n, op) for n in self.nodes if (op := ops.overload(n)) is not None]
        looped = {n for n, op in calls if not _has_rule(op)}
        return len(looped) < len(set(self.products) - looped) or not looped


@cache
def _has_rule(op: torch._ops.OpOverload) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return batched_form(op) is not op or any(has_kernel(op.name(), key) for key in _RULES)


def part_of(end: fx.Node, inside: Collection[fx.Node]) -> Part | None:
    """The nodes of a set that lead to one of them; None where they cannot be compared.

    Args:
        end: the result.
        inside: the set.
    """
    nodes: dict[fx.Node, int] = {}
    read: dict[fx.Node, int] = {}
    pending = [end]
    while pending:
        node = pending[-1]
        before = [n for n in node.all_input_nodes if n in inside and n not in nodes]
        if before:
            pending.append(before[0])
            continue
        pending.pop()
        nodes.setdefault(node, len(nodes))
        for source in node.all_input_nodes:
            if source not in inside:
                read.setdefault(source, len(read))
    key: list[Hashable] = [_kind(n) for n in read]
    for node in nodes:
        args = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda n: (n in nodes, nodes.get(n, read.get(n)))
        )
        key.append((str(node.target), repr(args)))
    return None if None in key else Part(tuple(nodes), tuple(read), tuple(key))


def _kind(node: fx.Node) -> Hashable | None:
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor) or not all(isinstance(n, int) for n in val.shape):
        return None
    return val.dtype, tuple(val.shape)


class Batches:
    """Batches of parts in one graph, which share what they stack."""

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.stacked: dict[tuple[fx.Node, ...], fx.Node] = {}

    def run(self, parts: Sequence[Part], anchor: fx.Node) -> list[fx.Node]:
        """Inserts one batch for parts of one key.

        Args:
            parts: two or more that can be batched, none of which reads what another computes.
            anchor: a node that stands behind all that they read; the batch stands before it.

        Returns:
            The result of each part. What reads them may stand before them: see `put_in_order`.
        """
        slots = list(zip(*(p.read for p in parts), strict=True))
        shared = [len(set(slot)) == 1 for slot in slots]
        before = anchor.prev
        args = [
            slot[0] if one else self._stack(slot, anchor)
            for slot, one in zip(slots, shared, strict=True)
        ]
        function = torch.vmap(_Call(parts[0]), in_dims=tuple(None if s else 0 for s in shared))
        with quiet_loops():
            (result,) = self.joint.splice_before(anchor, function, *args)
        while (before := before.next) is not anchor:
            if self.joint.is_forward(before):
                self.joint.rebuild_in_backward(before)
        insert = self.joint.insert_before
        return [insert(anchor, aten.select.int, result, 0, i) for i in range(len(parts))]

    def _stack(self, values: tuple[fx.Node, ...], anchor: fx.Node) -> fx.Node:
        insert, count = self.joint.insert_before, len(values)
        for known, stack in self.stacked.items():
            if known[-count:] == values:
                dropped = len(known) - count
                return insert(anchor, aten.slice.Tensor, stack, 0, dropped) if dropped else stack
        self.stacked[values] = insert(anchor, aten.stack.default, list(values))
        return self.stacked[values]


def put_in_order(joint: JointGraph) -> None:
    """Lets every node run behind what it reads; otherwise the order stays as it is."""
    done: dict[fx.Node, None] = {}
    for start in joint.graph.nodes:
        pending = [start]
        while pending:
            unmet = [n for n in pending[-1].all_input_nodes if n not in done]
            if unmet:
                pending += unmet
            else:
                done.setdefault(pending.pop())
    at = next(iter(done))
    for node in list(done)[1:]:
        if at.next is not node:
            at.append(node)
        at = node


class _Call:
    """A part as a function of what it reads."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __call__(self, *read: torch.Tensor) -> torch.Tensor:
        values: dict[fx.Node, Any] = dict(zip(self.part.read, read, strict=True))
        for node in self.part.nodes:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = batched_form(node.target)(*args, **kwargs)
        result: torch.Tensor = values[self.part.nodes[-1]]
        return result
