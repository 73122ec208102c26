"""Keep boolean masks for the backward eight to a byte.

    mask = bernoulli(...), le(y, 0), ...          packed = pack(mask)           # saved, 1/8 byte
    dx   = f(dy, mask)                     -->    dx     = f(dy, unpack(packed))

Shapes: mask: [*s] of bool; packed: [*s] of uint8 with one dimension divided by 8.
Saves: 7/8 of numel bytes per mask.
Costs: one read of the mask and numel/8 bytes written in the forward; the reverse in the backward.
Contract: exact, bit for bit.
Needs: a dimension of known size that is a multiple of 8.
Source: gtrans; ActNN (arXiv:2104.14129) and GACT store masks the same way.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass, require
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.runtime.bits import pack, packed_dim, unpack


@dataclass(frozen=True)
class BitMasks(SitePass[JointGraph]):
    """Offer packed bits for every boolean mask that the backward reads.

    Args:
        min_numel: leave masks with fewer elements alone.
    """

    name: ClassVar[str] = "bit-masks"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    min_numel: int = 4096

    def __post_init__(self) -> None:
        require(
            self.min_numel >= 1,
            f"bit-masks: min_numel must be at least 1, got {self.min_numel}",
        )

    @property
    def contract(self) -> Contract:
        """The same gradient, bit for bit."""
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """Every boolean forward value that the backward reads."""
        return [
            n
            for n in graph.nodes
            if graph.is_forward(n) and _is_mask(n) and graph.backward_readers(n)
        ]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses inputs, small masks and sizes that do not divide by eight."""
        if site.op == "placeholder":
            return "an input of the model, in memory anyway"
        if numel(site.meta["val"]) < self.min_numel:
            return "fewer elements than min_numel"
        if packed_dim(site.meta["val"]) is None:
            return "no dimension of known size is a multiple of 8"
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Packs in the forward and offers the unpacked bits to the backward."""
        dim = packed_dim(site.meta["val"])
        assert dim is not None
        (packed,) = graph.splice_after(site, partial(pack, dim=dim), site)
        graph.offer(site, partial(unpack, dim=dim), packed)


def _is_mask(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype is torch.bool
