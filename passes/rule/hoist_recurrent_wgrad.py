"""Compute the weight gradient of a recurrence as one product instead of one product a step.

    dW = d1^T a1 + d2^T a2 + ... + dT^T aT        -->  dW = cat(d1 ... dT)^T cat(a1 ... aT)
    db = sum(d1) + sum(d2) + ... + sum(dT)        -->  db = sum(cat(d1 ... dT))

Shapes: d: [b, m]; a: [b, n]; the concatenations [T*b, m] and [T*b, n]; dW: [m, n]; db: [m].
Saves: T - 1 products, reductions and sums of weight size each; no bytes.
Costs: the cotangents d of all steps live until the last one, and a copy of them and of a is made:
    T * b * (2 m + n) elements. Where b is large a single step's product is efficient already.
Contract: exact, up to the order of the sum.
Needs: one weight used at least `min_terms` times, as by an unrolled recurrence or tied layers.
Source: gtrans; what every fused recurrent kernel does, on any graph that sums such products.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir.joint import JointGraph
from gtrans.ir.ops import aten


@dataclass(frozen=True)
class HoistRecurrentWgrad(Pass[JointGraph]):
    """Sum the weight gradients of many steps in one product.

    Args:
        min_terms: leave sums of fewer products alone.
    """

    name: ClassVar[str] = "hoist-recurrent-wgrad"
    knob: ClassVar[Knob] = Knob.RULE
    reads_steps: ClassVar[bool] = True

    min_terms: int = 4

    def __post_init__(self) -> None:
        require(
            self.min_terms >= 2,
            f"hoist-recurrent-wgrad: min_terms must be at least 2, got {self.min_terms}",
        )

    @property
    def contract(self) -> Contract:
        """The same gradient, up to the order of a sum."""
        return Exact(bitwise=False)

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Rewrites one sum after another."""
        stats = Stats()
        joined: dict[tuple[fx.Node, ...], fx.Node] = {}
        for total in _totals(graph):
            leaves = sorted(_leaves(graph, total))
            terms = [n for n in leaves if _is_product(graph, n)]
            if len(terms) < 2:
                terms = [n for n in leaves if _is_column_sum(graph, n)]
            if len(terms) < 2:
                continue
            stats.matched += 1
            if len(terms) < self.min_terms:
                stats.refuse(total, "fewer steps than min_terms")
            elif not permitted(total.name):
                stats.refuse(total, HELD_BACK)
            else:
                rest = [n for n in leaves if n not in terms]
                _rewrite(graph, total, terms, rest, joined)
                stats.rewritten += 1
        return stats


def _totals(graph: JointGraph) -> list[fx.Node]:
    """The sums of cotangents that are no part of a larger sum."""
    sums = [n for n in graph.gradient_accumulations() if n.target is aten.add.Tensor]
    within = {n for s in sums for n in s.all_input_nodes if len(n.users) == 1}
    return [n for n in sums if n not in within]


def _leaves(graph: JointGraph, total: fx.Node) -> Iterable[fx.Node]:
    """What a sum adds up; partial sums that something else reads are not opened."""
    sums = set(graph.gradient_accumulations())
    pending = [total]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in sums and source.target is aten.add.Tensor and len(source.users) == 1:
                pending.append(source)
            else:
                yield source


def _is_product(graph: JointGraph, node: fx.Node) -> bool:
    """Whether a term is d^T a, and nothing else reads it."""
    if node.target is not aten.mm.default or len(node.users) != 1:
        return False
    left, right = node.all_input_nodes[0], node.args[1]
    return left.target is aten.t.default and graph.is_backward(left) and graph.is_forward(right)


def _is_column_sum(graph: JointGraph, node: fx.Node) -> bool:
    """Whether a term is the sum of the rows of a matrix, as autograd writes it for a bias."""
    if node.target is not aten.view.default or len(node.users) != 1:
        return False
    total = node.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return False
    matrix = total.all_input_nodes[0]
    return (
        matrix.meta["val"].dim() == 2
        and list(total.args[1:]) == [[0], True]
        and graph.is_backward(matrix)
    )


def _rewrite(
    graph: JointGraph,
    total: fx.Node,
    terms: Sequence[fx.Node],
    rest: Sequence[fx.Node],
    joined: dict[tuple[fx.Node, ...], fx.Node],
) -> None:
    def cat(parts: tuple[fx.Node, ...]) -> fx.Node:
        if parts not in joined:  # weight and bias share the cotangents
            joined[parts] = graph.insert_after(max(parts), aten.cat.default, list(parts))
        return joined[parts]

    cotangents = cat(tuple(t.all_input_nodes[0].all_input_nodes[0] for t in terms))
    if terms[0].target is aten.mm.default:
        inputs = cat(tuple(t.all_input_nodes[1] for t in terms))
        left = graph.insert_before(total, aten.t.default, cotangents)
        found = graph.insert_before(total, aten.mm.default, left, inputs)
    else:
        found = graph.insert_before(total, aten.sum.dim_IntList, cotangents, [0], True)
        found = graph.insert_before(total, aten.view.default, found, terms[0].args[1])
    for other in rest:
        found = graph.insert_before(total, aten.add.Tensor, found, other)
    graph.replace(total, found)
