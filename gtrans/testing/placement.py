"""Random legal decisions about what to save, to test that no decision changes a gradient."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, Pass, Permission, Stats
from gtrans.ir import ops
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.ir.printer import to_code
from gtrans.plan.cut import storage_of


@dataclass(frozen=True)
class RandomPlacement(Pass[JointGraph]):
    """Fixes for a random third of the forward values each that they are saved or rebuilt.

    Decisions of other passes stay. It comes right before the plan, which must honour them.

    Args:
        seed: of the decisions.
    """

    name: ClassVar[str] = "random-placement"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    seed: int = 0

    @property
    def contract(self) -> Contract:
        """The same gradient, bit for bit."""
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Draws a decision for every value that leaves the planner a choice."""
        draw = random.Random(self.seed)
        stats = Stats()
        overwritten = {storage_of(n.all_input_nodes[0]) for n in graph.nodes if ops.mutates(n)}
        for node in graph.nodes:
            if not (graph.is_forward(node) and node.op == "call_function"):
                continue
            if ops.is_symbol(node) or tag(node).placement is not Placement.AUTO:
                continue
            stats.matched += 1
            decision = draw.choice(list(Placement))
            if decision is Placement.SAVED and _can_be_saved(node):
                graph.save_for_backward(node)
                stats.rewritten += 1
            elif decision is Placement.REBUILT and _can_be_rebuilt(node, overwritten):
                graph.rebuild_in_backward(node)
                stats.rewritten += 1
            else:
                stats.skipped["left to the plan"] += 1
        return stats


def _can_be_saved(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor) and storage_of(node) is node


def _can_be_rebuilt(node: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Whether all it takes is saved values: views and tuples on the way are rebuilt with it."""
    if ops.is_random(node) or ops.is_effect(node):
        return False
    if ops.is_getitem(node) and _can_be_saved(node):
        return False  # a part of a tuple: the planner decides whether to run the whole again
    for source in ops.tensor_inputs(node):
        if storage_of(source) in overwritten:
            return False
        needs_rebuilding = source.op == "call_function" and not _can_be_saved(source)
        if needs_rebuilding and not _can_be_rebuilt(source, overwritten):
            return False
    return True


def graph_text(graph: JointGraph | ForwardGraph) -> str:
    """A graph as text that is equal for equal graphs: operators, shapes, placements, offers."""
    code = to_code(graph.graph, lines=False, fold_getitem=False)
    if isinstance(graph, ForwardGraph):
        return code
    placed = [
        f"{tag(n).placement.value} {n.name}"
        for n in graph.nodes
        if n.op != "output" and tag(n).placement is not Placement.AUTO
    ]
    offered = [
        f"offered {value.name} = {getattr(o.function, '__qualname__', o.function)}{o.inputs}"
        for value, o in sorted(graph.offers.items())
    ]
    return "\n".join([code, *placed, *offered])
