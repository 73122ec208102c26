"""Which dimensions of a model can shrink: one pass of transfer rules over a program.

Sound by construction: an operator without a rule freezes all its operands, with its name as the
reason; inputs and outputs are frozen, so the interface of the model stays.
"""

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from gtrans.analysis.axes import Axis, atoms, factors, find, freeze, is_frozen, segments, unify
from gtrans.analysis.axis_rules import rule_of
from gtrans.analysis.axis_rules.context import Context, Unsupported, bind, fresh
from gtrans.ir import ops
from gtrans.ir.program import Program
from gtrans.ir.source import location


@dataclass
class AxisAnalysis:
    """The axes of every value of a program.

    Attributes:
        program: the captured forward.
        context: axes, edits, sums.
        written: values whose memory is written in place through a view; nothing is known of them.
        unknown: operators without a rule that met an axis which was not frozen yet, and how often.
    """

    program: Program
    context: Context
    written: set[fx.Node]
    unknown: Counter[str]

    def axes(self, node: fx.Node) -> list[Axis]:
        """The axes of a tensor value."""
        return self.context.of(node)


def analyse_axes(program: Program) -> AxisAnalysis:
    """Gives every dimension of every value its axis."""
    analysis = AxisAnalysis(program, Context(), set(), Counter())
    _leaves(analysis)
    for node in program.graph.nodes:
        if node.op == "call_function":
            _call(analysis, node)
        elif node.op == "output":
            for leaf in pytree.arg_tree_leaves(*node.args):
                if isinstance(leaf, fx.Node):
                    _freeze_values(analysis, leaf, "output")
    _freeze_squares(analysis)
    return analysis


def _leaves(analysis: AxisAnalysis) -> None:
    program, context = analysis.program, analysis.context
    reasons = {"input": "input", "constant": "constant of the forward"}
    for node, leaf in program.leaves.items():
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            context.axes[node] = fresh(_sizes(value), reasons.get(leaf.kind))
    for first, *others in program.ties():
        for other in others:
            for a, b in zip(context.of(first), context.of(other), strict=True):
                unify(a, b)


def _call(analysis: AxisAnalysis, node: fx.Node) -> None:
    context = analysis.context
    if node.target is operator.getitem:
        source, position = node.args
        found = context.axes.get(source) if isinstance(source, fx.Node) else None
        if isinstance(found, list) and isinstance(position, int):
            context.axes[node] = found[position]
        return
    if not _has_tensor(node.meta.get("val")):
        return
    if ops.mutates(node):
        _poison(analysis, node)
        return
    rule = rule_of(node)
    try:
        if rule is None:
            raise Unsupported("no rule")
        context.axes[node] = rule(context, node, bind(node))
    except (Unsupported, IndexError) as error:
        context.edits.pop(node, None)
        # Sums that the rule noted before it gave up stay: they only make the result stricter.
        _give_up(analysis, node, f"{_name(node)}: {error} ({location(node)})")


def _give_up(analysis: AxisAnalysis, node: fx.Node, reason: str) -> None:
    operands = [n for n in node.all_input_nodes if n in analysis.context.axes]
    if any(not is_frozen(a) for n in operands for a in _flat(analysis.context.axes[n])):
        analysis.unknown[_name(node)] += 1
    for operand in operands:
        _freeze_values(analysis, operand, reason)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        analysis.context.axes[node] = fresh(_sizes(value), reason)
    elif isinstance(value, (list, tuple)):
        analysis.context.axes[node] = [
            fresh(_sizes(v), reason) if isinstance(v, torch.Tensor) else [] for v in value
        ]


def _poison(analysis: AxisAnalysis, node: fx.Node) -> None:
    """Freezes everything that may share memory with what a node writes."""
    _give_up(analysis, node, f"{_name(node)} writes in place ({location(node)})")
    pending = [n for n in node.all_input_nodes[:1] if n in analysis.context.axes] + [node]
    while pending:
        value = pending.pop()
        if value in analysis.written:
            continue
        analysis.written.add(value)
        if value in analysis.context.axes:
            _freeze_values(analysis, value, f"{_name(node)} writes in place ({location(node)})")
        pending += [u for u in value.users if ops.is_view(u) or ops.mutates(u)]
        if ops.is_view(value) or ops.mutates(value):
            pending += value.all_input_nodes[:1]


def _freeze_squares(analysis: AxisAnalysis) -> None:
    """Freezes atoms that occur twice within one product: an index there has two owners."""
    for node in analysis.program.tensors:
        for axis in analysis.context.axes.get(node, []):
            for piece in segments(axis):
                seen = Counter(atom for f in factors(piece) for atom in set(atoms(f)))
                for atom, count in seen.items():
                    if count > 1 and find(atom).frozen is None:
                        freeze(atom, "an axis multiplied by itself")


def _freeze_values(analysis: AxisAnalysis, node: fx.Node, reason: str) -> None:
    for axis in _flat(analysis.context.axes.get(node, [])):
        freeze(axis, reason)


def _flat(found: Any) -> list[Axis]:
    return [a for item in found for a in (item if isinstance(item, list) else [item])]


def _sizes(value: torch.Tensor) -> list[int]:
    # A symbolic size is frozen by whoever made it; its number only has to be consistent.
    return [s if isinstance(s, int) else s.node.hint or 2 for s in value.shape]


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return getattr(node.target, "__name__", str(node.target))
