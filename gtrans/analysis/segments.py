"""Operators that can be erased as a whole: segments, and which of them can go together.

A segment is everything that the model computes only to hand one operand to a joint (`add`, `cat`):
a residual branch, a candidate of a supernet, the deeper levels of a U-Net. With its own parameters
zero the operand is zero, the joint does without it, and nothing of the segment is needed.

    x ──┬── norm ── linear ── relu ── linear ──┐            x ──────────────┐
        └──────────────────────────────────── add   --->                    └── what follows
             └────────── a segment ────────┘

Segments are nested or apart (they are subtrees of the tree of post-dominators). Which sets of them
may go is decided by a walk over the graph, as H2SPG does: every joint keeps an operand, and every
output that depended on an input still does.
Source: arXiv:2312.09411 and arXiv:2305.18030 (erasing operators, H2SPG), which zero stems; here a
segment needs a proof that it is zero, and that nothing else changes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx
import torch
from torch import fx
from torch.utils import _pytree as pytree

from gtrans.analysis.axes import Axis
from gtrans.analysis.axis_rules.context import packet_of
from gtrans.analysis.erasable import ErasableClass, Member, Structure, flops_of
from gtrans.analysis.erase_choice import Target, floored
from gtrans.analysis.vanishing import JOINTS, ignores, vanishing
from gtrans.errors import PlanError
from gtrans.ir.printer import target_name
from gtrans.ir.program import Program
from gtrans.ir.source import location


@dataclass(frozen=True)
class Segment:
    """One operand of a joint, and what is computed for it alone.

    Attributes:
        name: the modules that it runs from and to, as "blocks.0.norm..blocks.0.down".
        exit: the operand.
        nodes: what is computed for it alone, itself included.
        weights: placeholders of the parameters that only it reads.
        parameters: their number of elements.
        flops: operations of its products.
    """

    name: str
    exit: fx.Node
    nodes: frozenset[fx.Node]
    weights: tuple[fx.Node, ...]
    parameters: int
    flops: int

    def __str__(self) -> str:
        return f"{self.name} ({self.parameters:,} parameters)"


@dataclass
class Segments:
    """The segments of a program, in the order of the forward.

    Args:
        structure: the analysed program.
    """

    structure: Structure

    @cached_property
    def all(self) -> list[Segment]:
        """Every segment that can go by itself."""
        found: list[Segment] = []
        seen: set[tuple[fx.Node, ...]] = set()
        inside = _cones(self.program)
        names: set[str] = set()
        for exit in self._operands():
            cone = frozenset(inside(exit) or ())
            weights = tuple(self._own_weights(cone))
            if not weights or weights in seen:
                continue
            if exit not in vanishing(self.structure.analysis, set(weights)):
                continue
            segment = self._segment(exit, cone, weights, names)
            if not self.problem([segment]):
                seen.add(weights)
                names.add(segment.name)
                found.append(segment)
        return found

    @property
    def program(self) -> Program:
        """The captured forward."""
        return self.structure.program

    def zero(self, chosen: Iterable[Segment]) -> set[fx.Node]:
        """The values that are zero once the parameters of the given segments are."""
        given = {w for s in chosen for w in s.weights}
        return vanishing(self.structure.analysis, given) if given else set(self._zero_anyway)

    def problem(self, chosen: Sequence[Segment]) -> str:
        """Why the rest would not compute without these segments what it does with zeros.

        Every reader of a zero must ignore it, and every output still depend on an input if it did.
        Empty if all is well.
        """
        zero = self.zero(chosen) - self._zero_anyway
        gone = set().union(*(s.nodes for s in chosen)) | zero
        for node in self.program.graph.nodes:
            if node.op == "output":
                if any(leaf in zero for leaf in _leaves(node)):
                    return "an output would be nothing but zeros"
                continue
            reads = node not in gone and any(source in zero for source in node.all_input_nodes)
            if reads and not ignores(node, zero):
                return f"{target_name(node)} ({location(node)}) would read nothing but zeros"
        if not self._fed_anyway <= self._fed(gone):
            return "an output would no longer depend on an input"
        return ""

    def as_class(self) -> ErasableClass:
        """The segments as one class whose indices they are, for what works on classes."""
        members = tuple(
            Member(leaf.name, 0, True, torch.full(tensor.shape[:1] or (1,), number))
            for number, s in enumerate(self.all)
            for w in s.weights
            for leaf, tensor in [(self.program.leaves[w], self.program.tensors[w])]
        )
        return ErasableClass("operators", Axis(len(self.all)), len(self.all), members, True, "", 0)

    # ------------------------------------------------------------------ private

    @cached_property
    def _zero_anyway(self) -> set[fx.Node]:
        return vanishing(self.structure.analysis, set())

    @cached_property
    def _fed_anyway(self) -> set[int]:
        return self._fed(set())

    def _fed(self, gone: set[fx.Node]) -> set[int]:
        """Numbers of the outputs that depend on an input through what is left."""
        reached: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            leaf = self.program.leaves.get(node)
            if leaf is not None and leaf.kind == "input":
                reached.add(node)
            elif node.op == "output":
                return {i for i, leaf in enumerate(_leaves(node)) if leaf in reached}
            elif node not in gone and any(s in reached for s in node.all_input_nodes):
                reached.add(node)
        return set()

    def _operands(self) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and packet_of(node) in JOINTS:
                found |= dict.fromkeys(n for n in node.all_input_nodes if n.op == "call_function")
        return list(found)

    def _own_weights(self, cone: frozenset[fx.Node]) -> list[fx.Node]:
        shared = {n for group in self.program.ties() for n in group if not set(group) <= cone}
        return [
            n
            for n, leaf in self.program.leaves.items()
            if leaf.kind == "parameter" and n in cone and n not in shared
        ]

    def _name(self, weights: tuple[fx.Node, ...]) -> str:
        """The module that is the segment, or else those that it runs from and to."""
        leaves = self.program.leaves
        owners = [leaves[w].name.split(".")[:-1] for w in weights]
        shared = owners[0]
        for other in owners[1:]:
            same = [a == b for a, b in zip(shared, other, strict=False)]
            shared = shared[: same.index(False) if False in same else len(same)]
        parameters = self.program.parameters().items()
        start = ".".join([*shared, ""])
        if shared and {n for name, n in parameters if name.startswith(start)} == set(weights):
            return ".".join(shared)
        ends = [".".join(o[: len(shared) + 1]) for o in (owners[0], owners[-1])]
        last = ends[1].removeprefix(start if shared else "")
        return ends[0] or "model" if ends[0] == ends[1] else f"{ends[0]}..{last}"

    def _segment(
        self,
        exit: fx.Node,
        cone: frozenset[fx.Node],
        weights: tuple[fx.Node, ...],
        names: set[str],
    ) -> Segment:
        name = self._name(weights)
        if name in names:
            name = f"{name} ({exit.name})"
        count = sum(self.program.tensors[w].numel() for w in weights)
        flops = sum(flops_of(self.structure.analysis, n, {}) for n in cone)
        return Segment(name, exit, cone, weights, count, flops)


def pick_segments(
    segments: Segments, scores: torch.Tensor, target: Target, start: Sequence[Segment] = ()
) -> list[Segment]:
    """The segments to erase: the lowest scores first, each only if the rest stays a whole.

    Args:
        segments: all there are.
        scores: one each.
        target: `sparsity` counts segments and is not exceeded; `params` and `flops` are shares of
            the whole model that may be left, reached from above.
        start: segments that are erased already.

    Raises:
        PlanError: this order does not lead to the target; the message says how far it leads.
    """
    chosen = list(start)
    gap = _Gap(segments, target)
    too_large = False
    for number in torch.argsort(scores, stable=True).tolist():
        if gap.closed(chosen):
            break
        candidate = segments.all[number]
        if any(candidate.nodes <= s.nodes for s in chosen):
            continue
        more = [*(s for s in chosen if not s.nodes <= candidate.nodes), candidate]
        if not gap.admits(more):
            too_large = True  # it holds others, which would go with it: the target lies between
        elif not segments.problem(more):
            chosen = more
    if not too_large:
        gap.require(chosen)
    return chosen


@dataclass(frozen=True)
class _Gap:
    """How far a choice of segments is from a target."""

    segments: Segments
    target: Target

    def closed(self, chosen: Sequence[Segment]) -> bool:
        if self.target.sparsity is not None:
            return self._count(chosen) >= self._goal
        return self._left(chosen) <= self._share * self._whole

    def admits(self, chosen: Sequence[Segment]) -> bool:
        return self.target.sparsity is None or self._count(chosen) <= self._goal

    def require(self, chosen: Sequence[Segment]) -> None:
        if self.closed(chosen):
            return
        if self.target.sparsity is not None:
            most = self._count(chosen) / max(1, len(self.segments.all))
            raise PlanError(
                f"sparsity {self.target.sparsity:g} asks for {self._goal} of "
                f"{len(self.segments.all)} operators, but only {self._count(chosen)} can go "
                f"together; the largest reachable sparsity is {floored(most)}"
            )
        name = "params" if self.target.params is not None else "flops"
        least = self._left(chosen) / max(1, self._whole)
        raise PlanError(
            f"{name}={self._share:g} cannot be reached by erasing operators: {least:.4f} of the "
            f"{name} are left when no more can go; ask for {name}={least + 5e-5:.4f} or more"
        )

    @property
    def _goal(self) -> int:
        return int((self.target.sparsity or 0.0) * len(self.segments.all) + 1e-9)

    @property
    def _share(self) -> float:
        return next(v for v in (self.target.params, self.target.flops) if v is not None)

    @property
    def _whole(self) -> int:
        structure = self.segments.structure
        return structure.parameters({}) if self.target.params is not None else structure.flops({})

    def _left(self, chosen: Sequence[Segment]) -> int:
        by_count = self.target.params is not None
        return self._whole - sum(s.parameters if by_count else s.flops for s in chosen)

    def _count(self, chosen: Sequence[Segment]) -> int:
        return sum(any(s.nodes <= c.nodes for c in chosen) for s in self.segments.all)


# ---------------------------------------------------------------------- private


def _leaves(output: fx.Node) -> list[object]:
    return pytree.arg_tree_leaves(*output.args)


def _cones(program: Program) -> Callable[[fx.Node], list[fx.Node] | None]:
    """For a value, what is computed for it alone: its subtree of the post-dominators.

    Returns:
        A function that gives the nodes, or None where an input of the model is among them.
    """
    flow = networkx.DiGraph()
    for node in program.graph.nodes:
        flow.add_edges_from((node, source) for source in node.all_input_nodes)
    sink = next(iter(program.graph.find_nodes(op="output")))
    parents = networkx.immediate_dominators(flow, sink)
    children: dict[fx.Node, list[fx.Node]] = {}
    for node, parent in parents.items():
        if parent is not None and node is not parent:
            children.setdefault(parent, []).append(node)
    fed: set[fx.Node] = set()
    for node, leaf in program.leaves.items():
        here: fx.Node | None = node if leaf.kind == "input" else None
        while here is not None and here not in fed:
            fed.add(here)
            here = parents.get(here) if here is not sink else None

    def inside(exit: fx.Node) -> list[fx.Node] | None:
        if exit in fed:
            return None
        found = [exit]
        for node in found:
            found += children.get(node, [])
        return found

    return inside
