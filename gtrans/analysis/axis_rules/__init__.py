"""Transfer rules: how the axes of an operator's result follow from those of its operands.

One function per family of operators; the table below finds it. An operator without a rule is not
guessed at: all its operands keep their sizes, with its name as the reason.
"""

from typing import Any

import torch
from torch import fx

from gtrans.analysis.axis_rules import norms, pointwise, products, recurrent, shapes
from gtrans.analysis.axis_rules.context import Rule, packet_of

aten = torch.ops.aten

RULES: dict[Any, Rule] = {
    **products.RULES,
    **norms.RULES,
    **recurrent.RULES,
    **shapes.RULES,
    aten.prelu: pointwise.prelu,
    aten._prelu_kernel: pointwise.prelu,
}
"""Rules by operator, for all its overloads."""


def rule_of(node: fx.Node) -> Rule | None:
    """The transfer rule of a call, None if there is none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    packet = packet_of(node)
    if packet in (aten.view, aten._unsafe_view) and node.target is aten.view.dtype:
        return None
    found = RULES.get(packet)
    if found is None and pointwise.is_pointwise(node):
        return pointwise.pointwise
    return found
