"""Keep one slice of a value as codes, and the other slices as tensors of their own.

    a        -> q, k, v = views of slices      a       -> q, k, v
                                               q', k' = copies of q and k      # saved
                                               parts  = encode(v)              # saved
    f(dy, q, k, v)                      -->    f(dy, q', k', decode(parts))

The queries, keys and values of attention are often one product. Its memory stays as long as one of
its slices does, so the slices must part for the values to be kept in few bits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from gtrans.analysis.linear_uses import Role, Use, uses_of
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.rewrite.coded_values import cut_edge, decoded_late
from gtrans.runtime.quantise import Grid, frame


@dataclass(frozen=True)
class Slices:
    """A value of which the backward reads slices only.

    Attributes:
        value: allocates what they are slices of.
        coded: readers of every slice that all its readers are affine in.
        kept: readers of every other slice.
    """

    value: fx.Node
    coded: Mapping[fx.Node, tuple[Use, ...]]
    kept: Mapping[fx.Node, tuple[Use, ...]]

    def bytes(self, grid: Grid) -> float:
        """What is kept in place of the value."""
        copies = sum(numel(n.meta["val"]) * n.meta["val"].element_size() for n in self.kept)
        return float(copies) + sum(_bytes(grid, n) for n in self.coded)

    def let_go(self, trial: JointGraph, twin: Any) -> None:
        """Cuts the edges from the slices to their readers, in a copy of the graph."""
        for uses in (*self.coded.values(), *self.kept.values()):
            for use in uses:
                cut_edge(trial, twin(use.reader), twin(use.operand))

    def rewrite(self, graph: JointGraph, grid: Grid) -> None:
        """Lets the readers read copies and decoded slices, with dimensions in the same order."""
        for node, uses in (*self.kept.items(), *self.coded.items()):
            order = order_of(node.meta["val"])
            (copy,) = graph.splice_after(node, partial(_packed, order), node)
            if node in self.coded:
                anchor = min(u.reader for u in uses)
                own = replace(grid, order=order)
                frames = graph.splice_after(copy, partial(frame, own), copy)
                copy = decoded_late(graph, copy, frames, own, anchor, node.name)
            graph.replace_uses(node, copy, [u.reader for u in uses])


def slices_of(joint: JointGraph, value: fx.Node, others: Collection[str] = ()) -> Slices | None:
    """The slices of a value, if some of them may be coded and some may not.

    Args:
        joint: the graph.
        value: the value.
        others: names of backward nodes that are taken care of in another way.
    """
    by_operand: dict[fx.Node, tuple[Use, ...]] = {}
    for use in uses_of(joint, value):
        if use.reader.name not in others:
            by_operand[use.operand] = (*by_operand.get(use.operand, ()), use)
    sizes = [n.meta["val"].shape for n in (value, *by_operand)]
    if any(not isinstance(n, int) for shape in sizes for n in shape):
        return None
    whole, *parts = (shape.numel() for shape in sizes)
    coded = {n: u for n, u in by_operand.items() if all(x.role is Role.LINEAR for x in u)}
    kept = {n: u for n, u in by_operand.items() if n not in coded}
    if not coded or not kept or sum(parts) > whole:
        return None
    return Slices(value, coded, kept)


def order_of(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost to the innermost, of a tensor that may have gaps."""
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda d: (-int(strides[d]), d)))


def _bytes(grid: Grid, node: fx.Node) -> float:
    count = numel(node.meta["val"])
    return grid.frame_bytes(count) + grid.code_bytes(count)


def _packed(order: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    """A copy without gaps."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
