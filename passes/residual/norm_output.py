"""Compute a batch norm's output again from its input and saved statistics.

    y, mean, rstd = batch_norm(x, w, b)             y, mean, rstd = batch_norm(x, w, b)
    dk            = f(dz, relu(y))         -->      dk = f(dz, relu((x - mean) * rstd * w + b))

Shapes: x, y: [N, C, *s]; mean, rstd, w, b: [C].
Saves: numel * itemsize bytes per match: x is kept for the norm's own backward, so y need not be.
Costs: one pointwise pass in the backward, which fuses with the activation that follows.
Contract: exact up to the order of operations; the running statistics are not touched again.
Needs: training mode (batch statistics).
Source: gtrans; in-place activated batch norm (arXiv:1712.02616) saves the same bytes by inverting.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.runtime.again import normalise

aten = torch.ops.aten

# All return (y, mean, rstd, ...); they differ in what they do with the running statistics, and so
# in the position of the argument that says whether batch statistics are used.
_TRAINING_ARGUMENT: dict[Any, int] = {
    aten._native_batch_norm_legit_functional.default: 5,
    aten._native_batch_norm_legit.no_stats: 3,
    aten.native_batch_norm.default: 5,
}


@dataclass(frozen=True)
class NormOutput(SitePass[JointGraph]):
    """Offer a batch norm's output as a function of its input and statistics."""

    name: ClassVar[str] = "norm-output"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    @property
    def contract(self) -> Contract:
        """The same gradient, up to the order of operations."""
        return Exact(bitwise=False)

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """Every batch norm."""
        return graph.calls(*_TRAINING_ARGUMENT)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses norms in evaluation mode, and those whose output the backward does not need."""
        if site.args[_TRAINING_ARGUMENT[site.target]] is not True:
            return "not in training mode"
        parts = ops.parts(site)
        if any(i not in parts for i in (0, 1, 2)):
            return "its output or statistics are not used"
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Offers the affine map."""
        x, weight, bias = site.args[:3]
        parts = ops.parts(site)
        graph.offer(parts[0], normalise, x, parts[1], parts[2], weight, bias)
