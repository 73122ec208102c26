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
    busy without that gets slower; what gets shorter is the wait of one block for another.
Contract: iterative. Points up to k blocks from the loss are exact, so all is exact at k = n, and
    the parameters of a chain whose input wants a gradient as well at k = n - 1. In between the
    error may grow before it falls.
Needs: chains of gradient sums, found by `gtrans.analysis.chains`; a cone without effects, draws
    and collectives.
Source: Fagnou et al., ICLR 2025, arXiv:2501.17086, theorem 2 and section 3 (gamma: appendix). Not
    done: the change of down-sampling blocks of the paper (a chain is cut there), batched cones, and
    the scan in a logarithmic number of steps.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from gtrans.analysis.chains import Chain, Link, find_chains
from gtrans.contract import Contract, Iterative
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir.joint import TAG, JointGraph, tag
from gtrans.ir.sizes import hint

aten = torch.ops.aten


@dataclass(frozen=True)
class HighwayBP(Pass[JointGraph]):
    """Compute the gradient of a residual stream in a few sweeps instead of block after block.

    Args:
        iterations: sweeps through the blocks; 0 lets every block see the gradient that its stream
            ends with.
        gamma: share of the way past a block that counts as a part of the way through it. More of
            it damps networks whose blocks undo a part of their residual, and needs more sweeps.
        min_links: leave chains with fewer blocks alone.
    """

    name: ClassVar[str] = "highway-bp"
    knob: ClassVar[Knob] = Knob.WIRE

    iterations: int = 5
    gamma: float = 0.0
    min_links: int = 4

    def __post_init__(self) -> None:
        require(
            self.iterations >= 0,
            f"highway-bp: iterations must be at least 0, got {self.iterations}",
        )
        require(
            0 <= self.gamma <= 1, f"highway-bp: gamma must be between 0 and 1, got {self.gamma}"
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
            _Sweeps(graph, chain, self.iterations, self.gamma).rewrite()
            stats.rewritten += 1
            depths.append(chain.depth)
            stats.notes.append(_note(chain, self.iterations))
        if depths:
            stats.contract = Iterative(self.iterations, max(depths))
        return stats

    def refuse(self, chain: Chain) -> str | None:
        """Why a chain stays as it is, or None."""
        if chain.depth < self.min_links:
            return f"fewer blocks in a row than min_links; {chain.end}"
        if chain.depth <= self.iterations:
            return "as many sweeps as blocks: the plain backward is the same"
        return None


def _note(chain: Chain, iterations: int) -> str:
    return (
        f"{chain.depth} blocks from {chain.points[1].name} to {chain.points[-1].name} in "
        f"{iterations} sweeps ({chain.end})"
    )


class _Sweeps:
    """The rewrite of one chain.

    All that is new stands right before the sum it belongs to: whatever it reads stands before.
    """

    def __init__(self, joint: JointGraph, chain: Chain, iterations: int, gamma: float) -> None:
        self.joint = joint
        self.chain = chain
        self.last = iterations
        self.gamma = gamma
        self.level = {link.node: link.level for link in chain.links}
        self.dependents = chain.dependents()
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}

    def rewrite(self) -> None:
        """Inserts the sweeps, and lets all that read a sum read its last iterate."""
        for link in self.chain.links:
            for sweep in range(min(link.level, self.last + 1)):  # from its level on it is exact
                self.made[link.node, sweep] = self._iterate(link, sweep)
        for link in self.chain.links:
            final = self.made.get((link.node, self.last))
            if final is not None:
                self.joint.replace_uses(link.node, final, list(link.node.users))

    def _iterate(self, link: Link, sweep: int) -> fx.Node:
        """The value of one sum in one sweep."""
        insert, sum_ = self.joint.insert_before, link.node
        value = self._at(link.kept, sweep, sum_)
        if self.gamma and link.through:
            value = insert(sum_, aten.mul.Scalar, value, 1 - self.gamma)
            if sweep > 0:
                again = self._at(link.kept, sweep - 1, sum_)
                again = insert(sum_, aten.mul.Scalar, again, self.gamma)
                value = insert(sum_, aten.add.Tensor, value, again)
        if link.local:
            value = insert(sum_, aten.add.Tensor, value, link.addend)
        elif sweep > 0:
            addend = self._at(link.addend, sweep - 1, sum_)
            value = insert(sum_, aten.add.Tensor, value, addend)
        return self._in_layout_of(sum_, value)

    def _at(self, node: fx.Node, sweep: int, anchor: fx.Node) -> fx.Node:
        """A node as it is when every sum has the value of some sweep; copied where it differs."""
        found = self._known(node, sweep)
        if found is not None:
            return found
        pending, needed = [node], {node}
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in needed and self._known(source, sweep) is None:
                    needed.add(source)
                    pending.append(source)
        for original in sorted(needed):
            self.made[original, sweep] = self._copy(original, sweep, anchor)
        return self.made[node, sweep]

    def _known(self, node: fx.Node, sweep: int) -> fx.Node | None:
        """The node that has the value in some sweep, if there is one already."""
        sums = self.dependents.get(node, frozenset())
        if all(self.level[s] <= sweep for s in sums):
            return node  # exact by then
        if sweep == self.last and node not in self.level:
            return node  # in the end it reads the last iterates itself
        return self.made.get((node, sweep))

    def _copy(self, original: fx.Node, sweep: int, anchor: fx.Node) -> fx.Node:
        args, kwargs = fx.map_arg(
            (original.args, original.kwargs), lambda n: self._known(n, sweep) or n
        )
        target: Any = original.target
        made = self.joint.insert_before(anchor, target, *args, **kwargs)
        for key in ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr"):
            made.meta.pop(key, None)
            if key in original.meta:
                made.meta[key] = original.meta[key]
        made.meta[TAG] = replace(tag(made), region=tag(original).region)
        return made

    def _in_layout_of(self, sum_: fx.Node, value: fx.Node) -> fx.Node:
        """The value with the strides of a sum: what reads the sum may view it by its strides."""
        wanted, got = sum_.meta["val"].stride(), value.meta["val"].stride()
        if all(guard_or_false(a == b) for a, b in zip(wanted, got, strict=True)):
            return value
        order = sorted(range(len(wanted)), key=lambda d: -hint(wanted[d]))
        back = [order.index(d) for d in range(len(order))]
        insert = self.joint.insert_before
        value = insert(sum_, aten.permute.default, value, order)
        value = insert(sum_, aten.clone.default, value, memory_format=torch.contiguous_format)
        return insert(sum_, aten.permute.default, value, back)
