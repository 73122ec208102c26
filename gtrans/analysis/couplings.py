"""Finds additive couplings: values of the forward that can be computed from later ones.

    y1 = x1 + f(x2)               x2 = y2 - g(y1)
    y2 = x2 + g(y1)               x1 = y1 - f(x2)

More generally a state of n streams is updated one stream at a time, `y = x + t`, where the branch
t reads the other streams but not x. Then x = y - t, and t can be computed from what the other
streams hold at that moment. Two streams in turn make a reversible residual network, n of them the
triangular couplings of multi-split networks; both are found by the same search.

The search walks the forward backwards and keeps the set of *available* values: the ends of the
streams, which stay in memory, and every stream value that is a function of available ones. An
update is a coupling if walking up from t and stopping at available values does not meet x. Streams
end at an update whose result is not available: there the other streams of the coupling, which must
separate x from t, are kept as well.

Source: RevNet (arXiv:1707.04585) eq. 6-8; the n-split form is that of memory-efficient
differentiable transformer search (arXiv:2105.14669).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import fx

from gtrans.analysis.again import formula, is_fixed, overwritten_inputs
from gtrans.analysis.grids import grids
from gtrans.analysis.inverses import is_never_zero
from gtrans.analysis.kinks import has_kink, keeps_zeros
from gtrans.analysis.linear import Elimination, combination, eliminations, linear_form
from gtrans.analysis.links import from_parts, input_from_output, origins
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Offer
from gtrans.ir.sizes import same_shape
from gtrans.ir.source import location
from gtrans.runtime.streams import unhalve

aten = torch.ops.aten

AFFINE = (
    "an affine coupling y = x e + t: dividing by e makes rounding errors larger; "
    "affine=true admits that"
)
PLAIN = "a plain residual y = x + f(x) is not a coupling: f reads the value it is added to"
ALONE = "no coupling: the added value depends on no other stream"
_LOW = frozenset({torch.float16, torch.bfloat16})

Admit = Callable[[fx.Node], bool]


@dataclass(frozen=True)
class Coupling:
    """One update of a stream.

    Attributes:
        output: y.
        stream: x, which y and the branch give back.
        branch: t, computed from other streams.
        chain: number of the run of couplings it belongs to.
    """

    output: fx.Node
    stream: fx.Node
    branch: fx.Node
    chain: int


@dataclass
class Couplings:
    """What was found.

    Attributes:
        sites: how many sums of two activations there are.
        found: the couplings, last one first.
        inverse: values that are functions of later ones, with that function.
        cone: values inside the branches, to be computed again from their own inputs.
        kept: values that stay in memory: the ends of streams, and what branches read besides.
        rounded: rebuilt values that may differ from the forward's in their last bits.
        masked: ReLUs that read such a value directly; their zeros must come from the forward.
        chain_of: the chain that a rebuilt value belongs to.
        refused: the other sites, and why they are no couplings.
    """

    sites: int = 0
    found: list[Coupling] = field(default_factory=list)
    inverse: dict[fx.Node, Offer] = field(default_factory=dict)
    cone: set[fx.Node] = field(default_factory=set)
    kept: set[fx.Node] = field(default_factory=set)
    rounded: set[fx.Node] = field(default_factory=set)
    masked: set[fx.Node] = field(default_factory=set)
    chain_of: dict[fx.Node, int] = field(default_factory=dict)
    refused: dict[fx.Node, str] = field(default_factory=dict)


def find_couplings(
    joint: JointGraph,
    admit: Admit = lambda site: True,
    *,
    low_precision: bool = False,
    affine: bool = False,
) -> Couplings:
    """Finds the couplings of a joint graph.

    Args:
        joint: it is not changed.
        admit: asked about each coupling; one that is not admitted is left out.
        low_precision: admit streams in float16 and bfloat16, whose rounding errors add up.
        affine: admit couplings that also multiply the stream by a factor that is never zero.
    """
    return _Search(joint, admit, low_precision, affine).run()


@dataclass(frozen=True)
class _Update:
    """A sum seen as the update `output = stream + branch`, and how to undo it.

    `undo` takes the output, the branch, and `also` where that is needed.
    """

    output: fx.Node
    stream: fx.Node
    branch: fx.Node
    undo: Callable[..., torch.Tensor]
    also: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Refusal:
    """Why a sum is no coupling; of several reasons the one of lowest rank is reported."""

    rank: int
    reason: str


@dataclass(frozen=True)
class _Plan:
    """An update that is a coupling, and what accepting it means."""

    update: _Update
    ends: frozenset[fx.Node]
    cone: tuple[fx.Node, ...]
    kept: frozenset[fx.Node]
    rounded: frozenset[fx.Node]
    masked: frozenset[fx.Node]


class _Search:
    def __init__(self, joint: JointGraph, admit: Admit, low_precision: bool, affine: bool) -> None:
        self.joint = joint
        self.admit = admit
        self.low_precision = low_precision
        self.affine = affine
        self.forward = computed_forward(joint)
        self.in_forward = frozenset(self.forward)
        self.position = {n: i for i, n in enumerate(joint.graph.nodes)}
        self.activations = _activations(joint, self.forward)
        self.overwritten = overwritten_inputs(self.forward)
        self.on_grid = grids(self.forward)
        self.available: set[fx.Node] = set()
        self.result = Couplings()

    def run(self) -> Couplings:
        for node in reversed(self.forward):
            if node not in self.available and (offer := from_parts(node, self.available)):
                self._free(node, offer, self.result.chain_of[offer.nodes[0]])
            if node in self.available:
                self._follow_links(node)
            if self._is_sum(node):
                self._visit_pair(node)
                self._visit(node)
            elif node in self.available and self._is_product(node):
                self._visit(node)
        return self.result

    # ------------------------------------------------------------------ streams

    def _follow_links(self, node: fx.Node) -> None:
        chain = self.result.chain_of[node]
        for value, offer in [*input_from_output(node), *self._shifts(node)]:
            self._free(value, offer, chain)
            if value in self.available:  # remainders and signs
                rest = [n for n in offer.nodes if n in self.activations]
                self.result.kept.update(n for n in rest if n not in self.available)

    def _shifts(self, node: fx.Node) -> Iterator[tuple[fx.Node, Offer]]:
        """`y = x + p` with a number or something made of parameters alone gives back x."""
        for update in _updates(node) if node.target is not aten.mul.Tensor else ():
            p = update.branch
            if not isinstance(p, fx.Node) or p not in self.activations:
                val = update.stream.meta["val"]
                if same_shape(val, node.meta["val"]) and val.dtype == node.meta["val"].dtype:
                    yield update.stream, Offer(update.undo, (node, p))

    def _free(self, value: fx.Node, offer: Offer, chain: int) -> None:
        """Makes a value available; what is in memory anyway or rebuilt already stays as it is."""
        result = self.result
        if value in self.available or value not in self.activations:
            return
        self.available.add(value)
        result.chain_of.setdefault(value, chain)
        if value.op == "placeholder":
            result.kept.add(value)
        elif value not in result.kept and value not in result.cone:
            result.inverse[value] = offer
            by_halves = offer.function is unhalve
            if not (by_halves or all(self._is_exact(n) for n in (value, *offer.nodes))):
                result.rounded.add(value)

    def _is_exact(self, value: fx.Node) -> bool:
        """Whether sums of this value lose nothing: it lies on a grid, or counts something."""
        return value in self.on_grid or not value.meta["val"].is_floating_point()

    # ------------------------------------------------------------------ sums

    def _is_sum(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        if node.target is aten.mul.Tensor:
            return False
        if not isinstance(val, torch.Tensor) or not val.is_floating_point():
            return False
        return any(
            isinstance(u.branch, fx.Node)
            and all(n in self.activations for n in (u.stream, u.branch))
            and all(same_shape(n.meta["val"], val) for n in (u.stream, u.branch))
            for u in _updates(node)
        )

    def _is_product(self, node: fx.Node) -> bool:
        """Whether a stream was multiplied by something of its own size."""
        if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
            return False
        val = node.meta["val"]
        sources = node.all_input_nodes
        return val.is_floating_point() and all(
            n in self.activations and same_shape(n.meta["val"], val) for n in sources
        )

    def _visit_pair(self, y: fx.Node) -> None:
        """Looks for another stream z such that y and z together give back a third value.

        That is so in a leapfrog step, where z is read as it is, and in a reversible Heun step,
        where z has to be combined with y first.
        """
        form = linear_form(y)
        if len(form) < 3:
            return
        going_on = y in self.available
        others = self.available if going_on else self._walk(y, ())
        sums = [z for z in others if self.position[z] < self.position[y] and self._is_sum(z)]
        for z in sorted(sums, key=lambda n: self.position[n], reverse=True):
            alone = Elimination(Fraction(1), Fraction(0), form)
            for found in (alone, *eliminations(form, linear_form(z))):
                plan = self._pair(y, z, found)
                if plan is not None and plan.update.stream not in self.available:
                    self.result.sites += 1
                    if self.admit(y):
                        self._accept(plan)
                    return

    def _pair(self, y: fx.Node, z: fx.Node, found: Elimination) -> _Plan | None:
        """The plan to compute the only unknown of a combination from y and z."""
        rest = dict(found.rest)
        weight_of_z = found.second - rest.pop(z, Fraction(0))
        known = [n for n in rest if self._follows_from(n, {y, z})]
        unknown = [n for n in rest if n not in known]
        if len(unknown) != 1 or len(known) != 1:
            return None
        (x,), (branch,) = unknown, known
        walk = self._walk(branch, {y, z})
        if x in walk or not self._is_stream(x, y) or self._precision(x, y) is not None:
            return None
        weights = [float(w / rest[x]) for w in (found.first, -rest[branch], weight_of_z)]
        undo = partial(combination, weights=tuple(weights))
        plan = self._plan(_Update(y, x, branch, undo, (z,)), walk, frozenset({z, y}))
        return plan if isinstance(plan, _Plan) else None

    def _follows_from(self, node: fx.Node, ends: Collection[fx.Node]) -> bool:
        """Whether a value is at hand, or is computed from some that are."""
        at_hand = self.available | self.result.cone
        return node in at_hand or any(n in ends or n in at_hand for n in self._walk(node, ends))

    def _is_stream(self, x: fx.Node, y: fx.Node) -> bool:
        return x in self.activations and same_shape(x.meta["val"], y.meta["val"])

    def _visit(self, node: fx.Node) -> None:
        result = self.result
        result.sites += 1
        outcomes = [self._examine(update) for update in _updates(node)]
        plans = [o for o in outcomes if isinstance(o, _Plan)]
        if not plans:
            refusals = [o for o in outcomes if isinstance(o, _Refusal)]
            result.refused[node] = min(refusals, key=lambda r: r.rank).reason
            return
        # Of two streams the branch is the one with the shorter history; but where one is at hand
        # already and the other goes nowhere else, that other one is a branch whatever its history.
        plan = min(plans, key=lambda p: (not self._ends_here(p.update), len(p.cone)))
        if self.admit(node):
            self._accept(plan)

    def _ends_here(self, update: _Update) -> bool:
        """Whether a branch is added to a value that is at hand, and is no stream itself.

        So it is in the first block of a network whose streams start as the same value: the branch
        is then rebuilt like all others instead of being had for free, with all its inside kept.
        """
        branch = update.branch
        forward = [u for u in branch.users if u in self.in_forward or u.op == "output"]
        last = origins(branch)[-1]
        stream = self._is_sum(last) or self._is_product(last) or last.op == "placeholder"
        return update.stream in self.available and forward == [update.output] and not stream

    def _examine(self, update: _Update) -> _Plan | _Refusal:
        x, y, branch = update.stream, update.output, update.branch
        going_on = y in self.available
        ends: frozenset[fx.Node] = frozenset()
        walk = self._walk(branch, ())
        read = [n for n in self._origins(x) if n in walk]
        if x not in self.available and read:
            ends = self._ends(update, read[0], walk)
            if not ends:
                return _Refusal(3, PLAIN)
            walk = self._walk(branch, ends)
            ends &= walk
            if read[0] in walk:
                return _Refusal(2, self._read_again(read[0], walk))
            if going_on:
                end = max(ends, key=lambda n: self.position[n])
                return _Refusal(2, f"no coupling: another stream ends at {location(end)}")
        if not going_on and not ends:
            return _Refusal(3, PLAIN) if x in walk else self._alone(update, walk)
        if (refusal := self._precision(x, y)) is not None:
            return refusal
        if y.target is aten.mul.Tensor:
            if not is_never_zero(branch):
                reason = f"no coupling: the factor of the stream may be zero ({location(branch)})"
                return _Refusal(2, reason)
            if not self.affine:
                return _Refusal(1, AFFINE)
        return self._plan(update, walk, ends)

    def _origins(self, x: fx.Node) -> list[fx.Node]:
        """A value, what it is a link of, and what was scaled to make it."""
        found = origins(x)
        if self._is_product(found[-1]):
            factors = _updates(found[-1])
            for update in sorted(factors, key=lambda u: is_never_zero(u.branch), reverse=True):
                found += origins(update.stream)
        return found

    def _walk(self, start: fx.Node, ends: Collection[fx.Node]) -> frozenset[fx.Node]:
        """The activations that a value is computed from, up to those that are at hand."""
        result, seen, pending = self.result, {start}, [start]
        while pending:
            node = pending.pop()
            at_hand = node in self.available or node in result.kept or node in result.cone
            if at_hand or node in ends or is_fixed(node, self.overwritten):
                continue
            for source in inputs_again(node):
                if source in self.activations and source not in seen:
                    seen.add(source)
                    pending.append(source)
        return frozenset(seen)

    def _ends(self, update: _Update, x: fx.Node, walk: frozenset[fx.Node]) -> frozenset[fx.Node]:
        """Streams on the way from x to the branch: values x is added to, that live on.

        If none does, such as the velocity of a momentum network after its last block, the last sum
        that something besides x has gone into separates the two as well.
        """
        after, streams = {x}, {x}
        last: fx.Node | None = None
        for node in sorted(walk, key=lambda n: self.position[n]):
            if node is x or not any(n in after for n in inputs_again(node)):
                continue
            after.add(node)
            if self._is_sum(node):
                other = any(self._is_fresh(n, after) for n in node.all_input_nodes)
                last = node if other else last
                if other or any(n in streams for n in node.all_input_nodes):
                    streams.add(node)
        inside = walk | {update.output}
        living = frozenset(n for n in streams if n is not x and self._lives_on(n, inside))
        return living or frozenset([last] if last is not None else [])

    def _is_fresh(self, node: fx.Node, after: Collection[fx.Node]) -> bool:
        """Whether something that x had no part in comes in here, scaled or as it is."""
        factors = node.all_input_nodes if self._is_product(node) else [node]
        return any(n not in after for n in factors)

    def _lives_on(self, node: fx.Node, walk: Collection[fx.Node]) -> bool:
        """Whether the value goes somewhere besides the branch."""
        return any((u.op == "output" or u in self.in_forward) and u not in walk for u in node.users)

    def _plan(
        self, update: _Update, walk: frozenset[fx.Node], ends: frozenset[fx.Node]
    ) -> _Plan | _Refusal:
        """Which nodes of the walk run again, and what they need besides."""
        result = self.result
        cone: dict[fx.Node, None] = {}
        kept: set[fx.Node] = set()
        rounded: set[fx.Node] = set()
        masked: set[fx.Node] = set()
        at_hand = self.available | result.cone | ends
        for node in sorted(walk, key=lambda n: self.position[n]):
            if node in at_hand or node in result.kept or is_fixed(node, self.overwritten):
                continue
            sources = [n for n in inputs_again(node) if n in self.activations]
            if not any(n in at_hand or n in cone for n in sources):
                continue
            cone[node] = None
            kept.update(n for n in sources if n not in at_hand and n not in cone)
            if any(n in result.rounded or n in rounded for n in sources):
                if node.target is aten.relu.default:
                    masked.add(node)
                elif has_kink(node):
                    return _Refusal(1, _kinked(node))
                elif keeps_zeros(node):
                    rounded.add(node)
        if not cone and update.branch not in at_hand:
            return self._alone(update, walk)
        lists = (frozenset(kept), frozenset(rounded), frozenset(masked))
        return _Plan(update, ends, tuple(cone), *lists)

    def _accept(self, plan: _Plan) -> None:
        result, update = self.result, plan.update
        y = update.output
        chain = result.chain_of.get(y, len({c.chain for c in result.found}))
        for end in (y, *plan.ends):
            if end not in self.available:
                self.available.add(end)
                result.kept.add(end)
        for node in (y, *plan.ends, *plan.cone):
            result.chain_of.setdefault(node, chain)
        result.cone.update(plan.cone)
        result.kept.update(plan.kept)
        result.rounded.update(plan.rounded)
        result.masked.update(plan.masked)
        result.found.append(Coupling(y, update.stream, update.branch, chain))
        self._free(update.stream, Offer(update.undo, (y, update.branch, *update.also)), chain)

    # ------------------------------------------------------------------ reasons

    def _precision(self, x: fx.Node, y: fx.Node) -> _Refusal | None:
        kept, summed = x.meta["val"].dtype, y.meta["val"].dtype
        if kept != summed:
            return _Refusal(
                1,
                f"precision of the stream ({_name(kept)}) is below its branches ({_name(summed)})",
            )
        if kept in _LOW and not self.low_precision:
            return _Refusal(
                1,
                f"precision of the stream ({_name(kept)}) is below float32, where errors add up; "
                "low_precision=true admits that",
            )
        return None

    def _read_again(self, x: fx.Node, walk: frozenset[fx.Node]) -> str:
        reader = next(u for u in x.users if u in walk)
        return f"no coupling: the stream is read again by {_operator(reader)} ({location(reader)})"

    def _alone(self, update: _Update, walk: frozenset[fx.Node]) -> _Refusal:
        """Two branches of one value: a projection shortcut, where a stream changes its width."""
        fixed = next((n for n in walk if is_fixed(n, self.overwritten)), None)
        if fixed is not None:
            reason = f"the branch hangs on {_operator(fixed)}, which cannot run again"
            return _Refusal(2, f"no coupling: {reason} ({location(fixed)})")
        node: fx.Node | None = update.stream
        while node is not None and not ops.is_contraction(node):
            sources = [n for n in ops.tensor_inputs(node) if n in self.activations]
            node = sources[0] if len(sources) == 1 else None
        if node is not None:
            source = next((n for n in node.all_input_nodes if n in self.activations), None)
            narrow = source is not None and not same_shape(source.meta["val"], node.meta["val"])
            if narrow and source in walk:
                reason = f"no coupling: the stream changes its width or size at {location(node)}"
                return _Refusal(4, reason)
        return _Refusal(5, ALONE)


def inputs_again(node: fx.Node) -> list[fx.Node]:
    """The values a node is computed from when it runs again in the backward."""
    offer = formula(node)
    return ops.tensor_inputs(node) if offer is None else offer.nodes


def computed_forward(joint: JointGraph) -> list[fx.Node]:
    """The forward values that an output or effect of the forward needs, in order."""
    wanted = {n for n in joint.graph.nodes if joint.is_forward(n) and ops.is_effect(n)}
    wanted |= {n for n in joint.forward_outputs if isinstance(n, fx.Node)}
    for node in reversed(joint.graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [n for n in joint.graph.nodes if n in wanted]


def _activations(joint: JointGraph, forward: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """The values that depend on the data, not on parameters alone."""
    found: set[fx.Node] = set()
    for node in forward:
        if node.op == "placeholder":
            if joint.input_of(node).kind == "input":
                found.add(node)
        elif not ops.is_symbol(node) and any(n in found for n in ops.tensor_inputs(node)):
            found.add(node)
    return frozenset(found)


def _updates(node: fx.Node) -> list[_Update]:
    """The ways to read a sum, difference or product as the update of a stream."""
    if node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
        one, other = node.all_input_nodes
        return [_Update(node, one, other, torch.div), _Update(node, other, one, torch.div)]
    if node.target not in (aten.add.Tensor, aten.sub.Tensor):
        return []
    first, second = node.args[:2]
    factor: Any = ops.argument(node, "alpha")
    undo: Callable[..., torch.Tensor]
    minus = node.target is aten.sub.Tensor
    found = []
    if isinstance(first, fx.Node):
        undo = torch.add if minus else torch.sub
        undo = undo if factor == 1 else partial(undo, alpha=factor)
        found.append(_Update(node, first, second, undo))  # type: ignore[arg-type]
    if isinstance(second, fx.Node) and factor == 1:
        undo = _subtrahend if minus else torch.sub
        found.append(_Update(node, second, first, undo))  # type: ignore[arg-type]
    return found


def _subtrahend(difference: torch.Tensor, minuend: torch.Tensor) -> torch.Tensor:
    return minuend - difference


def _kinked(node: fx.Node) -> str:
    return (
        f"{_operator(node)} compares the stream itself with a number ({location(node)}), and a "
        "rebuilt stream may differ in its last bits"
    )


def _operator(node: fx.Node) -> str:
    op = ops.overload(node)
    return node.name if op is None else op._schema.name.rpartition("::")[2]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
