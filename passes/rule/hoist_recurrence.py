"""Run the backward of a recurrent layer as one carried product a step, and all else at once.

    as autograd unrolls it                       gates of all steps: one product
    for t = T .. 1:                        -->   for t = T .. 1: w = e[t] + w z + (w C[t]) U
        gates, derivatives, dU +=, dx[t]         dU, db, dx: one product each

Shapes: states: [T, B, s d]; gates: [T, B, g d]; C: [T, B, s, g + s, d], with g = 3, s = 1 for a
    GRU, 4 and 2 for an LSTM, 1 and 1 for an RNN.
Saves: all of the gates; only inputs and states are kept for the backward.
Costs: the product of the gates once more, over all steps at once.
Contract: exact, up to the order of sums.
Needs: `nn.RNN`, `nn.GRU` or `nn.LSTM` with any number of layers and directions; no projection, no
    packed sequence, no dropout between layers. With `method=scan` also loops in Python whose step
    works element by element (linear recurrences, minimal GRUs, state space models, leaky neurons).
Source: gtrans. With `method=scan` the carried product is a parallel scan over matrices, as in
    Danieli et al., NeurIPS 2023, arXiv:2309.16318; (s d)^3 work a step, so for small states.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from gtrans.analysis.loops import Loop
from gtrans.contract import Contract, Exact
from gtrans.core import Knob, require
from gtrans.ir.forward import ForwardGraph
from gtrans.rewrite.recurrences import RecurrencePass, runs_fused, state_size
from gtrans.rewrite.rolled import cannot_roll, not_pointwise, roll, step_of
from gtrans.runtime.pointwise_loop import pointwise_loop


@dataclass(frozen=True)
class HoistRecurrence(RecurrencePass):
    """Compute all that a recurrent backward does not carry in products over all steps.

    Args:
        method: "loop" carries step by step, "scan" in a logarithmic number of steps.
        min_steps: leave shorter recurrences alone.
        max_state: leave recurrences alone whose states (batch times width) have more elements: the
            product of a step is then large enough, and to compute the gates again costs more than
            is saved. None takes all.
        where_fused: take layers, too, that eager torch computes as one fused operator (an LSTM on a
            CPU, see `fused-lstm`): slower, but no workspace is kept.
    """

    name: ClassVar[str] = "hoist-recurrence"
    knob: ClassVar[Knob] = Knob.RULE

    method: Literal["loop", "scan"] = "loop"
    min_steps: int = 4
    max_state: int | None = 1024
    where_fused: bool = False

    def __post_init__(self) -> None:
        require(
            self.method in ("loop", "scan"),
            f"hoist-recurrence: method must be 'loop' or 'scan', got {self.method!r}",
        )
        require(
            self.min_steps >= 1,
            f"hoist-recurrence: min_steps must be at least 1, got {self.min_steps}",
        )

    @property
    def contract(self) -> Contract:
        """The same gradient, up to the order of sums."""
        return Exact(bitwise=False)

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        """Refuses large states and fused layers too."""
        reason = super().refuse(graph, site)
        if reason is None and runs_fused(site) and not self.where_fused:
            return "torch runs this layer as one fused operator, which is faster"
        limit = self.max_state
        if reason is None and limit is not None and state_size(site) > limit:
            return "a state has more elements than max_state"
        return reason

    def settings(self) -> dict[str, Any]:
        """The rule of the backward."""
        return {"rule": self.method}

    def refuse_loop(self, graph: ForwardGraph, loop: Loop) -> str | None:
        """Refuses all but scans over loops that work element by element."""
        if self.method != "scan":
            return "a loop in Python: hoist-recurrent-wgrad, or method=scan element by element"
        return cannot_roll(graph, loop) or not_pointwise(loop, step_of(loop))

    def rewrite_loop(self, graph: ForwardGraph, loop: Loop) -> None:
        """Runs the loop by `pointwise_loop`."""
        roll(graph, loop, step_of(loop), pointwise_loop)
