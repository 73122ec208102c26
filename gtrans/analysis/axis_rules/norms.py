"""Transfer rules of normalisations, reductions, softmaxes and pooling."""

from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import freeze, split, unify
from gtrans.analysis.axis_rules.context import (
    Axes,
    Context,
    Rule,
    Unsupported,
    dims_of,
    freeze_all,
    fresh,
    normal,
    shape,
)
from gtrans.runtime.norms import LIBRARY

# Importing it registers the operators.
_ = LIBRARY

aten = torch.ops.aten


def layer_norm(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Layer and RMS norm: the normalised axes may shrink if the divisor stays."""
    x = a["input"]
    xs = c.of(x)
    count = len(a["normalized_shape"])
    inner = xs[-count:]
    for name in ("weight", "bias"):
        if (p := a.get(name)) is not None:
            for axis, other in zip(inner, c.of(p), strict=True):
                unify(axis, other)
    for i, axis in enumerate(inner):
        c.need(node, axis, (x, len(xs) - count + i))
    c.resize(node, "normalized_shape", list(inner))
    c.average(node, inner)
    return xs


def norm_of_longer(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A norm that was shortened before: its divisor is a number of its own."""
    x, rank = a["input"], a["rank"]
    xs = c.of(x)
    inner = xs[-rank:]
    for name in ("weight", "bias"):
        if (p := a.get(name)) is not None:
            for axis, other in zip(inner, c.of(p), strict=True):
                unify(axis, other)
    for i, axis in enumerate(inner):
        c.need(node, axis, (x, len(xs) - rank + i))
    return xs


def batch_norm(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Batch and instance norm: statistics run over all axes but the channels."""
    xs = c.of(a["input"])
    channel = 1 if len(xs) > 1 else 0
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (p := a.get(name)) is not None:
            unify(xs[channel], c.of(p)[0])
    freeze_all([axis for i, axis in enumerate(xs) if i != channel], "batch statistics")
    return xs


def group_norm(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Group norm: whole groups may go."""
    x, groups = a["input"], a["num_groups"]
    xs = c.of(x)
    freeze_all(xs[2:], "statistics of a group")
    halves = split(xs[1], [groups, shape(x)[1] // groups])
    if halves is None:
        raise Unsupported("groups that cross other structure")
    freeze(halves[1], "statistics of a group")
    for name in ("weight", "bias"):
        if (p := a.get(name)) is not None:
            unify(xs[1], c.of(p)[0])
    c.resize(node, "num_groups", halves[0])
    return xs


def mean(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Averages: an erased index must be zero, and the divisor stays."""
    kept = summation(c, node, a)
    xs = c.of(a["self"])
    c.average(node, [xs[d] for d in dims_of(a.get("dim"), len(xs))])
    return kept


def summation(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Sums (and 2-norms): an erased index must be zero."""
    x = a["self"]
    xs = c.of(x)
    if "ord" in a and a["ord"] != 2:
        raise Unsupported("norm other than the Euclidean")
    for d in dims_of(a.get("dim"), len(xs)):
        c.need(node, xs[d], (x, d))
    return _reduced(c, a)


def over_frozen(c: Context, node: fx.Node, a: dict[str, Any]) -> Any:
    """Softmax, scans, sorts: the named axes keep their size, the others pass."""
    xs = c.of(a["self"])
    reason = _opname(node)
    freeze_all([xs[d] for d in dims_of(a.get("dim"), len(xs))], reason)
    several = isinstance(node.meta["val"], (tuple, list))
    return [list(xs) for _ in node.meta["val"]] if several else xs


def extremum(c: Context, node: fx.Node, a: dict[str, Any]) -> Any:
    """Reductions other than sums: the reduced axes keep their size."""
    xs = c.of(a["self"])
    freeze_all([xs[d] for d in dims_of(a.get("dim"), len(xs))], _opname(node))
    kept = _reduced(c, a)
    if isinstance(node.meta["val"], (tuple, list)):
        return [list(kept) for _ in node.meta["val"]]
    return kept


def topk(c: Context, node: fx.Node, a: dict[str, Any]) -> Any:
    """The named axis keeps its size; the result has a new one in its place."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    freeze(xs[dim], _opname(node))
    values = node.meta["val"]
    return [[*xs[:dim], *fresh([v.shape[dim]], _opname(node)), *xs[dim + 1 :]] for v in values]


def transform(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Fourier transforms: the transformed axis keeps its size, the others pass."""
    xs = c.of(a["self"])
    dim = normal(a["dim"], len(xs))
    freeze(xs[dim], _opname(node))
    return [*xs[:dim], *fresh([shape(node)[dim]], _opname(node)), *xs[dim + 1 :]]


def pooling(c: Context, node: fx.Node, a: dict[str, Any]) -> Any:
    """Pooling and resampling: batch and channels pass, positions keep their sizes."""
    x = a.get("self", a.get("input"))
    if x is None:
        raise Unsupported("pooling without an input")
    xs = c.of(x)
    value = node.meta["val"]
    outputs = value if isinstance(value, (tuple, list)) else [value]
    name = node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""
    rank = next((n for n in (1, 2, 3) if f"{n}d" in name), len(xs) - 2)
    freeze_all(xs[-rank:], "pooled positions")
    made = [[*xs[:-rank], *fresh(o.shape[-rank:], "pooled positions")] for o in outputs]
    return made if isinstance(value, (tuple, list)) else made[0]


def _reduced(c: Context, a: dict[str, Any]) -> Axes:
    xs = c.of(a["self"])
    gone = dims_of(a.get("dim"), len(xs))
    if a.get("keepdim"):
        return [fresh([1], None)[0] if i in gone else axis for i, axis in enumerate(xs)]
    return [axis for i, axis in enumerate(xs) if i not in gone]


def _opname(node: fx.Node) -> str:
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else str(node)


RULES: dict[Any, Rule] = {
    aten.layer_norm: layer_norm,
    aten.rms_norm: layer_norm,
    torch.ops.gtrans.layer_norm_of_longer: norm_of_longer,
    torch.ops.gtrans.rms_norm_of_longer: norm_of_longer,
    aten.batch_norm: batch_norm,
    aten.instance_norm: batch_norm,
    aten.group_norm: group_norm,
    aten.mean: mean,
    aten.sum: summation,
    aten.linalg_vector_norm: summation,
}
RULES |= dict.fromkeys(
    (
        aten.softmax,
        aten._softmax,
        aten._safe_softmax,
        aten.log_softmax,
        aten._log_softmax,
        aten.cumsum,
        aten.cumprod,
        aten.sort,
        aten.flip,
    ),
    over_frozen,
)
RULES |= dict.fromkeys(
    (
        aten.amax,
        aten.amin,
        aten.max,
        aten.min,
        aten.argmax,
        aten.argmin,
        aten.var,
        aten.std,
        aten.var_mean,
        aten.std_mean,
        aten.prod,
        aten.any,
        aten.all,
        aten.logsumexp,
    ),
    extremum,
)
RULES[aten.topk] = topk
RULES |= dict.fromkeys((aten.fft_rfft, aten.fft_irfft, aten.fft_fft, aten.fft_ifft), transform)
RULES |= dict.fromkeys(
    (
        aten.max_pool1d,
        aten.max_pool2d,
        aten.max_pool3d,
        aten.max_pool2d_with_indices,
        aten.avg_pool1d,
        aten.avg_pool2d,
        aten.avg_pool3d,
        aten.adaptive_avg_pool1d,
        aten.adaptive_avg_pool2d,
        aten.adaptive_avg_pool3d,
        aten.adaptive_max_pool1d,
        aten.adaptive_max_pool2d,
        aten.upsample_nearest1d,
        aten.upsample_nearest2d,
        aten.upsample_nearest3d,
        aten._upsample_nearest_exact2d,
        aten.upsample_linear1d,
        aten.upsample_bilinear2d,
        aten.upsample_bicubic2d,
        aten.upsample_trilinear3d,
        aten._upsample_bilinear2d_aa,
        aten._upsample_bicubic2d_aa,
    ),
    pooling,
)
