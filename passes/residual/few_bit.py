"""Keep one to four bits of an activation's derivative for the backward instead of its input.

    y  = h(x)                                 y     = h(x)
                                              bits  = pack(code(x))          # saved, 1 to 4 bits
    dx = dy * h'(x)                    -->    dx    = dy * level[unpack(bits)]

Code, stochastic: h'(x) rounded at random to one of two neighbouring levels, with the probabilities
that make its expectation h'(x). Code, nearest: how many thresholds are smaller than x.

Shapes: x, y, dx, dy: [*s] of one floating dtype; bits: uint8 of numel * b / 8 bytes.
Saves: numel * (itemsize - b / 8) bytes per match, where nothing else keeps x: a next layer that is
    frozen, as under LoRA. Where x stays for something else, the match is left as it is.
Costs: h'(x) and one random number per element in the forward; shifts and selects in the backward.
Contract: stochastic is unbiased (up to rounding of the working dtype); nearest is close: every
    element of dx is off by at most rtol / 2 * |dy|, where |dx| is about |dy| / 2 or more on
    average. A NaN in x does not come back in dx.
Needs: nothing of the model. Stochastic rounding has random numbers of its own
    (`gtrans.runtime.noise`): dropout draws the masks it would draw without this pass.
Source: few-bit backward (arXiv:2202.00441), its dynamic program in `gtrans.analysis`; stochastic
    rounding of the derivative: gtrans. Not done: weights from measured histograms of x.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from gtrans.analysis.derivative_tables import (
    Table,
    Weight,
    nearest_table,
    samples_of,
    stochastic_table,
)
from gtrans.analysis.pointwise import Activation, find_activations
from gtrans.contract import Close, Contract, Unbiased
from gtrans.core import HELD_BACK, Knob, Permission, SitePass, Stats, require
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import human, numel
from gtrans.plan.worth import Candidate, keep_what_pays, scales
from gtrans.rewrite.derivative_codes import DerivativeCodes, codes_at


@dataclass(frozen=True)
class FewBit(SitePass[JointGraph]):
    """Replace the saved inputs of smooth pointwise activations by a few bits per element.

    Args:
        bits: bits per element, 1 to 4.
        rounding: "stochastic" is unbiased; "nearest" has the smaller error, always the same.
        weight: where "nearest" is to be good: "uniform" on [-10, 10], or "normal" for x ~ N(0, 1).
        min_numel: leave activations with fewer elements alone.
    """

    name: ClassVar[str] = "few-bit"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    bits: int = 2
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    weight: Weight = "uniform"
    min_numel: int = 4096

    def __post_init__(self) -> None:
        require(1 <= self.bits <= 4, f"few-bit: bits must be 1, 2, 3 or 4, got {self.bits}")
        require(self.min_numel >= 1, f"few-bit: min_numel must be at least 1, got {self.min_numel}")

    @property
    def contract(self) -> Contract:
        """Unbiased over the rounding, or close, with a bound that every table used keeps."""
        if self.rounding == "stochastic":
            return Unbiased(noise=frozenset({self.name}))
        return Close(rtol=2.0 ** (2 - self.bits))

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The gradient at the input of every pointwise activation."""
        return [a.dx for a in find_activations(graph)]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses what a table cannot stand for; whether it pays is decided by planning."""
        activation = codes_at(graph, site)
        val = activation.x.meta["val"]
        if numel(val) < self.min_numel:
            return "fewer elements than min_numel"
        if (obstacle := DerivativeCodes(self.bits).obstacle(activation)) is not None:
            return obstacle
        samples = samples_of(activation)
        if samples is None:
            return "the gradient is not linear in the incoming one"
        if not samples.is_finite:
            return "its derivative is not finite between -10 and 10"
        if not samples.is_bounded:
            return "its derivative is not bounded"
        if samples.is_piecewise_constant:
            return "piecewise linear: a mask keeps its derivative exactly"
        promise = self.contract
        if isinstance(promise, Close) and self._table(activation).largest > promise.rtol / 2:
            return f"{self.bits} bits cannot follow its derivative as closely as promised"
        return None

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Rewrites the sites that save bytes once the whole graph is planned."""
        stats = Stats()
        candidates: list[Candidate] = []
        for site in list(self.sites(graph)):
            stats.matched += 1
            reason = self.refuse(graph, site)
            if reason is None:
                found = codes_at(graph, site)
                size = DerivativeCodes(self.bits).bytes(found)
                candidates.append(Candidate(site, found.x, size, scales(site, found.dy)))
            else:
                stats.refuse(site, reason)
        verdict = keep_what_pays(graph, candidates, self.rewrite)
        stats.refuse_all(verdict.refused)
        notes: Counter[str] = Counter()
        for site in verdict.chosen:
            if not permitted(site.name):
                stats.refuse(site, HELD_BACK)
                continue
            notes[self._note(self._table(codes_at(graph, site)))] += 1
            self.rewrite(graph, site)
            stats.rewritten += 1
        stats.notes += [f"{count} x {note}" for note, count in notes.items()]
        if verdict.chosen:
            change = f"{human(verdict.bytes_before)} -> {human(verdict.bytes_after)}"
            stats.notes.append(f"saved for backward, once planned: {change}")
        return stats

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Packs codes in the forward and reads levels in the backward."""
        activation = codes_at(graph, site)
        DerivativeCodes(self.bits).rewrite(graph, activation, self._table(activation))

    def _table(self, activation: Activation) -> Table:
        samples = samples_of(activation)
        assert samples is not None
        if self.rounding == "nearest":
            return nearest_table(samples, self.bits, self.weight)
        return stochastic_table(samples, self.bits)

    def _note(self, table: Table) -> str:
        return (
            f"{self.bits} bits for an activation; predicted error of its gradient: relative "
            f"{table.relative:.3f} for x ~ N(0, 1), at most {table.largest:.3f} |dy|"
        )
