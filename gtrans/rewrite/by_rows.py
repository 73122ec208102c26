"""Compute a region of rows chunk by chunk: see `gtrans.analysis.row_regions`.

    y = f(x)            y_0 = f(x[0:c]); y_1 = f(x[c:2c]); ...; y = cat(y_0, y_1, ...)
    dW = mm(g^T, x)     dW = mm(g_0^T, x_0); dW = addmm(dW, g_1^T, x_1); ...

Costs: no floating-point operation more; a copy of the rows that are joined, and one more pass over
    each sum per chunk.
Contract: exact up to the order of sums over rows.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gtrans.analysis.row_regions import ALONG, LOSS, RESHAPES, SUMS, RowRegion, place_of
from gtrans.ir import ops
from gtrans.ir.joint import TAG, JointGraph, Placement, Side, runs_in, tag

aten = torch.ops.aten

# Torch's numbers for the reductions of a loss.
_MEAN, _SUM = 1, 2


def compute_by_rows(graph: JointGraph, region: RowRegion, chunks: int) -> None:
    """Rewrites a region of a planned graph in place; the plan stays.

    Args:
        graph: with its cut.
        region: of this graph.
        chunks: how many parts its rows are taken in.
    """
    cut = graph.cut
    anchor = place_of(graph, region)
    assert anchor is not None  # else it would be no region
    assert cut is not None
    writer = _Writer(graph, region, anchor)
    step = -(-region.rows // chunks)
    for start in range(0, region.rows, step):
        writer.chunk(start, min(start + step, region.rows))
    made = writer.finish()
    for old, new in made.items():
        graph.replace_uses(old, new, [u for u in old.users if u not in region.nodes])
    for node in sorted(region.nodes, reverse=True):
        graph.erase(node)
    graph.cut = tuple(sorted(made.get(n, n) for n in cut))


class _Writer:
    def __init__(self, graph: JointGraph, region: RowRegion, anchor: fx.Node) -> None:
        self.graph = graph
        self.region = region
        self.anchor = anchor
        self.nodes = sorted(region.nodes)
        self.side = runs_in(self.nodes[0])
        self.flat: dict[fx.Node, fx.Node] = {}
        self.parts: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes if n in region.joined}
        self.sums: dict[fx.Node, fx.Node] = {}

    def chunk(self, start: int, end: int) -> None:
        """Inserts the nodes of one chunk of rows."""
        made = {s: self._rows_of(s, start, end) for s in sorted(self.region.sliced)}
        for node in self.nodes:
            if node in self.region.added:
                self._add(node, made)
                continue
            made[node] = self._copy(node, made)
            if node in self.region.joined:
                self.parts[node].append(made[node])

    def finish(self) -> dict[fx.Node, fx.Node]:
        """Joins the chunks; returns what takes the place of each result."""
        found = {}
        for node, parts in self.parts.items():
            found[node] = self._shaped(self._call(aten.cat.default, parts, 0), node)
        for node, total in self.sums.items():
            found[node] = self._shaped(total, node)
        for loss in [n for n in self.nodes if n.target is LOSS]:
            self._take_mean(loss, found)
        return found

    def _take_mean(self, loss: fx.Node, found: dict[fx.Node, fx.Node]) -> None:
        """Chunks of a mean were added up; it is their sum divided by the sum of what counts."""
        parts = ops.parts(loss)
        if ops.argument(loss, "reduction") == _MEAN and 0 in parts:
            args = found[parts[0]], found[parts[1]]
            found[parts[0]] = self._call(aten.div.Tensor, *args)

    def _copy(self, node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
        if node.target in RESHAPES:
            return made[node.all_input_nodes[0]]
        args: list[Any] = list(self._mapped(node.args, made))
        if node.target in ALONG:
            args[ALONG[node.target]] = -1
        if node.target is LOSS:
            args[3] = _SUM
        kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
        return self._call(node.target, *args, **self._mapped(kwargs, made))

    def _add(self, node: fx.Node, made: dict[fx.Node, fx.Node]) -> None:
        """Adds a chunk's part of a sum over rows; sums of halves are taken in float32."""
        half = node.meta["val"].dtype in (torch.float16, torch.bfloat16)
        if ops.is_getitem(node):
            part = self._call(operator.getitem, made[node.all_input_nodes[0]], node.args[1])
        elif node.target in SUMS:
            part = self._call(aten.sum.dim_IntList, made[node.all_input_nodes[0]], [0])
        elif node in self.sums and not half:
            self.sums[node] = self._call(
                aten.addmm.default, self.sums[node], *self._mapped(node.args, made)
            )
            return
        else:
            part = self._call(node.target, *self._mapped(node.args, made))
        if half:
            part = self._call(aten._to_copy.default, part, dtype=torch.float32)
        if node in self.sums:
            part = self._call(aten.add.Tensor, self.sums[node], part)
        self.sums[node] = part

    def _rows_of(self, source: fx.Node, start: int, end: int) -> fx.Node:
        if source.meta["val"].dim() == 1:
            return self._call(aten.slice.Tensor, source, 0, start, end)
        if source in self.region.turned:
            return self._call(aten.slice.Tensor, source, 1, start, end)
        return self._call(aten.slice.Tensor, self._flat(source), 0, start, end)

    def _flat(self, source: fx.Node) -> fx.Node:
        """Rows as [n, k], one row as [k]."""
        val = source.meta["val"]
        if source not in self.flat:
            one = source not in self.region.sliced
            shape = [val.shape[-1]] if one else [self.region.rows, val.shape[-1]]
            same = val.dim() == len(shape)
            self.flat[source] = source if same else self._call(aten.reshape.default, source, shape)
        return self.flat[source]

    def _mapped(self, arguments: Any, made: dict[fx.Node, fx.Node]) -> Any:
        def mapped(n: fx.Node) -> fx.Node:
            if n in made:
                return made[n]
            val = n.meta.get("val")
            one = isinstance(val, torch.Tensor) and val.dim() > 2 and not ops.is_symbol(n)
            return self._flat(n) if one else n

        return fx.map_arg(arguments, mapped)

    def _shaped(self, node: fx.Node, like: fx.Node) -> fx.Node:
        val = like.meta["val"]
        if node.meta["val"].dtype != val.dtype:
            node = self._call(aten._to_copy.default, node, dtype=val.dtype)
        if list(node.meta["val"].shape) == list(val.shape):
            return node
        return self._call(aten.view.default, node, list(val.shape))

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.insert_before(self.anchor, target, *args, **kwargs)
        if self.side is Side.BACKWARD and tag(node).side is Side.FORWARD:
            node.meta[TAG] = replace(tag(node), placement=Placement.REBUILT)
        return node
