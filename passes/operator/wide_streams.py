"""Keep the streams of additive couplings in a wider type than the branches compute in.

    y = x + f(z)        -->        y' = x' + wide(f(narrow(z')));  readers of y read narrow(y')

The cast back to the branches' type absorbs what a rebuilt stream is off by: with float64 streams a
branch in float32 or below sees the same bits again (the rounding gate). With `bits` the streams are
fixed point numbers on a grid 2^-bits, for which that is certain and not only all but certain.

Saves: nothing by itself; `reversible`, later in the pipeline, keeps two streams of twice the bytes
    and everything else for nothing. Streams in float16 or bfloat16 become admissible to it.
Costs: a cast for each read and each sum.
Contract: exact up to the order of sums (streams round less than before); with a grid, close. The
    gradient of `wide-streams,reversible` is bitwise that of `wide-streams` where casts absorb all.
Needs: couplings, as `reversible` finds them. Permutations, splits, casts between are widened too.
Source: gtrans; "64-bit accumulation" is what reversible optimisation of arXiv:1502.03492 uses.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from gtrans.analysis.couplings import computed_forward, find_couplings
from gtrans.analysis.grids import grids
from gtrans.analysis.links import is_link
from gtrans.contract import Close, Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, tag

aten = torch.ops.aten

WIDE = "the streams are as wide already"
MADE = "this pass has widened streams of this graph before"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_MOST_BITS = 40


@dataclass(frozen=True)
class WideStreams(Pass[JointGraph]):
    """Widen the streams of couplings.

    Args:
        dtype: of the streams, "float64" or "float32".
        bits: binary places of a grid that the streams lie on; 0 for none. Needs float64.
    """

    name: ClassVar[str] = "wide-streams"
    knob: ClassVar[Knob] = Knob.OPERATOR

    dtype: Literal["float64", "float32"] = "float64"
    bits: int = 0

    def __post_init__(self) -> None:
        bits = f"wide-streams: bits must be between 0 and {_MOST_BITS}, got {self.bits}"
        require(0 <= self.bits <= _MOST_BITS, bits)
        wide = not self.bits or self.dtype == "float64"
        require(wide, "wide-streams: a grid needs streams in float64")

    @property
    def contract(self) -> Contract:
        """The same function up to rounding of the streams."""
        return Close(2.0 ** (4 - self.bits)) if self.bits else Exact(bitwise=False)

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Widens the sums, and what lies between them."""
        couplings = find_couplings(graph, low_precision=True)
        stats = Stats(couplings.sites)
        stats.refuse_all(couplings.refused)
        chosen: set[fx.Node] = set()
        dtype, on_grid = _DTYPES[self.dtype], grids(computed_forward(graph))
        starts: set[fx.Node] = set()
        # What is no coupling beside narrow streams may look like one beside wide ones.
        widened = any(n.op != "output" and tag(n).made_by == self.name for n in graph.nodes)
        for coupling in couplings.found:
            wide = _bytes(coupling.output) >= dtype.itemsize and not self.bits
            if wide or coupling.output in on_grid:
                stats.refuse(coupling.output, WIDE)
            elif widened:
                stats.refuse(coupling.output, MADE)
            elif permitted(coupling.output.name):
                chosen.add(coupling.output)
                starts.add(coupling.stream)
            else:
                stats.refuse(coupling.output, HELD_BACK)
        stats.rewritten = len(chosen)
        _Widener(graph, dtype, self.bits).run(chosen, starts)
        return stats


class _Widener:
    """Makes a wide twin of each stream value, in order, and lets all readers read its cast."""

    def __init__(self, graph: JointGraph, dtype: torch.dtype, bits: int) -> None:
        self.graph = graph
        self.dtype = dtype
        self.bits = bits
        self.twins: dict[fx.Node, fx.Node] = {}
        self.widened: dict[fx.Node, fx.Node] = {}

    def run(self, sums: set[fx.Node], streams: set[fx.Node]) -> None:
        for node in computed_forward(self.graph):
            moved = any(n in self.twins for n in node.all_input_nodes) and is_link(node)
            if node in sums or moved:
                self._twin(node)
            elif node in streams and self.bits:
                # Where a stream starts, branches must read what it is rounded to.
                users = list(node.users)
                self._wide(node, node.next)
                self._narrow(node, self.widened[node], users)

    def _twin(self, node: fx.Node) -> None:
        graph, users, anchor = self.graph, list(node.users), node.next
        if node.target is aten._to_copy.default:
            twin = self.twins[node.all_input_nodes[0]]
        else:
            inputs = {n: self._wide(n, anchor) for n in ops.tensor_inputs(node)}
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: inputs.get(n, n))
            target: Any = node.target
            twin = graph.insert_before(anchor, target, *args, **kwargs)
        self.twins[node] = twin
        if isinstance(node.meta["val"], torch.Tensor):
            self._narrow(node, twin, users)

    def _narrow(self, node: fx.Node, twin: fx.Node, users: list[fx.Node]) -> None:
        """Lets readers read a stream value from its twin."""
        dtype = node.meta["val"].dtype
        narrow = self.graph.insert_before(twin.next, aten._to_copy.default, twin, dtype=dtype)
        self.graph.replace_uses(node, narrow, users)
        self.twins[narrow] = twin

    def _wide(self, node: fx.Node, anchor: fx.Node) -> fx.Node:
        """The twin of a stream value; a cast of anything else, rounded to the grid."""
        if node in self.twins:
            return self.twins[node]
        if node not in self.widened:
            wide = self.graph.insert_before(anchor, aten._to_copy.default, node, dtype=self.dtype)
            if self.bits:
                for target, factor in ((aten.mul.Tensor, 2.0**self.bits), (aten.round.default, 0)):
                    rest = (factor,) if factor else ()
                    wide = self.graph.insert_before(anchor, target, wide, *rest)
                wide = self.graph.insert_before(anchor, aten.mul.Tensor, wide, 2.0**-self.bits)
            self.widened[node] = wide
        return self.widened[node]


def _bytes(node: fx.Node) -> int:
    size: int = node.meta["val"].element_size()
    return size
