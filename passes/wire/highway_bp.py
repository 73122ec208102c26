"""Let the gradient run past the blocks of a residual stream first, and through them in k sweeps.

    exact:   w[t]   = K[t](w[t-1]) + J[t](w[t-1])            t = 1 .. n, one block after another

    sweep 0: w0[t]  = K[t](w0[t-1])                          past every block, cheap
    sweep j: wj[t]  = K[t](wj[t-1]) + J[t](wj-1[t-1])        all J at once

and the weight gradients of block t are taken at wk[t-1]. K is the way past a block (the identity,
a ReLU's mask, a factor, the backward of a layer norm), J the way through it. A second loss on the
stream is added in every sweep. wk is the sum over all ways from the loss to a layer that go
through at most k blocks.

Shapes: w[t]: that of the stream, [*s]; nothing that the forward keeps changes.
Saves: no bytes. The longest chain of products in the backward shrinks from n blocks to k + 1.
Costs: k (n - k) blocks are run through once more, without their weight gradients. A device that is
    busy without that gets slower; what gets shorter is the wait of one block for another. Blocks
    that are small and alike run as a batch, for which their weights are stacked once a step.
    One more run through the blocks measures gamma, unless it is given.
Contract: iterative. Points up to k blocks from the loss are exact, so all is exact at k = n, and
    the parameters of a chain whose input wants a gradient as well at k = n - 1. In between the
    error may grow before it falls.
Needs: chains of gradient sums, found by `gtrans.analysis.chains`; a cone without effects, draws
    and collectives.
Source: Fagnou et al., ICLR 2025, arXiv:2501.17086, theorem 2 and section 3 (gamma: appendix; the
    paper sets it by hand). Not done: the change of down-sampling blocks of the paper (a chain is
    cut there).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from gtrans.analysis.chains import Chain, find_chains
from gtrans.analysis.cost import device_of, node_seconds
from gtrans.contract import Contract, Iterative
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir.joint import JointGraph
from gtrans.rewrite.batched import Part
from gtrans.rewrite.sweeps import Sweeps

# As many starts of a kernel as a product that keeps a device busy takes.
_FILLS = 10


@dataclass(frozen=True)
class HighwayBP(Pass[JointGraph]):
    """Compute the gradient of a residual stream in a few sweeps instead of block after block.

    Args:
        iterations: sweeps through the blocks; 0 lets every block see the gradient that its stream
            ends with.
        gamma: share of the way past a block that counts as a part of the way through it, between 0
            and 1. It damps networks whose blocks undo a part of their residual. By default each
            block has its own, measured in every step by one more sweep on a fixed probe: minus
            the mean of the diagonal of its Jacobian.
        min_links: leave chains with fewer blocks alone.
        batch: whether blocks of one structure run as a batch within a sweep, their weights stacked;
            "auto" where one of their products is short beside the start of a kernel.
    """

    name: ClassVar[str] = "highway-bp"
    knob: ClassVar[Knob] = Knob.WIRE
    reads_steps: ClassVar[bool] = True

    iterations: int = 5
    gamma: float | None = None
    min_links: int = 4
    batch: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        require(
            self.iterations >= 0,
            f"highway-bp: iterations must be at least 0, got {self.iterations}",
        )
        require(
            self.gamma is None or 0 <= self.gamma <= 1,
            f"highway-bp: gamma must be between 0 and 1, got {self.gamma}",
        )
        require(
            self.min_links >= 1, f"highway-bp: min_links must be at least 1, got {self.min_links}"
        )

    @property
    def contract(self) -> Contract:
        """A truncated iteration; how many sweeps are exact depends on the model."""
        return Iterative(iterations=self.iterations)

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Rewrites one chain after another, the deepest first."""
        stats = Stats()
        seen: set[fx.Node] = set()
        depths: list[int] = []
        # A rewrite changes what the cones of other chains read, so they are looked up again.
        while chain := next((c for c in find_chains(graph) if c.points[-1] not in seen), None):
            seen.update(chain.points[1:])
            stats.matched += 1
            reason = self.refuse(chain)
            if reason is None and not permitted(chain.points[1].name):
                reason = HELD_BACK
            if reason is not None:
                stats.refuse(chain.points[-1], reason)
                continue
            sweeps = Sweeps(graph, chain, self.iterations, self.gamma, self._worth(graph))
            sweeps.rewrite()
            stats.rewritten += 1
            depths.append(chain.depth)
            stats.notes.append(_note(chain, self.iterations, sweeps.batched))
        if depths:
            stats.contract = Iterative(self.iterations, max(depths))
        return stats

    def _worth(self, graph: JointGraph) -> Callable[[Part], bool]:
        """Whether blocks run as a batch: where one of their products leaves processors idle."""
        if self.batch != "auto":
            return lambda part: self.batch == "always"
        device = device_of(graph)
        limit = _FILLS * device.launch_s
        return lambda part: all(node_seconds(n, device) < limit for n in part.products)

    def refuse(self, chain: Chain) -> str | None:
        """Why a chain stays as it is, or None."""
        if chain.depth < self.min_links:
            return f"fewer blocks in a row than min_links; {chain.end}"
        if chain.depth <= self.iterations:
            return "as many sweeps as blocks: the plain backward is the same"
        return None


def _note(chain: Chain, iterations: int, batched: int) -> str:
    together = f", {batched} runs of a block in batches" if batched else ""
    return (
        f"{chain.depth} blocks from {chain.points[1].name} to {chain.points[-1].name} in "
        f"{iterations} sweeps ({chain.end}){together}"
    )
