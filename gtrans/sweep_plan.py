"""How many sweeps `highway-bp` needs on a model, from its weights as they are."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from gtrans.analysis.chains import find_chains
from gtrans.analysis.sweeps import block_norms, left_out, sweeps_for
from gtrans.debugging.recording import Recording
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Pipeline


@dataclass(frozen=True)
class SweepPlan:
    """One chain of a model.

    Attributes:
        depth: its blocks in a row.
        norms: the estimated norm of each block.
        iterations: the fewest sweeps whose bound is below the error asked for.
        bound: that bound, relative to the gradient that enters the chain.
    """

    depth: int
    norms: tuple[float, ...]
    iterations: int
    bound: float

    def __str__(self) -> str:
        worth = "" if self.iterations < self.depth else "; the plain backward is no deeper"
        return (
            f"{self.depth} blocks, sum of norms {sum(self.norms):.2f}: {self.iterations} sweeps "
            f"leave out at most {self.bound:.1e}{worth}"
        )


def plan_sweeps(
    model: nn.Module, *inputs: Any, error: float = 0.1, min_links: int = 4, **keyword_inputs: Any
) -> list[SweepPlan]:
    """Sweeps for every chain of a model, the deepest first; see `gtrans.analysis.sweeps`.

    The bound holds for blocks that do not lean against their residual, and norms are estimated
    from below: look at the result with `gtrans.verify` as well. Ask again as training goes on.

    Args:
        model: the model; it stays as it is.
        inputs: of one training step.
        error: largest share of the gradient that may be left out.
        min_links: leave out chains with fewer blocks.
        keyword_inputs: likewise.

    Raises:
        ModelError: the model does not accept the inputs.
    """
    recording = Recording(model, inputs, keyword_inputs, forward=Pipeline(unrolls=True))
    plans = []
    for case in recording.joints:
        joint = case.graph
        assert isinstance(joint, JointGraph)
        for chain in find_chains(joint):
            if chain.depth >= min_links:
                norms = block_norms(joint, chain, case.values)
                count = sweeps_for(norms, error)
                plans.append(SweepPlan(chain.depth, tuple(norms), count, left_out(norms, count)))
    return sorted(plans, key=lambda plan: -plan.depth)
