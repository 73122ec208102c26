"""Recover the streams of one block while the gradients of another are computed.

    R0 G0 R1 G1 R2 G2 ...        -->        lane 0:  R0  G0  R2  G2
                                            lane 1:  R1      G1  R3 ...

The pass finds which nodes of the backward recover and which compute gradients, block by block, and
writes that onto the nodes; the backend `streams` runs them by `gtrans.analysis.lanes`. Every other
backend runs the step as it was.

Saves: nothing; look-ahead q keeps q + 1 blocks of rebuilt values alive instead of one.
Costs: nothing but events on the device. Where one block's kernels fill it, nothing is gained.
Contract: exact, bit for bit: the same operators run on the same values.
Needs: `reversible` and the plan before it.
Source: PaReprop (arXiv:2306.09342), whose published code is for even depths only.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gtrans.analysis.blocks import block_after, recovery_blocks
from gtrans.contract import Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir.joint import JointGraph, Side, Unit, assign, runs_in

TOO_EARLY = "there is no plan yet: it comes after 'reversible' and 'plan'"


@dataclass(frozen=True)
class PaReprop(Pass[JointGraph]):
    """Lay recovery and gradients of different blocks side by side.

    Args:
        look_ahead: by how many blocks recovery may be ahead of the gradients.
    """

    name: ClassVar[str] = "pareprop"
    knob: ClassVar[Knob] = Knob.SCHEDULE

    look_ahead: int = 1

    def __post_init__(self) -> None:
        require(
            self.look_ahead >= 1, f"pareprop: look_ahead must be at least 1, got {self.look_ahead}"
        )

    @property
    def contract(self) -> Contract:
        """The same gradient, bit for bit."""
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Assigns every node of the backward to a piece of work."""
        backward = [
            n for n in graph.nodes if n.op == "call_function" and runs_in(n) is Side.BACKWARD
        ]
        blocks = recovery_blocks(graph)
        first = {block: node for node, block in sorted(blocks.items(), reverse=True)}
        stats = Stats(len(first))
        reason = TOO_EARLY if graph.cut is None else None
        if first and reason is None and not permitted(first[min(first)].name):
            reason = HELD_BACK
        if reason is not None:
            stats.refuse_all(dict.fromkeys(first.values(), reason))
        if reason is not None or not first:
            return stats
        for node, block in blocks.items():
            assign(node, Unit("recover", block, self.look_ahead))
        for node, block in _gradients(backward, blocks).items():
            assign(node, Unit("grads", block, self.look_ahead))
        stats.rewritten = stats.matched
        stats.notes.append(f"{stats.matched} blocks, up to {self.look_ahead + 1} of them at once")
        return stats


def _gradients(backward: list[fx.Node], blocks: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """The block whose gradients a node belongs to; -1 before the first of them."""
    found: dict[fx.Node, int] = {}
    for node in backward:
        if node not in blocks:
            inputs = [block_after(n, blocks) for n in node.all_input_nodes if n in blocks]
            inputs += [found[n] for n in node.all_input_nodes if n in found]
            found[node] = max(inputs, default=-1)
    return found
