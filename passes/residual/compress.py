"""Keep forward values in 2, 4 or 8 bits where the gradient stays unbiased.

    y  = relu(a), gelu(a), attention, ...     y
                                              low, step, codes = encode(y)     # saved
    dw = mm(dz, y)                     -->    dw = mm(dz, decode(low, step, codes))

Values that the backward is affine in (operands of products and convolutions, factors, the values
and outputs of attention, inputs of norms in two copies) are rounded at random, group by group, with
the expectation they have. Outputs of ReLU keep their zeros, and so their mask, exactly. Pointwise
activations keep their derivative, to which their gradient is linear, in codes as `few-bit` does.

Shapes: a value: [*s], floating; codes: uint8, numel * bits / 8 bytes; low, step: one of each a
    group, 6 bytes; averages of spatial maps: 2 bytes a block.
Saves: numel * (itemsize - bits / 8 - 6 / group) per value; the plan decides which values pay,
    together with the derivatives, and all is rolled back unless its bytes fall.
Costs: one pass for the range of each group and one to code in the forward, one to decode.
Contract: stochastic is unbiased: every gradient is affine in each coded copy, copies have
    independent noise, and no gradient made of a value flows into another reader of it. Nearest is
    close at 8 bits and only aligned below. A NaN or infinity spoils its group.
Needs: nothing of the model. Below 8 bits, and with random rounding, values that any reader is not
    affine in stay as they are, with the reason: queries and keys, softmax outputs, inputs of
    activations that are read as they are.
Source: see `gtrans.runtime.quantise`. Norms in two copies, zeros with a code of their own, and one
    choice for values and derivatives together: gtrans. Not done: running range estimates (Mesa),
    bits per sample (ActNN).
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from gtrans.analysis.derivative_tables import Table, nearest_table, samples_of, stochastic_table
from gtrans.analysis.linear_uses import Role, flows_into_another, norm_use, uses_of
from gtrans.analysis.pointwise import Activation, find_activations
from gtrans.analysis.rounding import relative_error
from gtrans.contract import Aligned, Close, Contract, Unbiased
from gtrans.core import HELD_BACK, Knob, Permission, SitePass, Stats, require
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.ir.printer import target_name
from gtrans.ir.sizes import human, numel
from gtrans.plan.cut import storage_of
from gtrans.plan.worth import Candidate, keep_what_pays, scales
from gtrans.rewrite.coded_values import CodedValue, coded_value
from gtrans.rewrite.derivative_codes import DerivativeCodes, codes_at
from gtrans.runtime.quantise import Grid, group_size, memory_order

_ROUNDED = Close(rtol=0.1)


@dataclass(frozen=True)
class Compress(SitePass[JointGraph]):
    """Keep values for the backward as small whole numbers.

    Args:
        bits: per element of a value: 8, 4 or 2.
        group: elements that share their range, at most.
        rounding: "stochastic" is unbiased; "nearest" has half the variance, and a bias.
        slope_bits: per element of an activation's derivative, 1 to 4.
        block: side of the blocks of spatial maps whose averages are kept apart; 0 for none.
        min_numel: leave values with fewer elements alone.
    """

    name: ClassVar[str] = "compress"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    bits: int = 4
    group: int = 256
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    slope_bits: int = 2
    block: int = 8
    min_numel: int = 4096

    def __post_init__(self) -> None:
        require(self.bits in (2, 4, 8), f"compress: bits must be 2, 4 or 8, got {self.bits}")
        require(self.group >= 8, f"compress: group must be at least 8, got {self.group}")
        require(
            1 <= self.slope_bits <= 4,
            f"compress: slope_bits must be 1, 2, 3 or 4, got {self.slope_bits}",
        )
        require(self.block >= 0, f"compress: block must not be negative, got {self.block}")
        require(
            self.min_numel >= 1, f"compress: min_numel must be at least 1, got {self.min_numel}"
        )

    @property
    def contract(self) -> Contract:
        """Unbiased over the rounding; nearest is close at 8 bits."""
        if self.rounding == "stochastic":
            return Unbiased(noise=frozenset({self.name}))
        return _ROUNDED if self.bits == 8 else Aligned()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The values that some backward node is affine in, and the gradients of activations."""
        others = self._derivatives(graph)
        # A norm's output is made of the codes of its input.
        norms = [norm_use(n) for n in graph.nodes if graph.is_backward(n)]
        images = {n.y for n in norms if n is not None}
        values = [
            n
            for n in graph.nodes
            if n not in images and _is_value(graph, n) and _has_linear_use(graph, n, others)
        ]
        return [*(a.dx for a in find_activations(graph)), *values]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses what cannot be coded; whether it pays is decided by planning."""
        if graph.is_backward(site):
            return self._refuse_slope(codes_at(graph, site))
        return self._refuse_value(graph, site, self._derivatives(graph))

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Codes a value, or the derivative of an activation."""
        self._rewrite(self._derivatives(graph), graph, site)

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Rewrites the sites that save bytes once the whole graph is planned."""
        stats = Stats()
        candidates: list[Candidate] = []
        others = self._derivatives(graph)
        for site in list(self.sites(graph)):
            stats.matched += 1
            if graph.is_backward(site):
                reason = self._refuse_slope(codes_at(graph, site))
            else:
                reason = self._refuse_value(graph, site, others)
            if reason is None:
                candidates.append(self._candidate(graph, site, others))
            else:
                stats.skipped[reason] += 1
        rewrite = partial(self._rewrite, others)
        verdict = keep_what_pays(graph, candidates, rewrite)
        stats.skipped += Counter(verdict.refused.values())
        notes: Counter[str] = Counter()
        for site in verdict.chosen:
            if not permitted(site.name):
                stats.skipped[HELD_BACK] += 1
                continue
            notes[self._note(graph, site)] += 1
            rewrite(graph, site)
            stats.rewritten += 1
        stats.notes += [f"{count} x {note}" for note, count in notes.items()]
        if verdict.chosen:
            change = f"{human(verdict.bytes_before)} -> {human(verdict.bytes_after)}"
            stats.notes.append(f"saved for backward, once planned: {change}")
        return stats

    def _derivatives(self, graph: JointGraph) -> frozenset[str]:
        """The backward nodes that compute a derivative which has codes of its own."""
        found = [a for a in find_activations(graph) if self._refuse_slope(a) is None]
        return frozenset(n.name for a in found for n in a.backward)

    def _rewrite(self, others: Collection[str], graph: JointGraph, site: fx.Node) -> None:
        if graph.is_backward(site):
            activation = codes_at(graph, site)
            DerivativeCodes(self.slope_bits).rewrite(graph, activation, self._table(activation))
        else:
            self._coded(graph, site, others).rewrite(graph)

    def _refuse_value(
        self, graph: JointGraph, value: fx.Node, others: Collection[str]
    ) -> str | None:
        val = value.meta["val"]
        if numel(val) < self.min_numel:
            return "fewer elements than min_numel"
        if sum(not isinstance(n, int) for n in val.shape) > 1:
            return "several of its sizes are dynamic"
        if self._grid(graph, value) is None:
            return "its inner sizes do not divide into groups of a multiple of 8"
        reader = flows_into_another(self._coded(graph, value, others).noisy_readers)
        if reader is not None:
            return (
                "its noise would multiply with itself: a gradient made of it flows into "
                f"{target_name(reader)}, which reads it as well"
            )
        return None

    def _candidate(self, graph: JointGraph, site: fx.Node, others: Collection[str]) -> Candidate:
        if graph.is_backward(site):
            found = codes_at(graph, site)
            size = DerivativeCodes(self.slope_bits).bytes(found)
            return Candidate(site, found.x, size, scales(site, found.dy))
        coded = self._coded(graph, site, others)
        return Candidate(site, site, coded.bytes, coded.let_go)

    def _coded(self, graph: JointGraph, value: fx.Node, others: Collection[str]) -> CodedValue:
        grid = self._grid(graph, value)
        assert grid is not None
        return coded_value(graph, value, grid, others)

    def _grid(self, graph: JointGraph, value: fx.Node) -> Grid | None:
        val = value.meta["val"]
        order = memory_order(val)
        if order is None:
            return None
        group = group_size([val.shape[d] for d in order], self.group)
        if group is None:
            return None
        zeros = any(u.role is Role.SIGN for u in uses_of(graph, value))
        block = 0 if zeros else self._side(val)
        salt = 0 if self.rounding == "stochastic" else None
        return Grid(self.bits, group, order, zeros, block, salt)

    def _side(self, val: torch.Tensor) -> int:
        """The side of the blocks of a spatial map; smaller ones for smaller maps."""
        if val.dim() != 4 or not self.block:
            return 0
        fits = [
            n
            for n in (self.block, self.block // 2)
            if n > 1 and all(isinstance(s, int) and s > n and s % n == 0 for s in val.shape[2:])
        ]
        return fits[0] if fits else 0

    def _refuse_slope(self, activation: Activation) -> str | None:
        if numel(activation.x.meta["val"]) < self.min_numel:
            return "fewer elements than min_numel"
        samples = samples_of(activation)
        if samples is None:
            return "the gradient is not linear in the incoming one"
        if not samples.is_finite or not samples.is_bounded:
            return "its derivative is not bounded"
        if samples.is_piecewise_constant:
            return "piecewise linear: a mask keeps its derivative exactly"
        return DerivativeCodes(self.slope_bits).obstacle(activation)

    def _table(self, activation: Activation) -> Table:
        samples = samples_of(activation)
        assert samples is not None
        make = nearest_table if self.rounding == "nearest" else stochastic_table
        return make(samples, self.slope_bits)

    def _note(self, graph: JointGraph, site: fx.Node) -> str:
        if graph.is_backward(site):
            table = self._table(codes_at(graph, site))
            return (
                f"{self.slope_bits} bits for a derivative; predicted relative error of its "
                f"gradient {table.relative:.3f} for x ~ N(0, 1)"
            )
        coded = self._coded(graph, site, ())
        kind = "norm's input, in two copies" if coded.norms else "value"
        kind = "ReLU output, its mask exact" if coded.grid.zeros else kind
        error = relative_error(
            self.bits, coded.grid.group, stochastic=self.rounding == "stochastic"
        )
        return (
            f"{self.bits} bits for a {kind}; predicted relative error {error:.3f} "
            f"if it is N(0, 1) in groups of {coded.grid.group}"
        )


def _is_value(graph: JointGraph, node: fx.Node) -> bool:
    val = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(val, torch.Tensor)
        and val.dtype.is_floating_point
        and graph.is_forward(node)
        and tag(node).placement is Placement.AUTO
        and storage_of(node) is node
    )


def _has_linear_use(graph: JointGraph, node: fx.Node, others: Collection[str]) -> bool:
    uses = [u for u in uses_of(graph, node) if u.reader.name not in others]
    return any(u.role in (Role.LINEAR, Role.NORM) for u in uses)
