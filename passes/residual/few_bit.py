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

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from gtrans.analysis.derivative_tables import (
    Samples,
    Table,
    Weight,
    nearest_table,
    stochastic_table,
)
from gtrans.analysis.pointwise import find_activations
from gtrans.contract import Close, Contract, Unbiased
from gtrans.core import Knob, require
from gtrans.ir.joint import JointGraph
from gtrans.plan.slopes import slope_proposal
from gtrans.plan.worth import Candidate, PayingPass


@dataclass(frozen=True)
class FewBit(PayingPass):
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

    def proposals(self, graph: JointGraph) -> Iterable[Candidate | str]:
        """The gradient at the input of every pointwise activation."""
        propose = partial(
            slope_proposal, bits=self.bits, min_numel=self.min_numel, table_of=self._table
        )
        return map(propose, find_activations(graph))

    def _table(self, samples: Samples) -> Table | str:
        if self.rounding == "stochastic":
            return stochastic_table(samples, self.bits)
        table, promise = nearest_table(samples, self.bits, self.weight), self.contract
        if isinstance(promise, Close) and table.largest > promise.rtol / 2:
            return f"{self.bits} bits cannot follow its derivative as closely as promised"
        return table
