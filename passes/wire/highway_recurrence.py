"""Let the gradient of a recurrent layer run past all steps by its gates, and through in k sweeps.

    exact:   w[t]  = e[t] + (diag(z) + J)[t+1]^T w[t+1]              t = T .. 1, step by step
    here:    w0    = scan(e, z);   wk+1 = w0 + scan(J^T wk, z)        all steps at once

with z the gate that a GRU (its update gate) or an LSTM (its forget gate, on c) multiplies the old
state by. Weight gradients are taken at the last w, in one product over all steps.

Shapes: w: [T, B, s d], s = 2 for an LSTM (c and h), else 1.
Saves: all of the gates; only inputs and states are kept for the backward.
Costs: k products over all steps, and k + 1 scans of log2 T steps each, against T small products.
Contract: iterative, exact at T - 1 sweeps. Linear in the incoming gradient. A warning says if the
    last sweep still changed the gradient by half.
Needs: as `hoist-recurrence`, which is the exact relative. Layers whose size has a faster exact
    backward on this machine are left alone: a size is tried once, on random numbers. Also a loop in
    Python whose steps can run as a batch; its gate is found, see `gtrans.runtime.loop`.
Source: Fagnou et al., ICLR 2025, arXiv:2501.17086, theorem 2 and table 1. For a plain RNN z is
    zero, and this is the fixed-point iteration of Song et al., ICML 2021, arXiv:2002.03629.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from gtrans.analysis.recurrence_speed import backward_seconds
from gtrans.contract import Contract, Iterative
from gtrans.core import Knob, require
from gtrans.ir.forward import ForwardGraph
from gtrans.rewrite.recurrences import RecurrencePass, is_loop, runs_fused, size_of


@dataclass(frozen=True)
class HighwayRecurrence(RecurrencePass):
    """Compute the cotangents of a recurrent layer in a few sweeps instead of step by step.

    Args:
        iterations: sweeps through the cells; 0 carries the gradient by the gates alone.
        min_steps: leave shorter recurrences alone.
        only_where_faster: leave layers alone whose exact backward is as fast, by a measurement on
            the device they are on. Processes that must do the same switch it off.
    """

    name: ClassVar[str] = "highway-recurrence"
    knob: ClassVar[Knob] = Knob.WIRE
    rolls_loops: ClassVar[bool] = True

    iterations: int = 5
    min_steps: int = 16
    only_where_faster: bool = True

    def __post_init__(self) -> None:
        for option, least in (("iterations", 0), ("min_steps", 1)):
            given = getattr(self, option)
            require(
                given >= least,
                f"highway-recurrence: {option} must be at least {least}, got {given}",
            )

    @property
    def contract(self) -> Contract:
        """A truncated iteration; how many sweeps are exact depends on the model."""
        return Iterative(iterations=self.iterations)

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        """Refuses layers too whose exact backward is faster."""
        reason = super().refuse(graph, site)
        if reason is not None or not self.only_where_faster or is_loop(site):
            return reason
        own = "fused" if runs_fused(site) else "autograd"
        rules = (own, 0), ("loop", 0), ("sweeps", self.iterations)
        *exact, swept = (1e3 * s for s in backward_seconds(size_of(site), rules))
        if swept < min(exact):
            return None
        return (
            f"an exact backward of this size is faster here: {min(exact):.2g} ms by torch's or "
            f"hoist-recurrence, {swept:.2g} ms by sweeps"
        )

    def settings(self) -> dict[str, Any]:
        """The rule of the backward."""
        return {"rule": "sweeps", "count": self.iterations}
