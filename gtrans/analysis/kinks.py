"""Operators whose derivative jumps, and those that carry exact zeros to them.

A rebuilt value differs from the forward's in its last bits. That is harmless, except where a value
sits exactly on a jump: the zeros that a ReLU left in a stream are no longer zeros.
"""

import torch
from torch import fx

from gtrans.analysis.again import formula
from gtrans.ir import ops
from gtrans.runtime.again import drop

aten = torch.ops.aten

# No property of torch tells these apart: functions with a jump in value or derivative.
KINKS = frozenset(
    getattr(aten, name)
    for name in [
        "relu",
        "threshold",
        "hardtanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "leaky_relu",
        "_prelu_kernel",
        "hardswish",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
        "abs",
        "sign",
        "sgn",
        "floor",
        "ceil",
        "round",
        "trunc",
        "maximum",
        "minimum",
        "max",
        "min",
        "amax",
        "amin",
        "argmax",
        "argmin",
        "topk",
        "sort",
        "median",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "adaptive_max_pool2d",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "isnan",
        "signbit",
        "heaviside",
    ]
)
_BACKWARD_KINKS = frozenset(
    getattr(aten, name)
    for name in [
        "threshold_backward",
        "hardtanh_backward",
        "leaky_relu_backward",
        "_prelu_kernel_backward",
        "hardswish_backward",
        "hardsigmoid_backward",
        "hardshrink_backward",
        "softshrink_backward",
    ]
)
_ZERO_KEEPERS = frozenset(
    {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.neg.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.cat.default,
        aten.stack.default,
        aten.split.Tensor,
        aten.constant_pad_nd.default,
    }
)


def has_kink(node: fx.Node) -> bool:
    """Whether a forward operator compares its input with something."""
    op = ops.overload(node)
    return op is not None and op.overloadpacket in KINKS


def reads_kink(node: fx.Node) -> bool:
    """Whether an operator, of either side, has another derivative or value across a threshold."""
    op = ops.overload(node)
    return has_kink(node) or (op is not None and op.overloadpacket in _BACKWARD_KINKS)


def keeps_zeros(node: fx.Node) -> bool:
    """Whether exact zeros of its input are exact zeros of its output."""
    offer = formula(node)
    if offer is not None:
        return offer.function is drop
    if ops.is_view(node) or ops.is_getitem(node):
        return True
    return node.target in _ZERO_KEEPERS
