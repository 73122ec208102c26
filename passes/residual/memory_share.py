"""Let a norm and the product behind it share one saved tensor: the normalised input.

    y, mean, rstd = norm(x, w, b)            z   = ((x - mean) * rstd) in the dtype of y's readers
    y16 = y.to(bfloat16)                     ...                             # z and rstd are saved
    dW  = mm(dq, y16)               -->      dW  = mm(dq, (z * w + b).to(bfloat16))
    dx  = norm_backward(dy, x, ...)          dx  = rstd * (g - mean(g) - z * mean(g * z))

with g = dy * w; an RMS norm has no mean(g).

Shapes: x, y: [*s, n]; z: the same; mean, rstd: one per row (per channel, of batch norms).
Saves: where the readers of y take it in 16 bits while x has 32, as under autocast, numel * 2 bytes
    per norm. Where x and y have one dtype it saves nothing: the plan keeps x alone and computes y
    from it, which is as many bytes, and exact. That is the usual case, so this pass mostly refuses,
    and says so; `norm-output` and the plan do what the paper does there.
Costs: z in the forward; y from z in the backward.
Contract: close: z is rounded to 16 bits.
Needs: nothing but the norm itself reads x in the backward. The affine parameters stay parameters:
    nothing is folded into the products, so that shared and tied weights need no care.
Source: MS-LN and MS-RMSNorm of memory-sharing backpropagation (arXiv:2406.16282). Not done: folding
    weight and bias into the following product.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from gtrans.analysis.linear_uses import NormUse, Use, norm_use, uses_of
from gtrans.contract import Close, Contract
from gtrans.core import Knob, require
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.plan.worth import Candidate, PayingPass, Twin
from gtrans.rewrite.coded_values import cut_edge, replace_norm, reread
from gtrans.rewrite.late import splice_late
from gtrans.runtime.norm_gradient import NormShape, affine, normalised

aten = torch.ops.aten


@dataclass(frozen=True)
class MemoryShare(PayingPass):
    """Save the normalised input of norms, in the dtype of their readers, and not the input.

    Args:
        min_numel: leave norms of fewer elements alone.
    """

    name: ClassVar[str] = "memory-share"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    min_numel: int = 4096

    def __post_init__(self) -> None:
        require(
            self.min_numel >= 1,
            f"memory-share: min_numel must be at least 1, got {self.min_numel}",
        )

    @property
    def contract(self) -> Contract:
        """Close: the normalised input is kept in 16 bits."""
        return Close(rtol=0.05)

    def proposals(self, graph: JointGraph) -> Iterable[Candidate | str]:
        """The backward of every norm."""
        found = [n for n in graph.nodes if graph.is_backward(n)]
        return [self._proposal(graph, m) for n in found if (m := norm_use(n)) is not None]

    def _proposal(self, graph: JointGraph, norm: NormUse) -> Candidate | str:
        val = norm.x.meta["val"]
        if numel(val) < self.min_numel:
            return "fewer elements than min_numel"
        casts = _casts(norm)
        if not casts:
            return (
                "its output is read in the dtype of its input: the plan keeps one of the two and "
                "computes the other, which is as many bytes, and exact"
            )
        dtype = casts[0].meta["val"].dtype

        def let_go(trial: JointGraph, twin: Twin) -> None:
            edges = [(use.reader, use.operand) for _, use in _uses(graph, norm, casts)]
            for reader, read in [*edges, (norm.backward, norm.x)]:
                cut_edge(trial, twin(reader), twin(read))

        return Candidate(
            site=norm.backward,
            value=norm.x,
            bytes=numel(val) * dtype.itemsize,
            let_go=let_go,
            rewrite=_rewrite,
            note=f"a norm's input kept normalised, in {str(dtype).removeprefix('torch.')}",
        )


def _rewrite(graph: JointGraph, site: fx.Node) -> None:
    norm = norm_use(site)
    assert norm is not None
    casts = _casts(norm)
    shape = NormShape(norm.channels, norm.rank)
    dtype = casts[0].meta["val"].dtype

    def kept(x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor) -> torch.Tensor:
        return normalised(shape, x, mean, rstd).to(dtype)

    last = norm.rstd if norm.mean is None else max(norm.mean, norm.rstd)
    (z,) = graph.splice_after(last, kept, norm.x, norm.mean, norm.rstd)
    for value, use in _uses(graph, norm, casts):
        function = partial(affine, shape, value.meta["val"].dtype)
        (again,) = splice_late(graph, use.reader, function, z, norm.weight, norm.bias)
        if list(again.meta["val"].shape) != list(value.meta["val"].shape):
            again = splice_late(graph, use.reader, _reshaped, again, value.meta["val"].shape)[0]
        reread(graph, use, value, again)
    (wide,) = splice_late(graph, norm.backward, _wide, z)
    replace_norm(graph, norm, wide, wide)


def _wide(z: torch.Tensor) -> torch.Tensor:
    return z.float()


def _reshaped(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return x.reshape(shape)


def _uses(graph: JointGraph, norm: NormUse, casts: list[fx.Node]) -> list[tuple[fx.Node, Use]]:
    """The backward readers of the norm's output, wide or in 16 bits, with which of the two."""
    values = [*casts, *([norm.y] if norm.y is not None else [])]
    return [(value, use) for value in values for use in uses_of(graph, value)]


def _casts(norm: NormUse) -> list[fx.Node]:
    """The copies of a norm's output, or of a view of it, in a smaller dtype than its input has."""
    size = norm.x.meta["val"].dtype.itemsize
    found: list[fx.Node] = []
    pending = [] if norm.y is None else [norm.y]
    while pending:
        for user in pending.pop().users:
            if ops.is_view(user):
                pending.append(user)
            elif user.target is aten._to_copy.default:
                dtype = user.meta["val"].dtype
                found += [user] if dtype.is_floating_point and dtype.itemsize < size else []
    return sorted(found)
