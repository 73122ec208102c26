"""Invertible links: operators whose input can be read off their output.

    p = permute(a, dims)          a = permute(p, inverse of dims)
    p = view(a, shape)            a = reshape(p, shape of a)
    z = cat([a, b])               a = narrow(z)
    a, b = split(z)               z = cat([a, b]), once both are at hand
    a, b = split(cat([u, v]))     u = a, v = b
    p = pixel_shuffle(a, r)       a = pixel_unshuffle(p, r)
    p = c a, exp(a), ...          a = p / c, log(p), ...; see `gtrans.analysis.inverses`
    p, bit = halve(a)             a = unhalve(p, bit); see `gtrans.runtime.streams`

All but the elementwise functions are exact: no rounding happens on the way back.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from gtrans.analysis.inverses import inverse_of
from gtrans.ir import ops
from gtrans.ir.joint import Offer
from gtrans.runtime.streams import HALVE, SCALE, unhalve, unscaled_store, unscaled_value

aten = torch.ops.aten

_RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
_SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        aten.unbind.int,
    }
)
# The smallest set of pairs in which every number of the first type is one of the second.
_WIDER = frozenset(
    {
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float32, torch.float64),
    }
)


@dataclass(frozen=True)
class Span:
    """A part of a value along one dimension: ``whole[start:stop]``, or ``whole[start]`` if flat."""

    whole: fx.Node
    dim: int
    start: int
    stop: int
    flat: bool = False


def input_from_output(node: fx.Node) -> list[tuple[fx.Node, Offer]]:
    """The inputs of a link as functions of its output; empty if the operator is no link."""
    if piece := same_value(node):
        return [(piece, Offer(_same, (node,)))]
    found = [(piece, Offer(_part, (node, span))) for piece, span in _pieces(node)]
    if ops.is_getitem(node):
        return found + _of_parts(node)
    source = node.args[0] if node.args else None
    inverse = _inverse(node, source) if isinstance(source, fx.Node) else None
    if inverse is not None:
        assert isinstance(source, fx.Node)
        found.append((source, Offer(inverse, (node,))))
    return found


def is_link(node: fx.Node) -> bool:
    """Whether an operator only moves, scales or widens what it is given."""
    if ops.is_getitem(node):
        return node.all_input_nodes[0].target in _SPLITS
    return node.target in _SPLITS or span_of(node) is not None or bool(input_from_output(node))


def origins(node: fx.Node) -> list[fx.Node]:
    """A value, and what it is a link of, step by step."""
    found = [node]
    while len(sources := [source for source, _ in input_from_output(found[-1])]) == 1 or (
        sources and ops.is_getitem(found[-1])
    ):
        found.append(sources[0])
    return found


def with_remainders(nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, int]]:
    """Calls whose inverse needs a second result, and its number."""
    return [(n, 1) for n in nodes if n.target in (SCALE, HALVE)]


def from_parts(node: fx.Node, available: Collection[fx.Node]) -> Offer | None:
    """A value as the concatenation of parts taken from it, if available ones cover all of it."""
    spans: dict[tuple[int, bool], dict[int, tuple[int, fx.Node]]] = {}
    for user in node.users:
        for part in ops.parts(user).values() if user.target in _SPLITS else [user]:
            span = span_of(part)
            if (
                span is not None
                and span.whole is node
                and span.stop > span.start
                and (part in available)
            ):
                spans.setdefault((span.dim, span.flat), {})[span.start] = (span.stop, part)
    for (dim, flat), found in spans.items():
        position, parts = 0, []
        while position in found:
            position, part = found[position]
            parts.append(part)
        if parts and position == node.meta["val"].shape[dim]:
            return Offer(partial(_joined, dim=dim, flat=flat), tuple(parts))
    return None


def same_value(node: fx.Node) -> fx.Node | None:
    """The value that was concatenated and taken out again as this one."""
    span = span_of(node)
    if span is not None:
        for piece, place in _pieces(span.whole):
            if place == span:
                return piece
    return None


def span_of(node: fx.Node) -> Span | None:
    """Which part of another value a node is; None if it is none, or of unknown sizes."""
    if ops.is_getitem(node):
        return _span_of_split(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.target not in (aten.slice.Tensor, aten.select.int):
        return None
    dim, size = _dim(node, source)
    if not isinstance(size, int):
        return None
    if node.target is aten.select.int:
        index = ops.argument(node, "index")
        index = index + size if isinstance(index, int) and index < 0 else index
        return Span(source, dim, index, index + 1, True) if isinstance(index, int) else None
    start, stop = ops.argument(node, "start"), ops.argument(node, "end")
    if ops.argument(node, "step") != 1:
        return None
    if any(not isinstance(limit, int | None) for limit in (start, stop)):
        return None
    first, last, _ = slice(start, stop).indices(size)
    return Span(source, dim, first, last)


def _span_of_split(node: fx.Node) -> Span | None:
    split, index = node.args
    if not isinstance(split, fx.Node) or split.target not in _SPLITS or not isinstance(index, int):
        return None
    source = split.args[0]
    assert isinstance(source, fx.Node)
    dim, _ = _dim(split, source)
    if split.target is aten.unbind.int:
        return Span(source, dim, index, index + 1, True)
    sizes = [part.shape[dim] for part in split.meta["val"]]
    if any(not isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return Span(source, dim, start, start + sizes[index])


def _pieces(node: fx.Node) -> list[tuple[fx.Node, Span]]:
    """What a concatenation or stack is made of, and where each piece lies in it."""
    if node.target not in (aten.cat.default, aten.stack.default):
        return []
    pieces: Any = node.args[0]
    flat = node.target is aten.stack.default
    dim, position, found = _dim(node, node)[0], 0, []
    for piece in pieces:
        size = 1 if flat else piece.meta["val"].shape[dim]
        if not isinstance(size, int):
            return []
        found.append((piece, Span(node, dim, position, position + size, flat)))
        position += size
    return found


def _of_parts(node: fx.Node) -> list[tuple[fx.Node, Offer]]:
    """The inputs of an operator that returns a value and a remainder, from both."""
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    rest = ops.parts(whole).get(1)
    if whole.target not in (SCALE, HALVE) or index != 0 or rest is None:
        return []
    x, second, *numbers = whole.args
    assert isinstance(x, fx.Node)
    if whole.target is HALVE:
        return [(x, Offer(unhalve, (node, rest, second, *numbers)))]
    assert isinstance(second, fx.Node)
    given = (node, rest, *numbers)
    return [(x, Offer(unscaled_value, given)), (second, Offer(unscaled_store, given))]


def _inverse(node: fx.Node, source: fx.Node) -> Callable[..., torch.Tensor] | None:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    match node.target:
        case aten.permute.default:
            dims = [d % before.dim() for d in ops.argument(node, "dims")]
            return partial(torch.permute, dims=[dims.index(d) for d in range(len(dims))])
        case aten.transpose.int:
            first, second = ops.argument(node, "dim0"), ops.argument(node, "dim1")
            return partial(torch.transpose, dim0=first, dim1=second)
        case aten.t.default:
            return torch.t
        case aten.neg.default:
            return torch.neg
        case aten.flip.default:
            return partial(torch.flip, dims=ops.argument(node, "dims"))
        case aten.roll.default:
            back = [-shift for shift in ops.argument(node, "shifts")]
            return partial(torch.roll, shifts=back, dims=ops.argument(node, "dims"))
        case aten.pixel_shuffle.default:
            factor = ops.argument(node, "upscale_factor")
            return partial(torch.pixel_unshuffle, downscale_factor=factor)
        case aten.pixel_unshuffle.default:
            factor = ops.argument(node, "downscale_factor")
            return partial(torch.pixel_shuffle, upscale_factor=factor)
        case aten.clone.default:
            return _same
        case aten._to_copy.default if (before.dtype, after.dtype) in _WIDER:
            return partial(_narrowed, dtype=before.dtype)
        case target if target in _RESHAPES:
            return _reshaped_to(before)
    return inverse_of(node)


def _reshaped_to(val: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """Reshapes to the sizes of a value, one of which may be unknown."""
    unknown = sum(not isinstance(size, int) for size in val.shape)
    if unknown > 1:
        return None
    shape = [size if isinstance(size, int) else -1 for size in val.shape]
    return partial(torch.reshape, shape=shape)


def _dim(node: fx.Node, value: fx.Node) -> tuple[int, Any]:
    """The dimension that a split, slice or concatenation works along, and its size."""
    shape = value.meta["val"].shape
    dim = ops.argument(node, "dim") % len(shape)
    return dim, shape[dim]


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _part(value: torch.Tensor, span: Span) -> torch.Tensor:
    if span.flat:
        return value.select(span.dim, span.start)
    return value.narrow(span.dim, span.start, span.stop - span.start)


def _joined(*parts: torch.Tensor, dim: int, flat: bool) -> torch.Tensor:
    return torch.stack(parts, dim) if flat else torch.cat(parts, dim)


def _narrowed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype)
