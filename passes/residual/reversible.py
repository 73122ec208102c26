"""Rebuild the streams of reversible networks from their outputs instead of keeping them.

    y1 = x1 + f(x2)                           y1 = x1 + f(x2)
    y2 = x2 + g(y1)                           y2 = x2 + g(y1)        # only the last y1, y2 are kept
    dw = b(dy, inside f, g)        -->        x2' = y2 - g(y1)       # f, g leave what b reads
                                              x1' = y1 - f(x2')
                                              dw  = b(dy, inside f', g')

Found in any model by `gtrans.analysis.couplings`: two streams or n of them, sums and differences,
with split, cat, view, permute in between. Copies stand right before their first backward reader.

Saves: everything inside the branches and all stream values but the last: what is kept does not
    grow with the number of couplings. Checked in `tests/passes/test_reversible.py`.
Costs: each branch runs once more, so a step takes about 4/3 of the time.
Contract: exact up to rounding: x' is x up to a few units in the last place of the stream for each
    coupling, and errors add up over depth; close with `low-precision`.
Needs: streams in float32 or wider. Dropout masks and batch statistics are those of the forward,
    running statistics are updated once. A plain residual y = x + f(x) cannot be inverted.
Source: RevNet (arXiv:1707.04585), algorithm 1; multi-split as in arXiv:2105.14669; Rev-ViT,
    arXiv:2302.04869. Affine couplings and their drift are not covered.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from gtrans.analysis.again import formula, is_fixed, overwritten_inputs
from gtrans.analysis.couplings import Couplings, computed_forward, find_couplings, inputs_again
from gtrans.analysis.kinks import reads_kink
from gtrans.contract import Close, Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats
from gtrans.errors import GraphError
from gtrans.ir import ops
from gtrans.ir.joint import TAG, JointGraph, Offer, Placement, tag
from gtrans.ir.sizes import human, tensor_bytes

aten = torch.ops.aten

UNPROFITABLE = "keeping the ends of the streams takes as much memory as rebuilding them frees"

# An estimate: the tests measure about 1e-2 on 12 couplings; it grows with depth and branch gain.
_LOW_PRECISION_RTOL = 0.1

Recipes = dict[fx.Node, Offer | None]
"""How to get values in the backward: by a function of others, or (None) by running them again."""


@dataclass(frozen=True)
class Reversible(Pass[JointGraph]):
    """Rebuild stream values of additive couplings in the backward.

    Args:
        low_precision: also rebuild streams in float16 and bfloat16. Their rounding errors add up
            over depth, so the gradient is only close.
    """

    name: ClassVar[str] = "reversible"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    low_precision: bool = False

    @property
    def contract(self) -> Contract:
        """The same gradient up to rounding of the streams."""
        return Close(_LOW_PRECISION_RTOL) if self.low_precision else Exact(bitwise=False)

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Finds the couplings and lets the backward read rebuilt values."""
        stats = Stats()

        def admit(site: fx.Node) -> bool:
            if not permitted(site.name):
                stats.refuse(site, HELD_BACK)
                return False
            return True

        couplings = find_couplings(graph, admit, low_precision=self.low_precision)
        stats.matched = couplings.sites
        stats.refuse_all(couplings.refused)
        recipes = _recipes(graph, couplings)
        chains = {c.chain for c in couplings.found}
        gains = {chain: _gain(graph, couplings, recipes, chain) for chain in chains}
        for chain, gain in gains.items():
            members = [c.output for c in couplings.found if c.chain == chain]
            if gain <= 0:
                recipes = {v: r for v, r in recipes.items() if couplings.chain_of[v] != chain}
                stats.refuse_all(dict.fromkeys(members, UNPROFITABLE))
            else:
                stats.rewritten += len(members)
                stats.notes.append(f"{len(members)} couplings in a row, which free {human(gain)}")
        _Writer(graph, couplings, recipes).run()
        return stats


def _recipes(graph: JointGraph, couplings: Couplings) -> Recipes:
    """How to get everything that the streams give back, and what follows from it cheaply."""
    recipes: Recipes = {node: formula(node) for node in couplings.cone}
    recipes.update(couplings.inverse)
    overwritten = overwritten_inputs(computed_forward(graph))
    for node in graph.nodes:
        fixed = node in recipes or node in couplings.kept or not graph.is_forward(node)
        if fixed or not _is_cheap(node) or is_fixed(node, overwritten):
            continue
        sources = [n for n in inputs_again(node) if n.op != "placeholder"]
        exact = not (reads_kink(node) and any(n in couplings.rounded for n in sources))
        if exact and sources and all(n in recipes or n in couplings.kept for n in sources):
            rebuilt = [n for n in sources if n in recipes]
            if rebuilt:
                recipes[node] = formula(node)
                couplings.chain_of[node] = couplings.chain_of[rebuilt[0]]
    return recipes


def _is_cheap(node: fx.Node) -> bool:
    if node.op != "call_function" or ops.is_symbol(node):
        return False
    cheap = ops.is_view(node) or ops.is_getitem(node) or ops.is_pointwise(node)
    return cheap or node.target in ops.ROWWISE or node.target in ops.COPIES


def _gain(graph: JointGraph, couplings: Couplings, recipes: Recipes, chain: int) -> int:
    """Bytes that the backward no longer keeps if a chain is rebuilt, less those it keeps instead.

    This takes what the backward reads directly for kept; the plan may find cheaper ways for both.
    """
    of_chain = {v for v in recipes if couplings.chain_of[v] == chain}
    stays: set[fx.Node] = set()
    goes: set[fx.Node] = set()
    for reader, source in _backward_reads(graph):
        redirected = source in of_chain and not _must_be_exact(reader, source, couplings)
        (goes if redirected else stays).add(source)
    needed: set[fx.Node] = set()
    pending = list(goes)
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in of_chain:
            offer = recipes[node]
            pending += ops.tensor_inputs(node) if offer is None else offer.nodes
        else:
            needed.add(node)
    before, after = _storages(graph, goes | stays), _storages(graph, needed | stays)
    return sum(before.values()) - sum(after.values())


def _backward_reads(graph: JointGraph) -> Iterable[tuple[fx.Node, fx.Node]]:
    for reader in graph.nodes:
        if graph.is_backward(reader):
            for source in ops.tensor_inputs(reader):
                if graph.is_forward(source):
                    yield reader, source


def _must_be_exact(reader: fx.Node, source: fx.Node, couplings: Couplings) -> bool:
    """Whether the reader compares a rebuilt value with a number, which the last bits may decide."""
    return reads_kink(reader) and source in couplings.rounded


def _storages(graph: JointGraph, values: Collection[fx.Node]) -> dict[fx.Node, int]:
    """The storages behind some values, with their bytes; parameters and buffers are free."""
    found: dict[fx.Node, int] = {}
    for value in values:
        node = value
        while ops.is_view(node) or (ops.is_getitem(node) and ops.is_view(node.all_input_nodes[0])):
            node = node.all_input_nodes[0]
        if node.op != "placeholder" or graph.input_of(node).kind == "input":
            found[node] = tensor_bytes(node.meta.get("val"))
    return found


class _Writer:
    """Puts the copies into the backward, each right before its first reader."""

    def __init__(self, graph: JointGraph, couplings: Couplings, recipes: Recipes) -> None:
        self.graph = graph
        self.couplings = couplings
        self.recipes = recipes
        self.made: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for reader, source in list(_backward_reads(self.graph)):
            if source in self.recipes and not _must_be_exact(reader, source, self.couplings):
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
