"""Compute the cross-entropy of a linear layer a chunk of tokens at a time.

    z = linear(h, W, b)                          for each chunk of rows of h: z, loss, and at once
    l = cross_entropy(z.view(-1, V), y)    -->       its part of dh, dW, db; z is dropped
    backward: dz, dh, dW, db                     backward: dh, dW, db times dl

Shapes: h: [*s, D]; W: [V, D]; b: [V]; z: [*s, V]; y: [n], n the product of s.
Saves: logits and their log-softmax, about 2 n V elements; keeps dh and dW, n D + V D, instead.
Costs: nothing in training: the three products are those of the backward, done earlier.
Contract: exact up to the order of sums (dW is summed chunk by chunk).
Needs: nothing else reads the logits; class numbers as targets, no class weights.
Source: the loss of Liger Kernel (arXiv:2410.10989, section 3.2), in plain torch; not its kernels.
"""

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass, require
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.runtime.chunked_loss import chunked_cross_entropy

_RESHAPES = ("float", "view", "reshape", "flatten", "contiguous", "to")


@dataclass(frozen=True)
class ChunkedLoss(SitePass[ForwardGraph]):
    """Never hold all logits of a cross-entropy.

    Args:
        chunks: how many parts the tokens are taken in.
        min_numel: leave losses with fewer logits alone.
    """

    name: ClassVar[str] = "chunked-loss"
    knob: ClassVar[Knob] = Knob.OPERATOR
    works_on: ClassVar[type[JointGraph] | type[ForwardGraph]] = ForwardGraph

    chunks: int = 8
    min_numel: int = 1 << 20

    def __post_init__(self) -> None:
        for option in ("chunks", "min_numel"):
            given = getattr(self, option)
            require(given >= 1, f"chunked-loss: {option} must be at least 1, got {given}")

    @property
    def contract(self) -> Contract:
        """The same gradient, up to the order of sums."""
        return Exact(bitwise=False)

    def sites(self, graph: ForwardGraph) -> Iterable[fx.Node]:
        """Every cross-entropy."""
        return graph.calls(F.cross_entropy)

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        """Refuses losses of anything but a product that nobody else reads."""
        given = _arguments(site)
        logits, target = value(given["input"]), value(given["target"])
        if given["reduction"] not in ("mean", "sum"):
            return "no scalar loss"
        if given["weight"] is not None:
            return "has class weights"
        if target.is_floating_point():
            return "its targets are probabilities"
        if logits.dim() != 2:
            return "its logits are not [tokens, classes]"
        if numel(logits) < self.min_numel:
            return "fewer logits than min_numel"
        product = _chain(given["input"])
        if isinstance(product, str):
            return product
        weight = _factors(product)[1]
        return None if weight is not None else f"its logits come from {_name(product)}"

    def rewrite(self, graph: ForwardGraph, site: fx.Node) -> None:
        """Calls the chunked loss instead."""
        given = _arguments(site)
        product = _chain(given["input"])
        assert isinstance(product, fx.Node)
        hidden, weight, bias = _factors(product)
        loss = graph.insert_before(
            site,
            chunked_cross_entropy,
            hidden,
            weight,
            bias,
            given["target"],
            self.chunks,
            value(site).dtype,
            given["ignore_index"],
            given["reduction"] == "mean",
            given["label_smoothing"],
        )
        graph.replace(site, loss)


def _arguments(site: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(F.cross_entropy).bind(*site.args, **site.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _chain(node: fx.Node) -> fx.Node | str:
    """The product behind casts and reshapes that keep its rows, or why there is none."""
    classes = value(node).shape[-1]
    while True:
        if len(node.users) > 1:
            return "its logits are read elsewhere too"
        if value(node).shape[-1] != classes:
            return "a reshape mixes classes and tokens"
        if node.op != "call_method" or node.target not in _RESHAPES:
            return node
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source


def _factors(product: fx.Node) -> tuple[Any, Any, Any]:
    """(hidden, weight [V, D], bias or None) of a linear layer or a product with W^T."""
    if product.target is F.linear:
        bound = dict(zip(("input", "weight", "bias"), product.args, strict=False)) | product.kwargs
        return bound["input"], bound["weight"], bound.get("bias")
    if product.target in (torch.matmul, operator.matmul):
        hidden, turned = product.args
        if isinstance(turned, fx.Node) and _is_transpose(turned):
            return hidden, turned.args[0], None
    return None, None, None


def _is_transpose(node: fx.Node) -> bool:
    if node.op == "call_method":
        swaps = node.target == "transpose" and set(node.args[1:]) in ({0, 1}, {-1, -2})
        return node.target == "t" or swaps
    return node.target is getattr and node.args[1] in ("T", "mT")


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
