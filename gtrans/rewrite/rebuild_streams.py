"""Lets the backward read rebuilt values instead of kept ones.

    dw = b(dy, h)        -->        h' = recipe(later values);  dw = b(dy, h')

Copies are written right before their first backward reader, so that they live as briefly as the
order of the backward allows.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gtrans.analysis.couplings import Couplings
from gtrans.analysis.kinks import reads_kink
from gtrans.errors import GraphError
from gtrans.ir import ops
from gtrans.ir.joint import TAG, JointGraph, Offer, Placement, tag

aten = torch.ops.aten

Recipes = dict[fx.Node, Offer | None]
"""How to get values in the backward: by a function of others, or (None) by running them again."""


def rebuild(graph: JointGraph, couplings: Couplings, recipes: Recipes) -> None:
    """Rewires every backward reader of a value that has a recipe.

    Raises:
        GraphError: a recipe needs, in the end, the value that it is to rebuild.
    """
    _Writer(graph, couplings, recipes).run()


def backward_reads(graph: JointGraph) -> Iterable[tuple[fx.Node, fx.Node]]:
    """Every backward node with every forward value that it reads."""
    for reader in graph.nodes:
        if graph.is_backward(reader):
            for source in ops.tensor_inputs(reader):
                if graph.is_forward(source):
                    yield reader, source


def must_be_exact(reader: fx.Node, source: fx.Node, couplings: Couplings) -> bool:
    """Whether the reader compares a rebuilt value with a number, which the last bits may decide."""
    return reads_kink(reader) and source in couplings.rounded


class _Writer:
    """Puts the copies into the backward, each right before its first reader."""

    def __init__(self, graph: JointGraph, couplings: Couplings, recipes: Recipes) -> None:
        self.graph = graph
        self.couplings = couplings
        self.recipes = recipes
        self.made: dict[fx.Node, fx.Node] = {}
        self.number = {c.stream: i for i, c in enumerate(couplings.found)}
        twins = (tag(n).twin for n in graph.nodes if n.op != "output")
        self.first_twin = 1 + max((t for t in twins if t is not None), default=-1)

    def run(self) -> None:
        for reader, source in list(backward_reads(self.graph)):
            if source in self.recipes and not must_be_exact(reader, source, self.couplings):
                self.graph.replace_uses(source, self.at(source, reader), [reader])

    def at(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """The rebuilt value; made right before the reader unless an earlier one needed it."""
        stack, waiting = [value], {value}
        while stack:
            top = stack[-1]
            missing = [n for n in self._inputs(top) if n in self.recipes and n not in self.made]
            if top in self.made or not missing:
                stack.pop()
                waiting.discard(top)
                if top not in self.made:
                    self.made[top] = self._make(top, reader)
                continue
            if missing[0] in waiting:
                raise GraphError(f"{missing[0].name} would have to be rebuilt from itself")
            waiting.add(missing[0])
            stack.append(missing[0])
        return self.made[value]

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        offer = self.recipes[node]
        return ops.tensor_inputs(node) if offer is None else offer.nodes

    def _make(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        graph, before = self.graph, reader.prev
        if node in self.couplings.masked:
            result = self._masked(node, reader)
        elif (offer := self.recipes[node]) is not None:
            inputs = fx.map_arg(offer.inputs, self._rebuilt)
            (result,) = graph.splice_before(reader, offer.function, *inputs)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._rebuilt)
            target: Any = node.target
            if target is aten.view.default and _strides(args[0]) != _strides(node.args[0]):
                target = aten.reshape.default  # what was a view there need not be one here
            result = graph.insert_before(reader, target, *args, **kwargs)
        while before.next is not reader:
            before = before.next
            self._mark(before, node)
        number = self.number.get(node) if node in self.couplings.inverse else None
        for value in (node, result):
            known = tag(value)
            recovers = known.recovers if number is None else number
            twin = self.first_twin + len(self.made)
            value.meta[TAG] = replace(known, recovers=recovers, twin=twin)
        return result

    def _masked(self, relu: fx.Node, reader: fx.Node) -> fx.Node:
        """ReLU of a rebuilt stream: where the forward had a zero there must be one again."""
        off = self.graph.insert_after(relu, aten.le.Scalar, relu, 0)
        self.graph.save_for_backward(off)
        stream = self._rebuilt(relu.all_input_nodes[0])
        return self.graph.insert_before(reader, aten.masked_fill.Scalar, stream, off, 0)

    def _rebuilt(self, node: fx.Node) -> fx.Node:
        return self.made.get(node, node)

    def _mark(self, copy: fx.Node, node: fx.Node) -> None:
        for key in ("stack_trace", "nn_module_stack", "seq_nr"):
            if key in node.meta:
                copy.meta[key] = node.meta[key]
        copy.meta[TAG] = replace(tag(copy), region=tag(node).region)
        self.graph.place(copy, Placement.REBUILT)


def _strides(node: Any) -> Any:
    return node.meta["val"].stride()
