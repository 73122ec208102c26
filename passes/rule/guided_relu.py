"""Let only positive cotangents through a ReLU: guided backpropagation.

    y  = relu(x)                                y  = relu(x)
    dx = threshold_backward(dy, y, 0)    -->    up = relu(dy)
                                                dx = threshold_backward(up, y, 0)

Shapes: y, dy, up, dx: [*s] of one floating dtype.
Saves: nothing.
Costs: one pointwise operator in the backward, which fuses.
Contract: attribution, dx = relu(dy) * [y > 0]. Not linear in the cotangent, only positively
    homogeneous, so gradients of several batches may not be added up.
Needs: ReLUs; activations with a threshold other than zero keep their rule.
Source: guided backpropagation, arXiv:1412.6806, section 3.4 (the deconvolution rule of
    arXiv:1311.2901 is relu(dy) without the mask and is not offered).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Attribution, Contract
from gtrans.core import Knob, SitePass
from gtrans.ir.joint import JointGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class GuidedRelu(SitePass[JointGraph]):
    """Rectify the cotangent of every ReLU."""

    name: ClassVar[str] = "guided-relu"
    knob: ClassVar[Knob] = Knob.RULE
    linear: ClassVar[bool] = False

    @property
    def contract(self) -> Contract:
        """An attribution, no gradient."""
        return Attribution(law="dx = relu(dy) * [y > 0]")

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The backward of every ReLU and threshold."""
        return graph.calls(aten.threshold_backward.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses other thresholds, and cotangents that are rectified already."""
        dy, y, threshold = site.args
        if threshold != 0 or not graph.is_forward(y):
            return "not the backward of a forward ReLU"
        if isinstance(dy, fx.Node) and dy.target is aten.relu.default:
            return "its cotangent is rectified already"
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Rectifies the cotangent."""
        dy, y, threshold = site.args
        up = graph.insert_before(site, aten.relu.default, dy)
        guided = graph.insert_before(site, aten.threshold_backward.default, up, y, threshold)
        graph.replace(site, guided)
