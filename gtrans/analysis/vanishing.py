"""Which values are zero throughout once whole parameters are: the proof behind erasing operators.

`zeros` asks this index by index; here a value is either zero everywhere or not known to be. What
reads a value that is zero either is zero itself, or does not notice (`ignores`):

    linear(0, W)        zero            add(x, 0)        x
    linear(0, W, b)     not zero        cat([x, 0])      x beside zeros that nothing needs
    relu(0), 0 · x      zero            batch_norm(0)    not zero, unless its weight and bias are
"""

import operator
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import fx

from gtrans.analysis.axis_analysis import AxisAnalysis
from gtrans.analysis.axis_rules.context import bind, packet_of
from gtrans.analysis.axis_rules.pointwise import COPIES, is_pointwise
from gtrans.analysis.axis_rules.recurrent import GATES, Recurrence, arguments
from gtrans.analysis.axis_rules.shapes import RULES as SHAPE_RULES
from gtrans.analysis.zeros import INTERSECT, KEEPING, MULTIPLY, NEVER, ZEROS, maps_zero_to_zero
from gtrans.ir import ops

aten = torch.ops.aten

JOINTS = frozenset({aten.add, aten.sub, aten.subtract, aten.cat, aten.concat})
"""Operators that can do without one of their operands."""

Zero = Set[fx.Node]


def vanishing(analysis: AxisAnalysis, given: Zero) -> set[fx.Node]:
    """The values that are zero throughout if the given ones are; those included."""
    found = set(given)
    for node in analysis.program.graph.nodes:
        if (
            node.op == "call_function"
            and node not in analysis.written
            and not ops.mutates(node)
            and _is_zero(node, found)
        ):
            found.add(node)
    return found


def ignores(node: fx.Node, zero: Zero) -> bool:
    """Whether a node that is not zero itself computes the same without its zero operands."""
    packet = packet_of(node)
    if packet in (aten.cat, aten.concat):
        return True
    if packet not in JOINTS or len(node.args) < 2:
        return False
    right = node.args[1]
    if right in zero:
        return True
    # 0 + 1·y is y; 0 - y and 0 + 2·y would need another operator in its place.
    return packet is aten.add and bind(node).get("alpha", 1) == 1 and isinstance(right, fx.Node)


# ---------------------------------------------------------------------- private


def _is_zero(node: fx.Node, zero: Zero) -> bool:
    if node.target is operator.getitem:
        value = node.meta.get("val")
        # Positions that come along with values, as of a maximum, are not zero.
        return (
            node.args[0] in zero and isinstance(value, torch.Tensor) and value.is_floating_point()
        )
    packet = packet_of(node)
    if packet in ZEROS:
        return True
    rule = _RULES.get(packet)
    if rule is not None:
        return rule(bind(node), zero)
    moves = packet in SHAPE_RULES and packet not in NEVER
    if moves or packet in KEEPING or packet in COPIES:
        return bool(node.args) and node.args[0] in zero
    if not is_pointwise(node):
        return False
    operands = node.all_input_nodes
    if len(operands) == 1 and node.args and node.args.count(operands[0]) == 1:
        return operands[0] in zero and maps_zero_to_zero(node, operands[0])
    if packet in MULTIPLY:
        return any(n in zero for n in operands)
    if packet in (aten.div, aten.divide):
        return node.args[0] in zero and node.args[1] not in zero
    return packet in INTERSECT and bool(operands) and all(n in zero for n in operands)


def _no(value: Any, zero: Zero) -> bool:
    """Whether an optional argument adds nothing."""
    return value is None or value in zero


def _product(b: dict[str, Any], zero: Zero) -> bool:
    return (b["input"] in zero or b["weight"] in zero) and _no(b.get("bias"), zero)


def _sum_of_product(b: dict[str, Any], zero: Zero) -> bool:
    first, *factors = [v for v in b.values() if isinstance(v, fx.Node)]
    return first in zero and any(f in zero for f in factors)


def _any_factor(b: dict[str, Any], zero: Zero) -> bool:
    flat = [v for value in b.values() for v in (value if isinstance(value, list) else [value])]
    return any(v in zero for v in flat if isinstance(v, fx.Node))


def _attention(b: dict[str, Any], zero: Zero) -> bool:
    return b["value"] in zero


def _embedding(b: dict[str, Any], zero: Zero) -> bool:
    return b["weight"] in zero


def _scaled(b: dict[str, Any], zero: Zero) -> bool:
    """Norms with statistics of their own input: of zeros they make their bias."""
    scaled = b["input"] in zero or (b.get("weight") is not None and b["weight"] in zero)
    return scaled and _no(b.get("bias"), zero)


def _batch(b: dict[str, Any], zero: Zero) -> bool:
    """Norms with running statistics: of zeros they make something else."""
    return b["weight"] is not None and b["weight"] in zero and _no(b["bias"], zero)


def _all_parts(b: dict[str, Any], zero: Zero) -> bool:
    return bool(b["tensors"]) and all(t in zero for t in b["tensors"])


def _where(b: dict[str, Any], zero: Zero) -> bool:
    chosen = (b.get("self"), b.get("other"))
    return all(v in zero if isinstance(v, fx.Node) else v == 0 for v in chosen)


def _filled(b: dict[str, Any], zero: Zero) -> bool:
    return b["self"] in zero and b["value"] == 0


def _padded(b: dict[str, Any], zero: Zero) -> bool:
    return b["self"] in zero and b.get("value") in (None, 0)


def _recurrent(b: dict[str, Any], zero: Zero) -> bool:
    r: Recurrence = arguments(b)
    return all(s in zero for s in r.states) and all(w in zero for ws in r.layers for w in ws)


def _both(b: dict[str, Any], zero: Zero) -> bool:
    return b["self"] in zero and b.get("source", b.get("src")) in zero


def _copied(b: dict[str, Any], zero: Zero) -> bool:
    return b["src"] in zero


_RULES: dict[Any, Callable[[dict[str, Any], Zero], bool]] = {
    aten.scaled_dot_product_attention: _attention,
    aten.embedding: _embedding,
    aten.where: _where,
    aten.masked_fill: _filled,
    aten.pad: _padded,
    aten.constant_pad_nd: _padded,
    aten.index_add: _both,
    aten.select_scatter: _both,
    aten.slice_scatter: _both,
    aten.copy: _copied,
}
_RULES |= dict.fromkeys(
    (
        *(aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
        *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    ),
    _product,
)
_RULES |= dict.fromkeys((aten.addmm, aten.baddbmm), _sum_of_product)
_RULES |= dict.fromkeys(
    (aten.mm, aten.bmm, aten.matmul, aten.mv, aten.dot, aten.einsum, aten._grouped_mm), _any_factor
)
_RULES |= dict.fromkeys((aten.layer_norm, aten.rms_norm, aten.group_norm), _scaled)
_RULES |= dict.fromkeys(
    (torch.ops.gtrans.layer_norm_of_longer, torch.ops.gtrans.rms_norm_of_longer), _scaled
)
_RULES |= dict.fromkeys((aten.batch_norm, aten.instance_norm), _batch)
_RULES |= dict.fromkeys((aten.cat, aten.concat, aten.stack), _all_parts)
_RULES |= dict.fromkeys(GATES, _recurrent)
