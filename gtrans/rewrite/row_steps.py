"""Products along the last dimension, seen through steps that only handle their rows.

    z = linear(h, W, b)                                   [*s, V]
    v = (s z)[:, :-1].float().reshape(-1, V)   --->       (s h)[:, :-1].reshape(-1, D), s b

Steps that choose, reorder, regroup or scale rows commute with a product, so they can be taken
before it, on an input that is as wide as D instead of V. Casts to a wider type are left out on the
way. A cap c tanh(z) on the way does not commute, and is handed on.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from gtrans.ir.forward import ForwardGraph, value

READ_ELSEWHERE = "its logits are read elsewhere too"

_SIZES_ONLY = ("size", "dim", "numel", "stride")
_CASTS = ("float", "double", "half", "bfloat16", "to", "contiguous", "clone")


@dataclass(frozen=True)
class RowSteps:
    """A product and the steps between it and what reads its rows.

    Attributes:
        hidden: its left factor, [*s, D].
        weight: [V, D], or the other way round if it is turned.
        turned: whether the weight is [D, V].
        bias: [V] or None.
        steps: the steps that have to be taken on the left factor instead, in order.
        axis: which dimension of what is read is that of the V outputs.
        scales: numbers or nodes that rows are scaled by, each with whether by division, in order.
        cap: c of c tanh(z), taken behind all scales; 0 without one.
    """

    hidden: fx.Node
    weight: fx.Node
    turned: bool
    bias: fx.Node | None
    steps: tuple[fx.Node, ...]
    axis: int
    scales: tuple[tuple[Any, bool], ...] = ()
    cap: float = 0.0

    def rows(self, graph: ForwardGraph, anchor: fx.Node) -> fx.Node:
        """Takes the steps on the left factor right before a node; the last dimension is D's."""
        node, axis = self._scaled(graph, anchor, self.hidden), value(self.hidden).dim() - 1
        for step in self.steps:
            width = value(node).shape[axis]
            name, _, arguments = _described(step)
            axis = _axis_after(step, axis)
            if name in _RESHAPES:
                arguments = (*arguments[:-1], width)
            node = graph.insert_before(anchor, _FUNCTIONS[name], node, *arguments)
        return graph.insert_before(anchor, torch.movedim, node, axis, -1)

    def offset(self, graph: ForwardGraph, anchor: fx.Node) -> fx.Node | None:
        """The bias, scaled as the rows are."""
        return None if self.bias is None else self._scaled(graph, anchor, self.bias)

    def _scaled(self, graph: ForwardGraph, anchor: fx.Node, node: fx.Node) -> fx.Node:
        for factor, divides in self.scales:
            node = graph.insert_before(anchor, torch.div if divides else torch.mul, node, factor)
        return node

    def outputs_first(self, graph: ForwardGraph, anchor: fx.Node) -> fx.Node:
        """The weight as [V, D]."""
        if not self.turned:
            return self.weight
        return graph.insert_before(anchor, torch.transpose, self.weight, 0, 1)


def product_behind(node: fx.Node) -> RowSteps | str:
    """The product that a value is made of by row steps alone, or why it is none.

    Args:
        node: a tensor that holds rows of a product, as its reader sees it.
    """
    steps: list[fx.Node] = []
    scales: list[tuple[Any, bool]] = []
    cap = 0.0
    while True:
        if sum(_reads_values(user) for user in node.users) > 1:
            return READ_ELSEWHERE
        factors = _factors(node)
        if factors is not None:
            break
        if (scale := _scale(node)) is not None:
            node, *by = scale
            scales.append((by[0], by[1]))
            continue
        name, source, _ = _described(node)
        if name == "tanh" and source is not None:
            cap = 0.0 if cap else _product(scales)
            if not cap:
                return "its logits are capped by more than a number"
            node, scales = source, []
            continue
        if source is None or (name not in _CASTS and name not in _FUNCTIONS):
            return f"its logits come from {name}"
        if name not in _CASTS:
            steps.append(node)
        elif value(source).dtype.itemsize > value(node).dtype.itemsize:
            return "its logits are rounded on the way"
        node = source
    axis = value(node).dim() - 1
    for step in reversed(steps):
        axis = _axis_after(step, axis)
        if axis < 0:
            return "a step on the way mixes classes and tokens"
    return RowSteps(*factors, tuple(reversed(steps)), axis, tuple(reversed(scales)), cap)


def _scale(step: fx.Node) -> tuple[fx.Node, Any, bool] | None:
    """(what is scaled, by what, whether by division) of a step that scales by one number."""
    name = str(getattr(step.target, "__name__", step.target))
    if name not in _SCALES or len(step.args) != 2 or step.kwargs:
        return None
    first, second = step.args
    if _is_number(second) and isinstance(first, fx.Node):
        return first, second, name != "mul"
    if name == "mul" and _is_number(first) and isinstance(second, fx.Node):
        return second, first, False
    return None


