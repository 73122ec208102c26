"""Keep indices for the backward in the narrowest integers that hold them.

    y, i = max_pool2d(x, 2)                   y, i = max_pool2d(x, 2)
                                              n    = i.to(uint8)              # saved, 1 byte
    dx   = max_pool2d_backward(dy, x, i) -->  dx   = max_pool2d_backward(dy, x, n.to(int64))

Shapes: i: [*s] of int64 or int32; n: [*s] of uint8, int16 or int32.
Saves: numel * (itemsize of i - itemsize of n) bytes per match.
Costs: one conversion in the forward, one in the backward.
Contract: exact, bit for bit: every index is below a size that its operator was given.
Needs: that size as a plain number; a symbolic one has no bound.
Source: gtrans; the bounds are those of torch's operators.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass, require
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel


@dataclass(frozen=True)
class NarrowIntegers(SitePass[JointGraph]):
    """Offer indices of at least `min_numel` elements from a copy in a narrower type."""

    name: ClassVar[str] = "narrow-integers"
    knob: ClassVar[Knob] = Knob.RESIDUAL
    contract: ClassVar[Contract] = Exact()

    min_numel: int = 4096

    def __post_init__(self) -> None:
        problem = f"narrow-integers: min_numel must be at least 1, got {self.min_numel}"
        require(self.min_numel >= 1, problem)

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """Every wide integer value with a storage of its own that the backward reads."""
        return [n for n in graph.nodes if _is_wide(graph, n) and graph.backward_readers(n)]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses inputs, small tensors, and values without a bound that helps."""
        if site.op == "placeholder":
            return "an input of the model, in memory anyway"
        if numel(site.meta["val"]) < self.min_numel:
            return "fewer elements than min_numel"
        count = ops.index_bound(site)
        if count is None:
            return "its operator states no bound"
        if not isinstance(count, int):
            return "its bound is a symbolic size"
        return "already as narrow as its bound" if ops.narrowest_index(site) is None else None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Narrows in the forward and offers the widened copy to the backward."""
        (copy,) = graph.splice_after(site, torch.Tensor.to, site, ops.narrowest_index(site))
        graph.offer(site, torch.Tensor.to, copy, site.meta["val"].dtype)


def _is_wide(graph: JointGraph, node: fx.Node) -> bool:
    val = node.meta.get("val")
    wide = isinstance(val, torch.Tensor) and val.dtype in (torch.int64, torch.int32)
    return wide and graph.is_forward(node) and not ops.is_view(node)
