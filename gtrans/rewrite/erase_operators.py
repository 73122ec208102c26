"""Erasure of whole operators: the graph without what only makes zeros.

    add(x, zero)                x                          expanded or cast where needed
    cat([x, zero]), W           x, W without the columns   where nothing but W reads them
    cat([x, zero]), batch_norm  cat([x, zeros])            statistics of zeros are not zero

A program without the segments is written down first. Its axes are analysed again, which tells
whether the zeros that stay in a concatenation are needed: an axis that no parameter produces and
that every sum over it finds zero is erased altogether.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from gtrans.analysis.axes import Axis, atoms
from gtrans.analysis.axis_rules.context import bind, packet_of
from gtrans.analysis.erasable import Structure, find_structure
from gtrans.analysis.segments import Segment, Segments
from gtrans.analysis.zeros import producers, unmet, zeros
from gtrans.ir.program import Program
from gtrans.rewrite.erase_graph import GraphErasure

aten = torch.ops.aten


def erase_segments(
    segments: Segments, chosen: Sequence[Segment], name: str
) -> tuple[fx.GraphModule, dict[str, list[torch.Tensor]]]:
    """Builds the model without the given segments, which are a valid set.

    Args:
        segments: all there are.
        chosen: the ones to erase.
        name: class name of the result.

    Returns:
        The model, and for each of its parameters and buffers which indices of it stay.
    """
    program, made = _without(segments, chosen)
    structure = find_structure(program)
    erased = _unneeded(structure, made)
    module = GraphErasure(structure, erased).build(name)
    return module, structure.masks(erased)


def _without(segments: Segments, chosen: Sequence[Segment]) -> tuple[Program, list[fx.Node]]:
    """The program without segments, and the zeros that stand in for operands of `cat`."""
    old = segments.program
    zero = segments.zero(chosen) - segments.zero(())
    gone = set().union(*(s.nodes for s in chosen)) | zero
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    stand_ins: list[fx.Node] = []
    for node in old.graph.nodes:
        if node in gone and old.leaves.get(node, _INNER) is _INNER:
            continue
        if node.op == "call_function" and any(s in zero for s in node.all_input_nodes):
            made[node] = _shorter(graph, node, zero, made, stand_ins)
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    for node in reversed(graph.nodes):
        if not node.users and node.op == "placeholder" and _is_tensor(old, node, made):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    kept = {k: v for k, v in made.items() if isinstance(v, fx.Node) and v.graph is graph}
    alive = set(graph.nodes)
    leaves = {kept[n]: leaf for n, leaf in old.leaves.items() if kept.get(n) in alive}
    tensors = {kept[n]: t for n, t in old.tensors.items() if kept.get(n) in alive}
    root = nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        setattr(root, str(node.target), getattr(old.module, str(node.target)))
    module = fx.GraphModule(root, graph)
    return replace(old, module=module, leaves=leaves, tensors=tensors), stand_ins


def _shorter(
    graph: fx.Graph,
    node: fx.Node,
    zero: set[fx.Node],
    made: dict[fx.Node, Any],
    stand_ins: list[fx.Node],
) -> fx.Node:
    """A joint without its zero operands."""
    if packet_of(node) in (aten.cat, aten.concat):
        tensors = bind(node)["tensors"]
        for source in (t for t in tensors if t in zero):
            value = source.meta["val"]
            made[source] = graph.call_function(
                aten.zeros.default,
                (list(value.shape),),
                {"dtype": value.dtype, "device": value.device},
            )
            made[source].meta = {"val": value}
            stand_ins.append(made[source])
        twin = graph.node_copy(node, made.__getitem__)
        for source in (t for t in tensors if t in zero):
            del made[source]
        return twin
    (left,) = (n for n in node.args[:2] if isinstance(n, fx.Node) and n not in zero)
    return _fitted(graph, made[left], left.meta["val"], node)


def _fitted(graph: fx.Graph, value: fx.Node, held: torch.Tensor, node: fx.Node) -> fx.Node:
    """A value in the shape and dtype that the joint had."""
    wanted = node.meta["val"]
    if held.shape != wanted.shape:
        value = graph.call_function(aten.expand.default, (value, list(wanted.shape)))
        value.meta = {**node.meta, "val": held.expand(wanted.shape)}
    if held.dtype != wanted.dtype:
        value = graph.call_function(aten.to.dtype, (value, wanted.dtype))
        value.meta = dict(node.meta)
    return value


def _unneeded(structure: Structure, stand_ins: list[fx.Node]) -> dict[Axis, torch.Tensor]:
    """The axes of zeros that nothing would miss, to be erased in full."""
    analysis = structure.analysis
    made = producers(analysis)
    failing = unmet(analysis, zeros(analysis, made))
    produced = {atom for _, _, atom in made}
    found: dict[Axis, torch.Tensor] = {}
    for node in stand_ins:
        for axis in analysis.context.axes.get(node, []):
            for atom in atoms(axis):
                if atom.frozen is None and atom not in produced and atom not in failing:
                    found[atom] = torch.ones(atom.size, dtype=torch.bool)
    return found


def _is_tensor(old: Program, node: fx.Node, made: dict[fx.Node, Any]) -> bool:
    return any(made.get(n) is node for n in old.tensors)


_INNER: Any = object()
