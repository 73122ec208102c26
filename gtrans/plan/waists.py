"""Narrow places of the forward: where little is alive, a checkpoint costs little.

At position p of the forward, the later forward still needs some of what was computed up to p. Where
that is least (in a transformer the residual stream alone, in a U-Net the stream and the skips) the
graph is cut into segments of about equal saved bytes:

    crossing(p) = bytes of the values made at or before p that the forward reads after p

Source: articulation points of Chen et al. 2016 (arXiv:1604.06174), weakened to local minima so that
graphs without any articulation point have segments too.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from itertools import accumulate

from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.ops import storage_of
from gtrans.ir.sizes import tensor_bytes


class Waists:
    """The narrow places of one forward.

    Args:
        joint: the graph, not changed.
        saved: what autograd would keep; segments get about the same share of its bytes.
    """

    def __init__(self, joint: JointGraph, saved: Collection[fx.Node]) -> None:
        self.nodes = [n for n in joint.nodes if joint.is_forward(n) and n.op == "call_function"]
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self._last: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            for source in ops.tensor_inputs(node):
                owner = storage_of(source)
                if owner in self.position:
                    self._last[owner] = i
        changes = [0] * (len(self.nodes) + 1)
        for owner, last in self._last.items():
            if _is_tensor(owner):
                size = tensor_bytes(owner.meta["val"])
                changes[self.position[owner]] += size
                changes[last] -= size
        self.crossing = list(accumulate(changes))[: len(self.nodes)]
        weights = [0] * len(self.nodes)
        for node in saved:
            if node in self.position:
                weights[self.position[node]] += tensor_bytes(node.meta["val"])
        self._weight = list(accumulate(weights))

    def boundaries(self, segments: int) -> tuple[int, ...]:
        """Positions that cut the forward into about this many segments, each a narrow place."""
        total = self._weight[-1] if self._weight else 0
        if not total:
            return ()
        found: set[int] = set()
        for i in range(1, segments):
            target, slack = total * i / segments, total / segments / 2
            low = bisect_left(self._weight, target - slack)
            high = bisect_right(self._weight, target + slack)
            window = range(low, min(high, len(self.nodes) - 1))
            if window:
                found.add(
                    min(window, key=lambda p: (self.crossing[p], abs(self._weight[p] - target)))
                )
        return tuple(sorted(found))

    def values_at(self, position: int) -> frozenset[fx.Node]:
        """The values that cross a position."""
        return frozenset(
            owner
            for owner, last in self._last.items()
            if self.position[owner] <= position < last and _is_tensor(owner)
        )


def _is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("val"), "element_size")
