"""Keep ReLU's sign mask for the backward pass instead of ReLU's output.

    y  = relu(x)                              y   = relu(x)
                                              off = le(y, 0)         # 1 byte, if kept
    dx = threshold_backward(dy, y, 0)   -->   dx  = masked_fill(dy, off, 0)

Shapes: x, y, dx, dy: [*s] of one floating dtype; off: [*s] bool.
Saves: numel * (itemsize - 1) bytes per match; `bit-masks` makes that numel * (itemsize - 1/8).
Contract: exact, including NaN (`le`, not `gt`: a NaN in y lets dy through, as ATen does).
Needs: nothing else in the backward reads y; otherwise y is saved anyway.
Source: gtrans (bit-mask form of few-bit activations, arXiv:2202.00441, with one bin edge).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass, require
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel

aten = torch.ops.aten


@dataclass(frozen=True)
class ReluMask(SitePass[JointGraph]):
    """Replace a saved ReLU output by a saved boolean mask.

    Args:
        min_numel: leave tensors with fewer elements alone.
    """

    name: ClassVar[str] = "relu-mask"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    min_numel: int = 4096

    def __post_init__(self) -> None:
        require(
            self.min_numel >= 1,
            f"relu-mask: min_numel must be at least 1, got {self.min_numel}",
        )

    @property
    def contract(self) -> Contract:
        """The same gradient, bit for bit."""
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The backward of every ReLU and threshold."""
        return graph.calls(aten.threshold_backward.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses thresholds other than zero, small tensors, and outputs that stay saved."""
        _, y, threshold = site.args
        if threshold != 0 or not isinstance(y, fx.Node) or not graph.is_forward(y):
            return "not the backward of a forward ReLU"
        if numel(y.meta["val"]) < self.min_numel:
            return "fewer elements than min_numel"
        if graph.backward_readers(y) != [site]:
            return "another backward operator reads the output, so it stays saved"
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Lets the backward read the mask."""
        dy, y, _ = site.args
        assert isinstance(y, fx.Node)
        # Left to the planner: where y costs nothing to compute again, the mask is not kept either.
        off = graph.insert_after(y, aten.le.Scalar, y, 0)
        dx = graph.insert_before(site, aten.masked_fill.Scalar, dy, off, 0)
        graph.replace(site, dx)