def _is_number(factor: Any) -> bool:
    if isinstance(factor, fx.Node):
        found = value(factor)
        return isinstance(found, torch.Tensor) and found.dim() == 0
    return isinstance(factor, (int, float))


def _product(scales: Sequence[tuple[Any, bool]]) -> float:
    """What rows are scaled by together; 0 if that is known only when the model runs."""
    total = 1.0
    for factor, divides in scales:
        if isinstance(factor, fx.Node):
            return 0.0
        total = total / factor if divides else total * factor
    return total


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node, bool, fx.Node | None] | None:
    """(left factor, weight, whether the weight is [D, V], bias) of a product."""
    args: Any = node.args
    if node.target is F.linear:
        names = ("input", "weight", "bias")
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(node.kwargs)
        return given["input"], given["weight"], False, given.get("bias")
    if node.target is torch.addmm and len(args) == 3 and not node.kwargs:
        return (args[1], args[2], True, args[0]) if value(args[0]).dim() == 1 else None
    if node.target in (torch.matmul, operator.matmul, torch.mm, "matmul", "mm"):
        left, right = args
        if value(right).dim() == 2 and value(left).dim() > 1:
            return left, right, True, None
    return None


def _reads_values(user: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target not in _SIZES_ONLY
    return user.target is not getattr or user.args[1] not in ("shape", "ndim", "dtype", "device")


def _described(step: fx.Node) -> tuple[str, fx.Node | None, tuple[Any, ...]]:
    """A step by its name, the tensor it is taken on, and its other arguments, flat."""
    name = str(getattr(step.target, "__name__", step.target))
    source: Any = step.args[0] if step.args else None
    rest: list[Any] = list(step.args[1:])
    if not isinstance(source, fx.Node) or not isinstance(value(source), torch.Tensor):
        return name, None, ()
    if name == "getitem":
        return name, source, tuple(rest)
    if name == "flatten":
        given: dict[str, Any] = {"start_dim": 0, "end_dim": -1}
        given |= dict(zip(given, rest, strict=False)) | dict(step.kwargs)
        return name, source, tuple(given.values())
    arguments: list[Any] = [*rest, *step.kwargs.values()]
    nested = len(arguments) == 1 and isinstance(arguments[0], (tuple, list))
    return name, source, tuple(arguments[0] if nested else arguments)


def _axis_after(step: fx.Node, axis: int) -> int:
    """Where a step takes a dimension that it must leave whole; -1 if it does not."""
    name, source, arguments = _described(step)
    assert source is not None  # it was a step when it was found
    before, after = value(source), value(step)
    if name in (*_RESHAPES, "flatten"):
        last = axis == before.dim() - 1 and after.shape[-1] == before.shape[-1]
        return after.dim() - 1 if last else -1
    if name == "getitem":
        (index,) = arguments
        index = index if isinstance(index, tuple) else (index,)
        return _axis_after_index(index, axis, before.dim())
    first: int = arguments[0] % (before.dim() + (name == "unsqueeze"))
    if name == "unsqueeze":
        return axis + (first <= axis)
    if name in ("narrow", "index_select"):
        return axis if first != axis else -1
    dims = [d % before.dim() for d in arguments]
    if name != "permute":
        a, b = dims
        dims = [b if d == a else a if d == b else d for d in range(before.dim())]
    return dims.index(axis)


def _axis_after_index(index: tuple[Any, ...], axis: int, rank: int) -> int:
    """Where an index takes a dimension; one tensor may index rows, if it comes first."""
    if isinstance(index[0], fx.Node):
        mask = value(index[0])
        if len(index) > 1 or not isinstance(mask, torch.Tensor):
            return -1
        used = mask.dim() if mask.dtype is torch.bool else 1
        return axis - used + (1 if mask.dtype is torch.bool else mask.dim()) if axis >= used else -1
    if any(not isinstance(i, (slice, int, type(None), type(Ellipsis))) for i in index):
        return -1
    named = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    before = after = 0
    for i in index:
        if i is None:
            after += 1
            continue
        width = rank - named if i is Ellipsis else 1
        if before <= axis < before + width:
            whole = i is Ellipsis or i == slice(None)
            return after + axis - before if whole else -1
        before += width
        after += width if not isinstance(i, int) else 0
    return -1


_SCALES = ("mul", "div", "truediv", "true_divide")
_RESHAPES = ("view", "reshape")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "view": torch.Tensor.reshape,
    "reshape": torch.Tensor.reshape,
    "flatten": torch.flatten,
    "getitem": operator.getitem,
    "narrow": torch.narrow,
    "index_select": torch.index_select,
    "unsqueeze": torch.unsqueeze,
    "transpose": torch.transpose,
    "swapaxes": torch.swapaxes,
    "permute": torch.Tensor.permute,
}
