"""Transfer rule of pointwise operators: operands broadcast, so their axes are the same.

Which operators are pointwise is asked of torch (`torch.Tag.pointwise`); the list below holds
those that are so in effect but carry no tag.
"""

from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import unify
from gtrans.analysis.axis_rules.context import Axes, Context, Unsupported, align, shape

aten = torch.ops.aten

COPIES = frozenset(
    {
        aten.clone,
        aten.contiguous,
        aten.to,
        aten._to_copy,
        aten.type_as,
        aten.alias,
        aten.detach,
        aten.lift_fresh_copy,
        aten.lift_fresh,
        aten.dropout,
        aten.feature_dropout,
        aten.alpha_dropout,
        aten.native_dropout,
    }
)
"""Operators whose result is their input, elementwise (dropout among them)."""

UNTAGGED = frozenset(
    {
        aten.masked_fill,
        aten.where,
        aten.bernoulli,
        aten.zeros_like,
        aten.empty_like,
        aten.ones_like,
        aten.full_like,
        aten.rand_like,
        aten.randn_like,
        aten.logical_and,
        aten.logical_not,
        aten.logical_or,
        aten.selu,
        aten.relu6,
        aten.hardswish,
        aten.square,
        aten.rsub,
        aten.softplus,
        aten.floor_divide,
        aten.__and__,
        aten.__or__,
        aten.bitwise_and,
        aten.bitwise_not,
        aten.bitwise_or,
        aten.float_power,
        aten.divide,
        aten.multiply,
        aten.subtract,
    }
)
"""Pointwise operators that torch does not tag."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether the operator works element by element on broadcast operands."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or not isinstance(
        node.meta.get("val"), torch.Tensor
    ):
        return False
    packet = op.overloadpacket
    return torch.Tag.pointwise in op.tags or packet in COPIES or packet in UNTAGGED


def pointwise(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """All operands share the axes of the result."""
    operands = [c.of(v) for v in a.values() if isinstance(v, fx.Node) and v in c.axes]
    made = align(operands, "broadcast")
    if len(made) != len(shape(node)):
        raise Unsupported("operands do not broadcast to the result")
    return made


def prelu(c: Context, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A slope per channel, which is dimension 1."""
    xs, ws = c.of(a["self"]), c.of(a["weight"])
    if ws and ws[0].size > 1:
        unify(xs[1], ws[0])
    return xs
