"""Keep the place in each window for a max pool's backward, and nothing of the pool's input.

    r, off = relu(x)                          r    = relu(x)
    y, i   = max_pool2d(r, 3)                 y, i = max_pool2d(r, 3)
                                              p    = pack(place of i in its window)   # saved
    dr     = max_pool2d_backward(dy, r, i)    dm   = threshold_backward(dy, y, 0)
    dx     = threshold_backward(dr, r, 0) --> dx   = max_pool2d_backward(dm, r', index of p)

Of its input the backward of a pool reads the shape, which r' has without memory of its own. What
passes through a window goes to one place, where r is what y is: ReLU's gradient may come first, and
reads the pool's output, which the next layer keeps anyway.

Shapes: r: [*n, *map]; y, i: [*n, *windows]; p: uint8, windows * bits / 8 bytes: two bits for
    windows of 4 places, four for 9.
Saves: 8 - bits / 8 bytes per window, and r or its mask where nothing else reads it.
Costs: a pass over the pool's output in the forward, one in the backward.
Contract: exact, bit for bit.
Needs: maps of known size. An input with channels last stays: its layout is read as well.
Source: gtrans; Inductor keeps such places in a byte, where it lowers the pool itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass, require
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.runtime.bits import packed_dim
from gtrans.runtime.windows import Windows

aten = torch.ops.aten

_RANK: dict[Any, int] = {
    aten.max_pool2d_with_indices_backward.default: 2,
    aten.max_pool3d_with_indices_backward.default: 3,
}


@dataclass(frozen=True)
class PoolPlaces(SitePass[JointGraph]):
    """Let max pools keep the place of each maximum in its window.

    Args:
        min_numel: leave pools with fewer windows alone.
    """

    name: ClassVar[str] = "pool-places"
    knob: ClassVar[Knob] = Knob.RESIDUAL
    contract: ClassVar[Contract] = Exact()

    min_numel: int = 4096

    def __post_init__(self) -> None:
        problem = f"pool-places: min_numel must be at least 1, got {self.min_numel}"
        require(self.min_numel >= 1, problem)

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The backward of every max pool."""
        return [n for n in graph.nodes if n.target in _RANK]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses small pools, large windows, and maps whose size is not known."""
        index, pooled = ops.argument(site, "indices"), ops.argument(site, "self")
        if not (ops.is_getitem(index) and graph.is_forward(index)):
            return "not the backward of a forward max pool"
        if numel(index.meta["val"]) < self.min_numel:
            return "fewer elements than min_numel"
        if not all(
            isinstance(n, int) for n in (*pooled.meta["val"].shape, *index.meta["val"].shape)
        ):
            return "some of its sizes are dynamic"
        return "its windows have more than 256 places" if _windows(site).bits is None else None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Offers the index from the packed places, and lets go of the input."""
        index, windows = ops.argument(site, "indices"), _windows(site)
        val = index.meta["val"]
        dim = packed_dim(val)
        packed = graph.splice_after(index, partial(windows.pack, dim), index)
        graph.offer(index, partial(windows.unpack, dim, tuple(val.shape)), *packed)
        _relu_first(graph, site)
        _forget_input(graph, site)


def _windows(site: fx.Node) -> Windows:
    """The windows of a pool, by the arguments of its backward."""
    rank = _RANK[site.target]
    size = _each(ops.argument(site, "kernel_size"), rank)
    return Windows(
        map=tuple(ops.argument(site, "self").meta["val"].shape[-rank:]),
        size=size,
        stride=_each(ops.argument(site, "stride"), rank) or size,
        padding=_each(ops.argument(site, "padding"), rank),
        dilation=_each(ops.argument(site, "dilation"), rank),
    )


def _each(numbers: Any, rank: int) -> tuple[int, ...]:
    return tuple(numbers) * rank if len(numbers) == 1 else tuple(numbers)


def _relu_first(graph: JointGraph, site: fx.Node) -> None:
    """Moves the gradient of a ReLU in front of the pool, from its input to its output."""
    (user, *others), relu = site.users, ops.argument(site, "self")
    if others or user.target is not aten.threshold_backward.default:
        return
    if ops.argument(user, "self") is not relu or ops.argument(user, "threshold") != 0:
        return
    pool = ops.argument(site, "indices").all_input_nodes[0]
    y, dy = ops.parts(pool).get(0), ops.argument(site, "grad_output")
    if y is not None:
        masked = graph.insert_before(site, aten.threshold_backward.default, dy, y, 0)
        graph.replace_uses(dy, masked, [site])
        graph.replace(user, site)


def _forget_input(graph: JointGraph, site: fx.Node) -> None:
    """Lets the backward read a tensor without memory that has the shape of the pool's input."""
    pooled, dy = ops.argument(site, "self"), ops.argument(site, "grad_output")
    val = pooled.meta["val"]
    if val.is_contiguous():
        one = graph.insert_before(site, aten.new_zeros.default, dy, [1] * val.dim())
        shape = graph.insert_before(site, aten.expand.default, one, list(val.shape))
        graph.replace_uses(pooled, shape, [site])
