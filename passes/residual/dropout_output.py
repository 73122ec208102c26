"""Compute dropout's output again from its input and mask instead of keeping it.

    y, mask = native_dropout(x, p)                  y, mask = native_dropout(x, p)   # keeps x, mask
    dw      = f(dy, y)                     -->      dw      = f(dy, x * mask / (1 - p))

Shapes: x, y: [*s] of one floating dtype; mask: [*s] of bool.
Saves: numel * itemsize bytes where x is kept for another reason (attention weights: the softmax
    keeps its output, and the product with the values reads the dropped-out copy).
Costs: two products per element in the backward.
Contract: exact, bit for bit: the kernel multiplies by the mask and by the scale in this order. The
    mask is the one of the forward and is never drawn again.
Source: gtrans.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.runtime.again import drop

aten = torch.ops.aten


@dataclass(frozen=True)
class DropoutOutput(SitePass[JointGraph]):
    """Offer dropout's output as a product of its input and mask."""

    name: ClassVar[str] = "dropout-output"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    @property
    def contract(self) -> Contract:
        """The same gradient, bit for bit."""
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """Every dropout."""
        return graph.calls(aten.native_dropout.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses dropouts that do nothing."""
        _, p, train = site.args
        if p == 0 or train is False:
            return "drops nothing"
        if p == 1:
            return "drops everything"
        if len(ops.parts(site)) < 2:
            return "its mask is not used"
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Offers the product."""
        x, p, _ = site.args
        assert isinstance(p, float)
        parts = ops.parts(site)
        graph.offer(parts[0], drop, x, parts[1], 1 / (1 - p), passes_over_memory=1.5)
