"""Facts about operators, read from their schema and tags wherever torch states them.

A list is kept by hand only where torch has no property to ask for; each such list says so.
"""

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# No property tells these apart: they return an alias but their schema does not say so.
_UNDECLARED_VIEWS = frozenset(
    {
        aten._unsafe_view.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        aten.unsafe_chunk.default,
    }
)

# They write running statistics where they train, which their schemas do not say.
_WRITES_STATISTICS = frozenset(
    {
        aten.native_batch_norm.default,
        aten.cudnn_batch_norm.default,
        aten.miopen_batch_norm.default,
    }
)

# Row-wise normalisations and softmaxes. Not tagged pointwise by torch, yet each costs one pass
# over its input and fuses like a pointwise op, so recomputing them is as cheap.
ROWWISE = frozenset(
    {
        aten.native_layer_norm.default,
        aten._fused_rms_norm.default,
        aten._softmax.default,
        aten._log_softmax.default,
    }
)

# Element by element, yet not tagged so by torch.
_UNTAGGED_POINTWISE = frozenset(
    {
        aten.elu_backward.default,
        aten.hardshrink_backward.default,
        aten.hardsigmoid_backward.default,
        aten.hardswish.default,
        aten.hardswish_backward.default,
        aten.hardtanh_backward.default,
        aten.leaky_relu_backward.default,
        aten.mish_backward.default,
        aten.softplus_backward.default,
        aten.softshrink_backward.default,
    }
)

# Copies into another layout, look-ups and fills: pointwise in effect, untagged by torch.
COPIES = frozenset(
    {
        aten.clone.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten._to_copy.default,
        aten.cat.default,
        aten.stack.default,
        aten.constant_pad_nd.default,
        aten.embedding.default,
        aten.native_dropout_backward.default,
    }
)

# Products whose cost grows faster than their bytes.
CONTRACTIONS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten.convolution_backward.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
    }
)

# Operators of gtrans that are made of products, by name: what declares them lies above this layer.
OWN_CONTRACTIONS = frozenset(
    {
        "gtrans::linear_cross_entropy",
        "gtrans::fused_lstm",
        "gtrans::fused_lstm_backward",
        "gtrans::recurrence",
        "gtrans::recurrence_backward",
    }
)

# Which part of their result holds positions, and how many trailing dimensions of the first argument
# those count over; None: along the dimension given by the argument `dim` (all of them if it is
# None). No property of torch says either.
_POSITIONS: dict[Any, tuple[int | None, int | None]] = {
    aten.argmax.default: (None, None),
    aten.argmin.default: (None, None),
    aten.argsort.default: (None, None),
    aten.argsort.stable: (None, None),
    aten.sort.default: (1, None),
    aten.sort.stable: (1, None),
    aten.topk.default: (1, None),
    aten.max.dim: (1, None),
    aten.min.dim: (1, None),
    aten.median.dim: (1, None),
    aten.nanmedian.dim: (1, None),
    aten.mode.default: (1, None),
    aten.kthvalue.default: (1, None),
    aten.cummax.default: (1, None),
    aten.cummin.default: (1, None),
    aten.max_pool2d_with_indices.default: (1, 2),
    aten.max_pool3d_with_indices.default: (1, 3),
    aten.adaptive_max_pool2d.default: (1, 2),
    aten.adaptive_max_pool3d.default: (1, 3),
    aten.fractional_max_pool2d.default: (1, 2),
    aten.fractional_max_pool3d.default: (1, 3),
}

Target = Callable[..., Any] | str


