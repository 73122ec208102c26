"""Compute the cross-entropy of a linear layer a chunk of tokens at a time.

    z = linear(h, W, b)                          for each chunk of rows of h: z, loss, and at once
    l = cross_entropy(z.view(-1, V), y)    -->       its part of dh, dW, db; z is dropped
    backward: dz, dh, dW, db                     backward: dh, dW, db times dl

Shapes: h: [*s, D]; W: [V, D]; b: [V]; z: [*s, V]; y: [n], n the product of s.
Saves: logits and their log-softmax, about 2 n V elements; keeps dh and dW, n D + V D, instead.
Costs: no product more: the three are those of the backward, done earlier, each reading W once per
    chunk. Without a reduction nothing but h is kept, and the first product is done again.
Contract: exact up to the order of sums (dW is summed chunk by chunk).
Needs: nothing else reads the logits; class numbers as targets. Between product and loss there may
    be steps on rows, casts, factors, and a cap c tanh(z). The loss may be written as `nll_loss` of
    `log_softmax`.
Source: the loss of Liger Kernel (arXiv:2410.10989, section 3.2), in plain torch; not its kernels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import GraphKind, Knob, SitePass, require
from gtrans.ir.forward import ForwardGraph, arguments, value
from gtrans.ir.sizes import numel
from gtrans.rewrite.row_steps import READ_ELSEWHERE, RowSteps, product_behind
from gtrans.runtime.chunked_loss import chunked_cross_entropy


@dataclass(frozen=True)
class ChunkedLoss(SitePass[ForwardGraph]):
    """Never hold all logits of a cross-entropy: `chunks` parts, from `min_numel` logits on."""

    name: ClassVar[str] = "chunked-loss"
    knob: ClassVar[Knob] = Knob.OPERATOR
    works_on: ClassVar[GraphKind] = ForwardGraph
    contract: ClassVar[Contract] = Exact(bitwise=False)

    chunks: int = 6
    min_numel: int = 1 << 20

    def __post_init__(self) -> None:
        for option in ("chunks", "min_numel"):
            given = getattr(self, option)
            require(given >= 1, f"chunked-loss: {option} must be at least 1, got {given}")

    def sites(self, graph: ForwardGraph) -> Iterable[fx.Node]:
        """Every cross-entropy, and every loss of log-probabilities."""
        return [*graph.calls(F.cross_entropy), *graph.calls(F.nll_loss)]

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        """Refuses losses of anything but rows of a product that nobody else reads."""
        given = _arguments(site)
        if isinstance(given, str):
            return given
        logits = value(given["input"])
        if given["size_average"] is not None or given["reduce"] is not None:
            return "it has arguments that torch deprecates"
        if value(given["target"]).is_floating_point():
            return "its targets are probabilities"
        if numel(logits) < self.min_numel:
            return "fewer logits than min_numel"
        found = product_behind(given["input"])
        if isinstance(found, RowSteps) and (logits.dim() < 2 or found.axis != 1):
            return "its classes are not the outputs of the product"
        return found if isinstance(found, str) else None

    def rewrite(self, graph: ForwardGraph, site: fx.Node) -> None:
        """Calls the chunked loss instead."""
        given = _arguments(site)
        assert not isinstance(given, str)  # see `refuse`
        found = product_behind(given["input"])
        assert isinstance(found, RowSteps)
        names = ("weight", "ignore_index", "reduction", "label_smoothing")
        options = [self.chunks, value(site).dtype, *(given[name] for name in names), found.cap]
        rows, offset = found.rows(graph, site), found.offset(graph, site)
        factors = rows, found.outputs_first(graph, site), offset
        call = (chunked_cross_entropy, *factors, given["target"], *options)
        graph.replace(site, graph.insert_before(site, *call))


def _arguments(site: fx.Node) -> dict[str, Any] | str:
    """The arguments of `cross_entropy` that compute a loss, or why there are none."""
    given = arguments(site)
    if site.target is F.cross_entropy:
        return given
    source = given["input"]
    name = str(getattr(source.target, "__name__", source.target))
    dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim")
    if name != "log_softmax" or not isinstance(dim, int):
        return "its input is not log_softmax of something"
    if dim % value(source).dim() != min(1, value(source).dim() - 1):
        return "its classes are not the outputs of the product"
    if len(source.users) > 1:
        return READ_ELSEWHERE
    if value(source).dtype.itemsize < value(source.args[0]).dtype.itemsize:
        return "its log-probabilities are rounded"
    return {**given, "input": source.args[0], "label_smoothing": 0.0}
