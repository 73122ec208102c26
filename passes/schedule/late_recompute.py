"""Run what the backward needs as late as possible: right before its first reader.

    m  = mul(dl, h)          # of a loss in the middle of the model
    ...                                               ...
    da = mm(dy, W)                         -->        da = mm(dy, W)
    dh = add(da, m)                                   m  = mul(dl, h)
                                                      dh = add(da, m)

Saves: the bytes of m between its old place and its new one.
Costs: nothing; not a node more or less.
Contract: exact, bit for bit: the same operators run on the same values.
Needs: nothing. After `plan`, recomputed values are moved as well. A node stays where it is if that
    would keep as much of its inputs alive (bytes times steps) as it saves; so do random draws.
Source: gtrans; late recomputation as in PaReprop (arXiv:2306.09342), on one stream.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gtrans.analysis.lateness import first_reader, is_late, may_move, pays
from gtrans.contract import Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats
from gtrans.ir.joint import JointGraph

KEEPS_MORE = "its inputs would be kept longer, which costs as much"


@dataclass(frozen=True)
class LateRecompute(Pass[JointGraph]):
    """Move pure backward work to where it is first read."""

    name: ClassVar[str] = "late-recompute"
    knob: ClassVar[Knob] = Knob.SCHEDULE
    contract: ClassVar[Contract] = Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Moves nodes, last ones first, until each stands where it should."""
        candidates = frozenset(n for n in graph.nodes if may_move(n))
        early: set[fx.Node] = set()
        moved: set[fx.Node] = set()
        answers: dict[fx.Node, bool] = {}
        pending = True
        while pending:
            pending = False
            place = {n: i for i, n in enumerate(graph.nodes)}
            for node in sorted(candidates, reverse=True):
                reader = first_reader(node)
                if reader is None or is_late(node, reader, candidates):
                    continue
                early.add(node)
                if not pays(graph, node, reader, place):
                    continue
                if node not in answers:
                    answers[node] = permitted(node.name)
                if answers[node]:
                    graph.move_before(node, reader)
                    moved.add(node)
                    pending = True
        stats = Stats(len(early), len(moved))
        for node in sorted(early - moved):
            stats.refuse(node, KEEPS_MORE if answers.get(node, True) else HELD_BACK)
        return stats
