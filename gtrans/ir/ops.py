"""Facts about operators, read from their schema and tags wherever torch states them.

A list is kept by hand only where torch has no property to ask for; each such list says so.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# No property tells these apart: they return an alias but their schema does not say so.
_UNDECLARED_VIEWS = frozenset({aten._unsafe_view.default})

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
    """Whether the node's result shares storage with its first argument."""
    op = overload(node)
    if op is None:
        return False
    if op in _UNDECLARED_VIEWS:
        return True
    returns = op._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def is_random(node: fx.Node) -> bool:
    """Whether two runs of the node may give different results."""
    op = overload(node)
    return op is not None and torch.Tag.nondeterministic_seeded in op.tags


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into one of its arguments."""
    op = overload(node)
    return op is not None and op._schema.is_mutable


def is_effect(node: fx.Node) -> bool:
    """Whether the node does something besides computing its result: it must run exactly once."""
    if node.op in ("placeholder", "output"):
        return False
    return mutates(node) or node.is_impure()


def is_pointwise(node: fx.Node) -> bool:
    """Whether each output element depends on one element of each (broadcast) input."""
    op = overload(node)
    return op is not None and torch.Tag.pointwise in op.tags


def is_contraction(node: fx.Node) -> bool:
    """Whether the node is a matrix product, convolution or attention kernel."""
    return node.target in CONTRACTIONS


def is_fill(node: fx.Node) -> bool:
    """Whether the node makes a tensor out of sizes and numbers only (``full``, ``arange``)."""
    op = overload(node)
    return op is not None and not is_random(node) and not tensor_inputs(node)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The node's arguments that hold tensors (or tuples of tensors)."""
    return [n for n in node.all_input_nodes if not is_symbol(n)]


def is_symbol(node: fx.Node) -> bool:
    """Whether the node holds a symbolic size (SymInt, SymFloat, SymBool) or a plain number."""
    val = node.meta.get("val")
    return isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))
