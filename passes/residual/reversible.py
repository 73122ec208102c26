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
    arXiv:2302.04869; affine couplings of arXiv:1605.08803; reversible Heun of arXiv:2105.13493.
"""

from collections.abc import Collection
from dataclasses import dataclass
from operator import getitem
from typing import ClassVar

from torch import fx

from gtrans.analysis.again import formula, is_fixed, overwritten_inputs
from gtrans.analysis.couplings import Couplings, computed_forward, find_couplings, inputs_again
from gtrans.analysis.kinks import reads_kink
from gtrans.analysis.links import with_remainders
from gtrans.contract import Close, Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import human, tensor_bytes
from gtrans.rewrite.rebuild_streams import Recipes, backward_reads, must_be_exact, rebuild
from gtrans.runtime.again import normalise

UNPROFITABLE = "keeping the ends of the streams takes as much memory as rebuilding them frees"

# An estimate: the tests measure about 1e-2 on 12 couplings; it grows with depth and branch gain.
_LOW_PRECISION_RTOL = 0.1
# Factors between 0.1 and 10 over some ten couplings in float32 stay below this.
_AFFINE_RTOL = 1e-2


@dataclass(frozen=True)
class Reversible(Pass[JointGraph]):
    """Rebuild stream values of additive couplings in the backward.

    Args:
        low_precision: also rebuild streams in float16 and bfloat16. Their rounding errors add up
            over depth, so the gradient is only close.
        affine: also undo y = x e + t with a factor e that is never zero, such as an exponential.
            Dividing by small factors makes rounding errors larger, so the gradient is only close.
    """

    name: ClassVar[str] = "reversible"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    low_precision: bool = False
    affine: bool = False

    @property
    def contract(self) -> Contract:
        """The same gradient up to rounding of the streams."""
        if self.low_precision:
            return Close(_LOW_PRECISION_RTOL)
        return Close(_AFFINE_RTOL) if self.affine else Exact(bitwise=False)

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Finds the couplings and lets the backward read rebuilt values."""
        stats = Stats()

        def admit(site: fx.Node) -> bool:
            if not permitted(site.name):
                stats.refuse(site, HELD_BACK)
                return False
            return True

        for whole, number in with_remainders(graph.nodes):
            if number not in ops.parts(whole):
                graph.insert_after(whole, getitem, whole, number)
        couplings = find_couplings(
            graph, admit, low_precision=self.low_precision, affine=self.affine
        )
        stats.matched = couplings.sites
        stats.refuse_all(couplings.refused)
        if not couplings.rounded:
            again = [formula(n) for n in couplings.cone]
            stats.contract = Exact(
                bitwise=all(o is None or o.function is not normalise for o in again)
            )
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
        rebuild(graph, couplings, recipes)
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
    for reader, source in backward_reads(graph):
        redirected = source in of_chain and not must_be_exact(reader, source, couplings)
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
