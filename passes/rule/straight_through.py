"""Let cotangents pass through rounding unchanged: the straight-through estimator.

    y  = round(x)                       y  = round(x)
    dx = zeros_like(dy)          -->    dx = dy

Shapes: x, y, dy, dx: [*s] of one floating dtype.
Saves: nothing; it costs nothing either.
Contract: aligned. Rounding has a zero gradient almost everywhere; the one of the identity points
    along the loss of the unrounded model.
Needs: a rounding that autograd knows: round, floor, ceil, trunc and sign. A cast to integers and
    back has no backward at all, so there is nothing to rewrite.
Source: straight-through estimation, arXiv:1308.3432, section 3 (without its saturation: clamp the
    input in the model where the estimator is to stop outside a range).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Aligned, Contract
from gtrans.core import Knob, SitePass
from gtrans.ir.joint import JointGraph

aten = torch.ops.aten

_ROUNDINGS = (
    aten.round.default,
    aten.round.decimals,
    aten.floor.default,
    aten.ceil.default,
    aten.trunc.default,
    aten.sign.default,
)


@dataclass(frozen=True)
class StraightThrough(SitePass[JointGraph]):
    """Give every rounding the backward of the identity."""

    name: ClassVar[str] = "straight-through"
    knob: ClassVar[Knob] = Knob.RULE

    @property
    def contract(self) -> Contract:
        """A direction, no gradient."""
        return Aligned()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The zeros that autograd makes of the cotangent of a rounding."""
        regions = graph.regions().values()
        rounding = [r for r in regions if any(n.target in _ROUNDINGS for n in r.forward)]
        return [n for r in rounding for n in r.backward if n.target is aten.zeros_like.default]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses nothing: zeros of a rounding's region are its gradient."""
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Passes the cotangent on."""
        dy = site.args[0]
        assert isinstance(dy, fx.Node)
        graph.replace(site, dy)
