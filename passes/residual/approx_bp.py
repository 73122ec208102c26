"""Backpropagate through GELU and SiLU as if they were three hinges, by two bits of their input.

    y  = gelu(x)                     y    = gelu(x)
                                     bits = pack([x > c1] + [x > c2] + [x > c3])    # saved
    dx = dy * gelu'(x)        -->    dx   = dy * (0, a1, a1 + a2, 1)[unpack(bits)]

Shapes: x, y, dx, dy: [*s] of one floating dtype; bits: uint8 of numel / 4 bytes.
Saves: as `few-bit` with two bits, under the same conditions: nothing else keeps x.
Costs: three comparisons in the forward; shifts and selects in the backward.
Contract: close: every element of dx is off by at most rtol / 2 * |dy|.
Needs: an activation whose derivative is that of GELU (either form) or SiLU, however it is written.
Source: ReGELU2 and ReSiLU2 of approximate backpropagation (arXiv:2406.16282), with the published
    constants. They bring the primitives close together, not the derivatives: `few-bit` has a
    seventh of the mean square error with as many bits, and its stochastic rounding no bias. This
    pass is for comparison.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from scipy.special import expit, ndtr

from gtrans.analysis.derivative_tables import Samples, Table, given_table
from gtrans.analysis.pointwise import find_activations
from gtrans.contract import Close, Contract
from gtrans.core import Knob, require
from gtrans.ir.joint import JointGraph
from gtrans.plan.slopes import slope_proposal
from gtrans.plan.worth import Candidate, PayingPass

_BITS = 2
# The two forms of GELU differ by less than this in their derivative, other activations by more.
_SAME = 2e-3


@dataclass(frozen=True)
class Hinges:
    """A sum of a_i * max(x - c_i, 0) with sum a_i = 1 and sum a_i c_i = 0."""

    slopes: tuple[float, float, float]
    corners: tuple[float, float, float]

    @property
    def levels(self) -> tuple[float, ...]:
        """The derivative between the corners."""
        first, second, _ = self.slopes
        return (0.0, first, first + second, 1.0)


HINGES: dict[str, dict[str, Hinges]] = {
    "published": {
        "gelu": Hinges(
            (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
            (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
        ),
        "silu": Hinges(
            (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
            (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
        ),
    },
    "symmetric": {
        "gelu": Hinges((-0.049575, 1.09915, -0.049575), (-3.17126, 0.0, 3.17126)),
        "silu": Hinges((-0.0405245, 1.081049, -0.0405245), (-6.3199, 0.0, 6.3199)),
    },
}


@dataclass(frozen=True)
class ApproxBP(PayingPass):
    """Replace the saved inputs of GELU and SiLU by two bits per element.

    Args:
        constants: "published", or "symmetric" for slightly better ones.
        min_numel: leave activations with fewer elements alone.
    """

    name: ClassVar[str] = "approx-bp"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    constants: Literal["published", "symmetric"] = "published"
    min_numel: int = 4096

    def __post_init__(self) -> None:
        require(
            self.min_numel >= 1, f"approx-bp: min_numel must be at least 1, got {self.min_numel}"
        )

    @property
    def contract(self) -> Contract:
        """Close, with a bound that both tables keep."""
        return Close(rtol=1.2)

    def proposals(self, graph: JointGraph) -> Iterable[Candidate | str]:
        """The gradient at the input of every pointwise activation."""
        propose = partial(
            slope_proposal, bits=_BITS, min_numel=self.min_numel, table_of=self._table
        )
        return map(propose, find_activations(graph))

    def _table(self, samples: Samples) -> Table | str:
        name = _name_of(samples)
        if name is None:
            return "the paper has constants for GELU and SiLU only; few-bit takes any activation"
        hinges = HINGES[self.constants][name]
        return given_table(samples, hinges.corners, hinges.levels)


def _name_of(samples: Samples) -> str | None:
    """Which of the two activations a derivative belongs to."""
    x, h = samples.x, samples.h
    gate = expit(x)
    known = {
        "gelu": ndtr(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
        "silu": gate + x * gate * (1 - gate),
    }
    return next((name for name, slope in known.items() if abs(h - slope).max() < _SAME), None)
