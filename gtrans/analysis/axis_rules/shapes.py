"""Transfer rules of operators that move, cut, join, repeat or create axes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import Axis, concatenate, freeze, merge, segment, split, unify
from gtrans.analysis.axis_rules.context import (
    Axes,
    Context,
    Rule,
    Total,
    Unsupported,
    align,
    dims_of,
    freeze_all,
    fresh,
    normal,
    shape,
)

aten = torch.ops.aten


def reshape(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Any reshape: runs of dimensions with equal products are merged and split again."""
    x = a.get("self", a.get("input"))
    if x is None:
        raise Unsupported("reshape without an input")
    xs, old, new = c.of(x), shape(x), shape(node)
    made = _match(list(xs), list(old), list(new))
    for name in ("size", "shape"):
        if isinstance(given := a.get(name), (list, tuple)):
            c.resize(node, name, _sizes(given, made))
    return made


def unflatten(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One dimension split into several."""
    xs = c.of(a["self"])
    dim, new = normal(a["dim"], len(xs)), shape(node)
    pieces = len(new) - len(xs) + 1
    made = _match([xs[dim]], [shape(a["self"])[dim]], list(new[dim : dim + pieces]))
    c.resize(node, "sizes", _sizes(a["sizes"], made))
    return [*xs[:dim], *made, *xs[dim + 1 :]]


def permute(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Any reordering of dimensions."""
    xs = c.of(a["self"])
    return [xs[d] for d in order(node, a, len(xs))]


def order(node: fx.Node, a: dict[str, Any], rank: int) -> list[int]:
    """From which dimension of its input each dimension of a reordering comes."""
    name = node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""
    if name == "permute":
        return dims_of(a["dims"], rank)
    result = list(range(rank))
    if name in ("t", "numpy_T", "mT", "adjoint"):
        return [*result[:-2], *reversed(result[-2:])] if name != "numpy_T" else result[::-1]
    if name == "movedim":
        source, target = dims_of(a["source"], rank), dims_of(a["destination"], rank)
        rest = iter(d for d in range(rank) if d not in source)
        return [source[target.index(d)] if d in target else next(rest) for d in range(rank)]
    first, second = [k for k in a if k != "self"][:2]
    i, j = normal(a[first], rank), normal(a[second], rank)
    result[i], result[j] = j, i
    return result


def expand(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Dimensions of size 1 repeat; how often is an axis of its own."""
    xs, new = c.of(a["self"]), shape(node)
    xs = [*fresh([1] * (len(new) - len(xs)), None), *xs]
    other = c.of(a["other"]) if isinstance(a.get("other"), fx.Node) else None
    made: Axes = []
    for i, (axis, size) in enumerate(zip(xs, new, strict=True)):
        if axis.size == size:
            made.append(axis)
        else:
            made.append(other[i] if other is not None else Axis(size))
    if isinstance(a.get("size"), (list, tuple)):
        c.resize(node, "size", _sizes(a["size"], made))
    return made


def repeat(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Whole dimensions repeat: the number of repeats varies slower than the dimension."""
    xs = c.of(a["self"])
    name = "repeats" if "repeats" in a else "dims"
    counts = list(a[name])
    counts = [1] * (len(xs) - len(counts)) + counts
    xs = [*fresh([1] * (len(counts) - len(xs)), None), *xs]
    times = [Axis(n) for n in counts]
    c.resize(node, name, times)
    return [merge([t, axis]) for t, axis in zip(times, xs, strict=True)]


def repeat_interleave(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Every index repeats: the number of repeats varies faster than the dimension."""
    xs = c.of(a["self"])
    if not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        raise Unsupported("repeat_interleave with varying repeats")
    dim, times = normal(a["dim"], len(xs)), Axis(a["repeats"])
    made = merge([xs[dim], times])
    c.resize(node, "repeats", times)
    if a.get("output_size") is not None:
        c.resize(node, "output_size", made)
    return [*xs[:dim], made, *xs[dim + 1 :]]


def cat(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One dimension is joined, the others are the same."""
    parts = [c.of(t) for t in a["tensors"] if shape(t) != (0,)]
    dim = normal(a["dim"], len(parts[0]))
    made = align([p[:dim] + p[dim + 1 :] for p in parts], "cat")
    return [*made[:dim], concatenate(p[dim] for p in parts), *made[dim:]]


def stack(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A new dimension numbers the parts."""
    parts = [c.of(t) for t in a["tensors"]]
    dim = normal(a["dim"], len(parts[0]) + 1)
    made = align(parts, "stack")
    return [*made[:dim], Axis(len(parts), "stack"), *made[dim:]]


def pieces(c: Context, node: fx.Node, a: dict[str, Any]) -> list[Axes]:
    """`split`, `split_with_sizes` and `chunk`."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    cut = segment(xs[dim], sizes)
    if cut is None:
        freeze(xs[dim], "cut across other structure")
        cut = fresh(sizes, "cut across other structure")
    c.cut(node, cut, dim)
    return [[*xs[:dim], piece, *xs[dim + 1 :]] for piece in cut]


def slice_(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A range of a dimension; with a step it keeps its size."""
    xs, old = c.of(a["self"]), shape(a["self"])
    dim = normal(a["dim"], len(xs))
    size, length = old[dim], shape(node)[dim]
    start = _clip(a["start"], size, 0)
    if length == size:
        return xs
    if a["step"] != 1:
        freeze(xs[dim], "slice with a step")
        return [*xs[:dim], *fresh([length], "slice with a step"), *xs[dim + 1 :]]
    cut = segment(xs[dim], [start, length, size - start - length])
    if cut is None:
        freeze(xs[dim], "cut across other structure")
        return [*xs[:dim], *fresh([length], "cut across other structure"), *xs[dim + 1 :]]
    c.resize(node, "start", Total((cut[0],)))
    c.resize(node, "end", Total((cut[0], cut[1])))
    return [*xs[:dim], cut[1], *xs[dim + 1 :]]


def select(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One index of a dimension, which must stay where it is."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    freeze(xs[dim], "select")
    return [*xs[:dim], *xs[dim + 1 :]]


def unbind(c: Context, node: fx.Node, a: dict[str, Any]) -> list[Axes]:
    """Every index of a dimension becomes a tensor."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    freeze(xs[dim], "unbind")
    return [[*xs[:dim], *xs[dim + 1 :]] for _ in node.meta["val"]]


def glu(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One half of a dimension gates the other."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    half = shape(node)[dim]
    cut = segment(xs[dim], [half, half])
    if cut is None:
        raise Unsupported("halves that cross other structure")
    unify(cut[0], cut[1])
    return [*xs[:dim], cut[0], *xs[dim + 1 :]]


def pad(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """New indices around a dimension; constant padding leaves the old ones as they are."""
    xs, old = c.of(a["self"]), shape(a["self"])
    amounts = list(a["pad"])
    made = list(xs)
    constant = a.get("mode", "constant") == "constant"
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i], amounts[2 * i + 1]
        dim = len(xs) - 1 - i
        if before == after == 0:
            continue
        if not constant or before < 0 or after < 0:
            freeze(xs[dim], "padding")
            made[dim] = Axis(old[dim] + before + after, "padding")
        else:
            ends = [Axis(n, "padding") for n in (before, after)]
            made[dim] = concatenate([ends[0], xs[dim], ends[1]])
    return made


def roll(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """The rolled dimensions keep their sizes."""
    xs = c.of(a["self"])
    freeze_all([xs[d] for d in dims_of(a["dims"], len(xs))], "roll")
    return xs


def gather(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Picked along one dimension, which keeps its size; elsewhere the index has the input's."""
    xs, given = c.of(a["self"]), c.of(a["index"])
    dim = normal(a["dim"], len(xs))
    freeze_all([xs[dim], given[dim]], "gather")
    for d, (axis, other) in enumerate(zip(xs, given, strict=True)):
        if d != dim:
            unify(axis, other, "gather of a part")
    return [given[d] if d == dim else axis for d, axis in enumerate(xs)]


def index_add(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Rows added at given places of one dimension, which keeps its size; the others pass."""
    xs, source = c.of(a["self"]), c.of(a["source"])
    dim = normal(a["dim"], len(xs))
    freeze_all([xs[dim], source[dim]], "index")
    for d, (axis, other) in enumerate(zip(xs, source, strict=True)):
        if d != dim:
            unify(axis, other)
    return xs


def copied(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A value in the shape and dtype of another."""
    return align([c.of(a["self"]), c.of(a["src"])], "copy")


def select_scatter(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A value put at one index of a dimension, which must stay where it is; the others pass."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    freeze(xs[dim], "select")
    for axis, other in zip(xs[:dim] + xs[dim + 1 :], c.of(a["src"]), strict=True):
        unify(axis, other)
    return xs


def slice_scatter(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A value put into a range of a dimension; with a step that keeps its size."""
    xs, source, old = c.of(a["self"]), c.of(a["src"]), shape(a["self"])
    dim = normal(a["dim"], len(xs))
    size, length = old[dim], shape(a["src"])[dim]
    start = _clip(a["start"], size, 0)
    part: Axis | None = xs[dim]
    if length != size:
        rest = [start, length, size - start - length]
        cut = segment(xs[dim], rest) if a["step"] == 1 else None
        part = None if cut is None else cut[1]
        if cut is not None:
            c.resize(node, "start", Total((cut[0],)))
            c.resize(node, "end", Total((cut[0], cut[1])))
    if part is None:
        freeze_all([xs[dim], source[dim]], "cut across other structure")
    for d, (axis, other) in enumerate(zip(xs, source, strict=True)):
        if d != dim:
            unify(axis, other)
        elif part is not None:
            unify(part, other)
    return xs


def index_select(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Indexed along one dimension, which keeps its size."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    freeze(xs[dim], "index")
    return [*xs[:dim], *c.of(a["index"]), *xs[dim + 1 :]]


def index(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Indexed dimensions keep their sizes; they must be adjacent, the others pass."""
    x = a["self"]
    xs, indices = c.of(x), list(a["indices"])
    used = [i for i, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):
        raise Unsupported("indices apart from each other")
    if any(indices[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in used):
        raise Unsupported("index by a mask")
    freeze_all([xs[i] for i in used], "index")
    given = align([c.of(indices[i]) for i in used], "index")
    return [*xs[: used[0]], *given, *xs[used[-1] + 1 :]]


def pixel_shuffle(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Channels `[c, r, r]` become positions."""
    xs, r, new = c.of(a["self"]), a["upscale_factor"], shape(node)
    cut = split(xs[-3], [new[-3], r, r])
    if cut is None:
        raise Unsupported("channels that cross other structure")
    freeze_all([cut[1], cut[2], *xs[-2:]], "pixel shuffle")
    return [*xs[:-3], cut[0], *fresh(new[-2:], "pixel shuffle")]


def created(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Constant tensors of a given size can be made smaller."""
    made: Axes = [Axis(s) for s in shape(node)]
    if isinstance(a.get("size"), (list, tuple)):
        c.resize(node, "size", _sizes(a["size"], made))
    return made


def _match(xs: Axes, old: Sequence[int], new: Sequence[int]) -> Axes:
    made: Axes = []
    i = j = 0
    while i < len(old) or j < len(new):
        if j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            made.append(Axis(1))
            j += 1
            continue
        if i < len(old) and old[i] == 1 and not (j < len(new) and new[j] == 1):
            i += 1
            continue
        k, n = i + 1, j + 1
        left, right = old[i], new[j]
        while left != right:
            if left < right:
                left *= old[k]
                k += 1
            else:
                right *= new[n]
                n += 1
        made += _regroup(xs[i:k], list(new[j:n]))
        i, j = k, n
    return made


def _regroup(xs: Axes, sizes: list[int]) -> Axes:
    if len(xs) == len(sizes) == 1:
        return xs
    whole = merge(xs)
    if len(sizes) == 1:
        return [whole]
    made = split(whole, sizes)
    if made is None:
        reason = "reshape across other structure"
        freeze_all(xs, reason)
        return fresh(sizes, reason)
    return made


def _sizes(given: Sequence[Any], axes: Axes) -> list[Any]:
    """The new size arguments: -1 stays -1, the others follow their axes."""
    return [
        -1 if isinstance(g, int) and g == -1 else axis for g, axis in zip(given, axes, strict=True)
    ]


def _clip(value: int | None, size: int, default: int) -> int:
    if value is None:
        return default
    return max(0, min(size, value + size if value < 0 else value))


RULES: dict[Any, Rule] = dict.fromkeys(
    (
        aten.view,
        aten.reshape,
        aten._unsafe_view,
        aten.flatten,
        aten.squeeze,
        aten.unsqueeze,
        aten.view_as,
        aten.reshape_as,
    ),
    reshape,
)
RULES |= dict.fromkeys(
    (
        aten.permute,
        aten.transpose,
        aten.t,
        aten.numpy_T,
        aten.mT,
        aten.adjoint,
        aten.movedim,
        aten.swapaxes,
        aten.swapdims,
    ),
    permute,
)
RULES |= {
    aten.unflatten: unflatten,
    aten.expand: expand,
    aten.expand_as: expand,
    aten.repeat: repeat,
    aten.tile: repeat,
    aten.repeat_interleave: repeat_interleave,
    aten.cat: cat,
    aten.concat: cat,
    aten.stack: stack,
    aten.split: pieces,
    aten.split_with_sizes: pieces,
    aten.chunk: pieces,
    aten.slice: slice_,
    aten.select: select,
    aten.unbind: unbind,
    aten.glu: glu,
    aten.pad: pad,
    aten.constant_pad_nd: pad,
    aten.roll: roll,
    aten.index_select: index_select,
    aten.gather: gather,
    aten.index_add: index_add,
    aten.copy: copied,
    aten.select_scatter: select_scatter,
    aten.slice_scatter: slice_scatter,
    aten.index: index,
    aten.pixel_shuffle: pixel_shuffle,
    aten.zeros: created,
    aten.ones: created,
    aten.full: created,
    aten.new_zeros: created,
    aten.empty: created,
    aten.new_empty: created,
    aten.new_ones: created,
    aten.new_full: created,
}
