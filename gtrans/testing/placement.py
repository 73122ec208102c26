"""Random legal decisions about what to save, to test that no decision changes a gradient."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, Pass, Permission, Stats
from gtrans.ir import ops
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.ir.ops import storage_of
from gtrans.ir.printer import target_name
from gtrans.ir.program import Program
from gtrans.ir.sizes import shape_text


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
        circular = _behind_offers(graph)
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
            elif (
                decision is Placement.REBUILT
                and node not in circular
                and _can_be_rebuilt(node, overwritten)
            ):
                graph.rebuild_in_backward(node)
                stats.rewritten += 1
            else:
                stats.skipped["left to the plan"] += 1
        return stats


def _behind_offers(graph: JointGraph) -> set[fx.Node]:
    """Values that would be rebuilt from themselves if all on the way to an offer were rebuilt."""
    found: set[fx.Node] = set()
    for value, offer in graph.offers.items():
        needed = _closure(offer.nodes, lambda n: n.all_input_nodes)
        made_from_it = _closure([value], lambda n: [u for u in n.users if graph.is_forward(u)])
        found |= needed & made_from_it
    return found


def _closure(
    start: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += following(node)
    return seen


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


def graph_text(graph: JointGraph | ForwardGraph | Program) -> str:
    """A graph as text that is equal for equal graphs, whatever their nodes are called.

    It states operators, arguments, shapes, sides, placements and offers.
    """
    names = {node: _Name(f"v{i}") for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: names[n])
        shape = shape_text(node.meta.get("val", node.meta.get("example_value")))
        line = f"{names[node]} = {target_name(node)}{tuple(args)}{dict(kwargs) or ''}  # {shape}"
        if isinstance(graph, JointGraph) and node.op != "output":
            line += f" {tag(node).side.value} {tag(node).placement.value}"
        lines.append(line)
    if isinstance(graph, JointGraph):
        for value, offer in sorted(graph.offers.items()):
            inputs = fx.map_arg(offer.inputs, lambda n: names[n])
            lines.append(f"{OFFERED} {names[value]} = {_described(offer.function)}{inputs}")
    return "\n".join(lines)


OFFERED = "offered"


class _Name(str):
    """A node's name within arguments, printed without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _described(function: object) -> str:
    inner = getattr(function, "func", function)
    given = getattr(function, "keywords", "")
    return f"{getattr(inner, '__qualname__', type(inner).__name__)}{given or ''}"