def overload(node: fx.Node) -> torch._ops.OpOverload | None:
    """The ATen (or custom) operator of a call node; None for anything else."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return node.target
    return None


def is_getitem(node: fx.Node) -> bool:
    """Whether the node takes one value out of a tuple."""
    return node.op == "call_function" and node.target is operator.getitem


def parts(node: fx.Node) -> dict[int, fx.Node]:
    """The values taken out of a tuple-valued node, by position, as far as anything reads them."""
    return {u.args[1]: u for u in node.users if is_getitem(u) and isinstance(u.args[1], int)}


def is_view(node: fx.Node) -> bool:
    """Whether the node's result shares storage with its first argument.

    A view of a plain number (``_conj(1j)``, as derivatives of complex values have it) allocates.
    """
    op = overload(node)
    return op is not None and _returns_alias(op) and bool(tensor_inputs(node))


@cache
def _returns_alias(op: torch._ops.OpOverload) -> bool:
    returns = op._schema.returns
    return op in _UNDECLARED_VIEWS or (
        bool(returns)
        and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    )


def storage_of(node: fx.Node) -> fx.Node:
    """The node that allocated what a value is stored in: the value itself, unless it is a view."""
    while is_view(node) or (is_getitem(node) and is_view(node.all_input_nodes[0])):
        node = node.all_input_nodes[0]
    return node


def is_host_copy(node: fx.Node) -> bool:
    """Whether the node copies a value from a device to its host, or back."""
    op = overload(node)
    return op is not None and op.name() in ("gtrans::to_host", "gtrans::to_device")


def is_on_host(node: fx.Node) -> bool:
    """Whether a value lies in memory of the host that the device has nothing of."""
    op = overload(storage_of(node))
    return op is not None and op.name() == "gtrans::to_host"


def is_random(node: fx.Node) -> bool:
    """Whether two runs of the node may give different results.

    Torch tags the fused attention kernels as random whether or not they are asked for dropout.
    """
    op = overload(node)
    if op is None or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    return bool(argument(node, "dropout_p", None) != 0.0)


def argument(node: fx.Node, name: str, otherwise: Any = None) -> Any:
    """An argument of a call by its name in the operator's schema.

    Args:
        node: a call of an ATen or custom operator.
        name: of the argument.
        otherwise: what to answer if the operator has no such argument; one that is left out has
            the default of the schema.
    """
    op = overload(node)
    for position, known in enumerate(op._schema.arguments if op is not None else ()):
        if known.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[position] if position < len(node.args) else known.default_value
    return otherwise


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into one of its arguments."""
    op = overload(node)
    return op is not None and op._schema.is_mutable


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes into, running statistics of a batch norm included."""
    op = overload(node)
    if op is None:
        return []
    names = [a.name for a in op._schema.arguments if a.is_write]
    if op in _WRITES_STATISTICS and argument(node, "training"):
        names += ["running_mean", "running_var"]
    return [a for name in names if isinstance(a := argument(node, name), fx.Node)]


def is_effect(node: fx.Node) -> bool:
    """Whether the node does something besides computing its result: it must run exactly once."""
    if node.op in ("placeholder", "output"):
        return False
    op = overload(node)
    if op is not None and torch.Tag.nondeterministic_seeded in op.tags and not is_random(node):
        return mutates(node)  # fx takes every operator with this tag for impure
    return mutates(node) or node.is_impure()


def has_no_result(node: fx.Node) -> bool:
    """Whether the operator returns nothing, as an assertion does."""
    op = overload(node)
    return op is not None and not op._schema.returns


def is_pointwise(node: fx.Node) -> bool:
    """Whether each output element depends on one element of each (broadcast) input."""
    op = overload(node)
    return op is not None and (torch.Tag.pointwise in op.tags or op in _UNTAGGED_POINTWISE)


def is_contraction(node: fx.Node) -> bool:
    """Whether the node is a matrix product, convolution or attention kernel, or made of some."""
    op = overload(node)
    return op in CONTRACTIONS or (op is not None and op.name() in OWN_CONTRACTIONS)


def is_fill(node: fx.Node) -> bool:
    """Whether the node makes a tensor out of sizes and numbers only (``full``, ``arange``)."""
    op = overload(node)
    return op is not None and not is_random(node) and not tensor_inputs(node)


def index_bound(node: fx.Node) -> int | torch.SymInt | None:
    """A size that every element of an index value lies below, if its operator states one."""
    made_by, part = (node.args[0], node.args[1]) if is_getitem(node) else (node, None)
    assert isinstance(made_by, fx.Node)
    expected, trailing = _POSITIONS.get(made_by.target, (-1, None))
    if expected != part:
        return None
    shape: torch.Size = made_by.all_input_nodes[0].meta["val"].shape
    dim = argument(made_by, "dim") if trailing is None else None
    if trailing is None and dim is not None:
        return shape[dim] if len(shape) else 1
    # `math.prod` keeps symbolic sizes symbolic.
    return math.prod(shape if trailing is None else shape[-trailing:])


def narrowest_index(node: fx.Node) -> torch.dtype | None:
    """The narrowest integer type for all elements of an index value, if narrower than its own."""
    count, own = index_bound(node), torch.iinfo(node.meta["val"].dtype)
    if not isinstance(count, int):
        return None
    kinds = (torch.uint8, torch.int16, torch.int32)
    fitting = (d for d in kinds if torch.iinfo(d).max >= count - 1)
    return next((d for d in fitting if torch.iinfo(d).bits < own.bits), None)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The node's arguments that hold tensors (or tuples of tensors)."""
    return [n for n in node.all_input_nodes if not is_symbol(n)]


def is_symbol(node: fx.Node) -> bool:
    """Whether the node holds a symbolic size (SymInt, SymFloat, SymBool) or a plain number."""
    val = node.meta.get("val")
    return isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))
