"""Transfer rules of matrix products, convolutions, attention and embeddings."""

from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import Axis, freeze, merge, split, unify
from gtrans.analysis.axis_rules.context import (
    Axes,
    Context,
    Rule,
    Unsupported,
    align,
    freeze_all,
    fresh,
    shape,
)

aten = torch.ops.aten


def linear(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """`x[..., k] · weight[o, k]ᵀ + bias[o]`."""
    x, weight, bias = a["input"], a["weight"], a["bias"]
    xs, ws = c.of(x), c.of(weight)
    if len(ws) != 2:
        raise Unsupported("linear with a vector as weight")
    _contract(c, node, (x, len(xs) - 1), (weight, 1))
    if bias is not None:
        unify(c.of(bias)[0], ws[0])
    return [*xs[:-1], ws[0]]


def matmul(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """`mm`, `bmm` and `matmul`: batch dimensions broadcast, the inner ones are summed."""
    names = list(a)
    left, right = a[names[0]], a[names[1]]
    ls, rs = c.of(left), c.of(right)
    inner = (left, len(ls) - 1), (right, max(0, len(rs) - 2))
    _contract(c, node, *inner)
    batch = align([ls[:-2], rs[:-2]], "matmul")
    return batch + ls[-2:-1] + (rs[-1:] if len(rs) > 1 else [])


def addmm(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """`bias + left · right`, batched or not."""
    names = list(a)
    bias = a["self"]
    left, right = a[names[1]], a[names[2]]
    ls, rs = c.of(left), c.of(right)
    _contract(c, node, (left, len(ls) - 1), (right, len(rs) - 2))
    out = [*align([ls[:-2], rs[:-2]], "baddbmm"), ls[-2], rs[-1]]
    align([out, c.of(bias)], "addmm")
    return out


def grouped_mm(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Rows of `x[t, k]`, sorted by expert, times the expert's `weight[e, k, n]`."""
    x, weight = list(a.values())[:2]
    xs, ws = c.of(x), c.of(weight)
    if len(xs) != 2 or len(ws) != 3 or a.get("bias") is not None:
        raise Unsupported("grouped product of this form")
    freeze(xs[0], "rows sorted by expert")
    freeze(ws[0], "expert")
    _contract(c, node, (x, 1), (weight, 1))
    return [xs[0], ws[2]]


def einsum(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Letters name axes; those that the result lacks are summed over."""
    equation = a["equation"].replace(" ", "")
    operands: list[fx.Node] = list(a["tensors"])
    if "..." in equation or "->" not in equation:
        raise Unsupported("einsum with an implicit part")
    given, result = equation.split("->")
    seen: dict[str, list[tuple[fx.Node, int]]] = {}
    for operand, letters in zip(operands, given.split(","), strict=True):
        if len(set(letters)) != len(letters):
            raise Unsupported("einsum of a diagonal")
        for dim, letter in enumerate(letters):
            seen.setdefault(letter, []).append((operand, dim))
    for letter, places in seen.items():
        wide = [(n, d) for n, d in places if c.of(n)[d].size != 1]
        for n, d in wide[1:]:
            unify(c.of(wide[0][0])[wide[0][1]], c.of(n)[d], "einsum")
        if letter not in result and wide:
            c.need(node, c.of(wide[0][0])[wide[0][1]], *wide)
            for n, d in wide:
                if len(wide) > 1:
                    c.consume(node, n, d, c.of(n)[d])
    return [_widest(c, seen[letter]) for letter in result]


def convolution(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Convolutions of any rank and grouping; kernel and positions keep their sizes."""
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if a.get("transposed"):
        return transposed_convolution(c, node, a)
    xs, ws = c.of(x), c.of(weight)
    channel = len(xs) - len(ws) + 1
    groups = a["groups"]
    freeze_all(ws[2:], "convolution kernel")
    freeze_all(xs[channel + 1 :], "convolved positions")
    if groups == 1:
        _contract(c, node, (x, channel), (weight, 1))
    else:
        mine = split(xs[channel], [groups, shape(x)[channel] // groups])
        theirs = split(ws[0], [groups, shape(weight)[0] // groups])
        if mine is None or theirs is None:
            raise Unsupported("groups that cross other structure")
        unify(mine[0], theirs[0])
        unify(mine[1], ws[1])
        if ws[1].size > 1:
            c.need(node, mine[1], (x, channel))
            c.consume(node, weight, 1, ws[1])
        c.resize(node, "groups", theirs[0])
    if bias is not None:
        unify(c.of(bias)[0], ws[0])
    positions = fresh(shape(node)[channel + 1 :], "convolved positions")
    return [*xs[:channel], ws[0], *positions]


def transposed_convolution(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Transposed convolutions, whose weight is `[in, out/groups, kernel...]`."""
    x, weight, bias = a["input"], a["weight"], a["bias"]
    xs, ws = c.of(x), c.of(weight)
    channel = len(xs) - len(ws) + 1
    groups = a["groups"]
    freeze_all(ws[2:], "convolution kernel")
    freeze_all(xs[channel + 1 :], "convolved positions")
    if groups == 1:
        _contract(c, node, (x, channel), (weight, 0))
        out = ws[1]
    else:
        mine = split(xs[channel], [groups, shape(x)[channel] // groups])
        if mine is None:
            raise Unsupported("groups that cross other structure")
        unify(xs[channel], ws[0])
        if mine[1].size > 1:
            c.need(node, mine[1], (x, channel))
            c.consume(node, weight, 0, mine[1])
        c.resize(node, "groups", mine[0])
        out = merge([mine[0], ws[1]])
    if bias is not None:
        unify(c.of(bias)[0], out)
    return [*xs[:channel], out, *fresh(shape(node)[channel + 1 :], "convolved positions")]


def attention(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Scaled dot-product attention; queries may share key heads in groups.

    The key dimension is summed over, but it also sets the scale unless that is given, so it keeps
    its size then.
    """
    q, k, v, bias = a["query"], a["key"], a["value"], a["attn_mask"]
    qs, ks, vs = c.of(q), c.of(k), c.of(v)
    freeze(ks[-2], "softmax over keys")
    unify(ks[-2], vs[-2])
    if a["is_causal"]:
        freeze(qs[-2], "causal order of queries")
    unify(qs[-1], ks[-1])
    if a["scale"] is None:
        freeze(qs[-1], "sets the scale of attention")
    c.need(node, qs[-1], (q, len(qs) - 1), (k, len(ks) - 1))
    batch = _attention_batch(qs[:-2], ks[:-2], vs[:-2], a["enable_gqa"])
    if bias is not None:
        align([[*batch, qs[-2], ks[-2]], c.of(bias)], "attention mask")
    return [*batch, qs[-2], vs[-1]]


def embedding(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Rows of a table."""
    ws = c.of(a["weight"])
    freeze(ws[0], "vocabulary")
    return [*c.of(a["indices"]), *ws[1:]]


def _attention_batch(q: Axes, k: Axes, v: Axes, grouped: bool) -> Axes:
    if not grouped or not q or q[-1].size == k[-1].size:
        return align([q, k, v], "attention")
    unify(k[-1], v[-1])
    heads = split(q[-1], [k[-1].size, q[-1].size // k[-1].size])
    if heads is None:
        raise Unsupported("query heads that do not group by key heads")
    unify(heads[0], k[-1])
    return [*align([q[:-1], k[:-1], v[:-1]], "attention"), q[-1]]


def _contract(
    c: Context, node: fx.Node, left: tuple[fx.Node, int], right: tuple[fx.Node, int]
) -> None:
    x, y = c.of(left[0])[left[1]], c.of(right[0])[right[1]]
    unify(x, y, "contraction")
    c.need(node, x, left, right)
    c.consume(node, left[0], left[1], x)
    c.consume(node, right[0], right[1], y)


def _widest(c: Context, places: list[tuple[fx.Node, int]]) -> Axis:
    return max((c.of(n)[d] for n, d in places), key=lambda axis: axis.size)


RULES: dict[Any, Rule] = {
    aten.linear: linear,
    aten.matmul: matmul,
    aten.mm: matmul,
    aten.bmm: matmul,
    aten.mv: matmul,
    aten.dot: matmul,
    aten.addmm: addmm,
    aten.baddbmm: addmm,
    aten._grouped_mm: grouped_mm,
    aten.einsum: einsum,
    aten.conv1d: convolution,
    aten.conv2d: convolution,
    aten.conv3d: convolution,
    aten.convolution: convolution,
    aten.conv_transpose1d: transposed_convolution,
    aten.conv_transpose2d: transposed_convolution,
    aten.conv_transpose3d: transposed_convolution,
    aten.scaled_dot_product_attention: attention,
    aten.embedding: embedding,
}
