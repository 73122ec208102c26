"""Regions of a graph that can be computed a few rows at a time.

    h = mm(x, W1)            [n, f]                for each chunk c of rows:
    a = gelu(h)              [n, f]       --->        y_c = mm(gelu(mm(x_c, W1)), W2)
    y = mm(a, W2)            [n, d]                y = cat(y_c)

A value is rows if its leading dimensions count n tokens and its last one is all there is of each. A
region grows from one wide value: through operators that treat each row alone, up to the products
that make wide rows out of narrow ones, and down to those that make narrow rows of them, or sum over
them (gradients of weights). Its rows are then never all in memory at once. This is the feed-forward
network of a transformer, forward and backward, and whatever else is wide between two products.

Source: the streaming of StreamBP (arXiv:2506.03077) and mini-sequences (arXiv:2407.15892), found in
the graph instead of in a module. Attention and normalisation over rows are not streamed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, runs_in
from gtrans.ir.sizes import tensor_bytes

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.addmm.default)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
# Operators along the last dimension, with the position of the argument that says so.
ALONG: dict[Any, int] = {
    aten.cat.default: 1,
    aten.slice.Tensor: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten._softmax.default: 1,
    aten._softmax_backward_data.default: 2,
    aten._log_softmax.default: 1,
    aten._log_softmax_backward_data.default: 2,
}
SUMS = (aten.sum.dim_IntList,)
# Of class numbers, one for each row, with the position of the argument that holds them. The first
# one, a sum or mean, has two results: the loss, and what a mean divides it by.
LOSS, LOSS_BACKWARD = aten.nll_loss_forward.default, aten.nll_loss_backward.default
LABELS: dict[Any, int] = {LOSS: 1, LOSS_BACKWARD: 2}

# A value is wide if it has at least this share of the seed's bytes.
_WIDE = 1 / 2


@dataclass
class RowRegion:
    """Nodes that can run chunk by chunk.

    Attributes:
        rows: how many there are.
        nodes: what runs per chunk.
        turned: those of them, and of their inputs, that hold the rows in their last dimension.
        joined: results that are rows again.
        added: results that are sums over rows.
        sliced: inputs of which a chunk reads its rows only.
    """

    rows: int
    nodes: set[fx.Node] = field(default_factory=set)
    turned: set[fx.Node] = field(default_factory=set)
    joined: set[fx.Node] = field(default_factory=set)
    added: set[fx.Node] = field(default_factory=set)
    sliced: set[fx.Node] = field(default_factory=set)

    @property
    def results(self) -> set[fx.Node]:
        """What the rest of the graph reads."""
        return self.joined | self.added


def region_around(graph: JointGraph, seed: fx.Node) -> RowRegion | None:
    """The region that grows from a wide value, None if it cannot be computed by rows.

    Args:
        graph: a graph with its plan written into it.
        seed: a value in the middle of the region: [*s, f].
    """
    val = seed.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dim() < 2 or seed.op != "call_function":
        return None
    if not all(isinstance(size, int) for size in val.shape):
        return None
    growth = _Growth(graph, prod(val.shape[:-1]), tensor_bytes(val) * _WIDE, seed)
    found = growth.is_inner(seed) and growth.grow(seed) and growth.fits()
    return growth.region if found else None


def place_of(graph: JointGraph, region: RowRegion) -> fx.Node | None:
    """The node in front of which a region can run as a whole, None if there is no such place."""
    readers = [u for r in region.results for u in r.users if u not in region.nodes]
    if not readers:
        return None
    anchor = min(readers)
    sources = {s for n in region.nodes for s in n.all_input_nodes if s not in region.nodes}
    return anchor if all(s < anchor for s in sources) else None


class _Growth:
    def __init__(self, graph: JointGraph, rows: int, wide: float, seed: fx.Node) -> None:
        self.graph = graph
        self.region = RowRegion(rows)
        self.wide = wide
        self.side = runs_in(seed)
        self.cut = frozenset(graph.cut or ())
        self.outputs = set(graph.output.all_input_nodes)

    def grow(self, seed: fx.Node) -> bool:
        """Adds what a node needs and what needs it, and so on; False where that is impossible."""
        region, pending = self.region, [seed]
        while pending:
            node = pending.pop()
            if node in region.nodes:
                continue
            if not self._may_run_by_rows(node):
                return False
            region.nodes.add(node)
            if node.target in TURNS:
                region.turned.add(node)
            for source in self._row_operands(node):
                if source not in region.nodes and self.is_inner(source):
                    pending.append(source)
            if self._sums(node):
                region.added.add(node)
            elif node.target is LOSS:
                region.nodes |= set(node.users)
                region.added |= set(node.users)
            elif self.is_inner(node) or node in region.turned or _is_tuple(node):
                pending += node.users
            else:
                region.joined.add(node)
        return True

    def fits(self) -> bool:
        """Whether every input is rows or the same for all rows, and no inner value leaves."""
        region = self.region
        if not region.results or len(region.nodes) < 2:
            return False
        if not all(self._still_runs_by_rows(n) for n in region.nodes):
            return False
        inner = region.nodes - region.results
        if any(u not in region.nodes for n in inner for u in n.users):
            return False
        if any(n in self.cut or n in self.outputs for n in inner):
            return False
        if any(u in region.nodes for n in region.added for u in n.users):
            return False  # a sum is known only after the last chunk
        turned: set[fx.Node | None] = {self._turned_operand(n) for n in region.nodes}
        for node in region.nodes:
            for source in self._row_operands(node):
                if source in region.nodes:
                    continue
                if not isinstance(source.meta.get("val"), torch.Tensor):
                    return False
                if source in turned and self._turned_operand(node) is not source:
                    return False  # its rows are read along one dimension here, the other there
                region.sliced.add(source)
        region.turned |= {s for s in turned if s is not None}
        return place_of(self.graph, region) is not None

    # ------------------------------------------------------------------ rules

    def _still_runs_by_rows(self, node: fx.Node) -> bool:
        """Whether what held when a node was added holds with all of the region known."""
        if ops.is_getitem(node):
            return True
        return self._may_run_by_rows(node) and self._sums(node) is (node in self.region.added)

    def _may_run_by_rows(self, node: fx.Node) -> bool:
        if node.op != "call_function" or runs_in(node) is not self.side:
            return False
        if ops.is_random(node) or ops.is_effect(node):
            return False
        if ops.is_getitem(node):
            return node.all_input_nodes[0].target in (*ALONG, LOSS)
        if node.target in PRODUCTS:
            return self._is_product_of_rows(node)
        if self._sums(node):
            return self._is_rows(node.all_input_nodes[0])
        if node.target in LABELS:
            logp, labels = _with_labels(node)
            parts = ops.parts(node) if node.target is LOSS else {0: node, 1: node}
            summed = ops.argument(node, "reduction") != 0 and (1 in parts or 0 not in parts)
            return summed and self._is_rows(logp) and labels.meta["val"].dim() == 1
        if node.target in ALONG:
            rank = node.all_input_nodes[0].meta["val"].dim()
            position = ALONG[node.target]
            dim = node.args[position] if position < len(node.args) else 0
            return dim in (-1, rank - 1) and all(map(self._is_rows, node.all_input_nodes))
        if node.target in TURNS:
            return self._is_rows(node.all_input_nodes[0]) and _swaps(node)
        if node.target in RESHAPES:
            source = node.all_input_nodes[0]
            return self._is_rows(node) and self._is_rows(source) and _width(source) == _width(node)
        if not (ops.is_pointwise(node) or node.target in _LIKE_POINTWISE):
            return False
        return self._is_rows(node) and all(
            self._is_rows_like(n, node) or _is_same_for_all_rows(n) for n in ops.tensor_inputs(node)
        )

    def _is_product_of_rows(self, node: fx.Node) -> bool:
        a, b = _factors(node)
        if self._contracts(node):
            return node.target is aten.mm.default
        inner = self.region.nodes
        if b in inner or (node.kwargs or not self._is_rows(a)):
            return False
        bias = node.args[0] if node.target is aten.addmm.default else None
        return bias is None or (isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1)

    def _contracts(self, node: fx.Node) -> bool:
        """Whether a product sums over rows: [k, n] x [n, m] with a factor from the region."""
        a, b = _factors(node)
        region = self.region
        if b in region.nodes and b not in region.turned:
            return bool(a.meta["val"].shape[1] == region.rows)
        return a in region.turned and a in region.nodes

    def _turned_operand(self, node: fx.Node) -> fx.Node | None:
        return _factors(node)[0] if node.target in PRODUCTS and self._contracts(node) else None

    def _sums(self, node: fx.Node) -> bool:
        if node.target in PRODUCTS:
            return self._contracts(node)
        if node.target not in SUMS:
            return False
        source = node.all_input_nodes[0].meta["val"]
        dims: Any = node.args[1]
        return sorted(d % source.dim() for d in dims) == list(range(source.dim() - 1))

    def _row_operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """The inputs of which a chunk needs its own rows only."""
        if node.target in PRODUCTS:
            a, b = _factors(node)
            yield a
            if self._contracts(node):
                yield b
            return
        if node.target in LABELS:
            yield from _with_labels(node)
            return
        for source in ops.tensor_inputs(node):
            if not _is_same_for_all_rows(source) or source in self.region.nodes:
                yield source

    def is_inner(self, node: fx.Node) -> bool:
        """Whether a value is so large that it must not leave the region."""
        if node.op != "call_function" or node in self.cut or runs_in(node) is not self.side:
            return False
        return tensor_bytes(node.meta["val"]) >= self.wide and self._may_run_by_rows(node)

    def _is_rows(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.dim() < 2 or node in self.region.turned:
            return False
        return all(isinstance(s, int) for s in val.shape) and prod(val.shape[:-1]) == (
            self.region.rows
        )

    def _is_rows_like(self, source: fx.Node, node: fx.Node) -> bool:
        if not self._is_rows(source):
            return False
        same: bool = source.meta["val"].shape[:-1] == node.meta["val"].shape[:-1]
        return same


_LIKE_POINTWISE = (aten.clone.default, aten._to_copy.default)


def _is_same_for_all_rows(node: fx.Node) -> bool:
    """Whether a value is broadcast over rows: a number, or one row."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and prod(val.shape[:-1]) == 1


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], (tuple, list)) or ops.is_getitem(node)


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    arguments: Any = node.args[1:] if node.target is aten.addmm.default else node.args
    return arguments[0], arguments[1]


def _swaps(node: fx.Node) -> bool:
    """Whether a transposition swaps the dimensions of a matrix."""
    val, dims = node.meta.get("val"), [1, 0]
    if node.target is not aten.t.default:
        given: Any = node.args[1:] if node.target is aten.transpose.int else node.args[1]
        dims = [d % 2 for d in given]
    swapped = dims == [1, 0] or (node.target is aten.transpose.int and dims == [0, 1])
    return isinstance(val, torch.Tensor) and val.dim() == 2 and swapped


def _with_labels(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Log-probabilities and class numbers of a loss."""
    arguments: Any = node.args
    position = LABELS[node.target]
    return arguments[position - 1], arguments[position]


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])
