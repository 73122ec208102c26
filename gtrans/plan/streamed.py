"""Plans whose wide regions are computed a few rows at a time, beside those of the front.

    front:      c_0, c_1, ...                       peak against time, see `gtrans.plan.front`
    streamed:   c_i with the regions at its peak    no product more, a lower peak: what is wide
                taken by rows, then those at the    between two products is never there as a whole
                next peak, ...

Regions of one kind (the feed-forward networks of all blocks) are taken together. Like the front,
these plans do not depend on the budget, so that peak and time stay monotone in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from gtrans.analysis.cost import Device, total_seconds
from gtrans.analysis.liveness import simulate
from gtrans.analysis.row_regions import region_around
from gtrans.analysis.schedule import schedule_of
from gtrans.ir.joint import JointGraph, Side, runs_in
from gtrans.plan.front import Front
from gtrans.plan.rebuild import Candidate
from gtrans.plan.rewritten import Rewritten, Way, written_copy
from gtrans.rewrite.by_rows import compute_by_rows

# Each time a region is taken by rows, its rows are divided by this number.
_CHUNKS = 4
# Rounds per plan; every one has a lower peak than the one before.
_ROUNDS = 6
# Saved values, constants, outputs and gradients are kept as a whole.
_STREAMED_ROLES = ("temporary", "recomputed")
# Plans of the front to look at: so many nodes in all, but not fewer or more plans than this.
_NODES, _FEWEST, _MOST = 40_000, 3, 12


@dataclass(frozen=True)
class Streamed(Rewritten):
    """A plan of the front, with regions taken by rows.

    Attributes:
        rounds: how often the regions at its peak are taken by rows.
        regions: how many regions that are.
    """

    rounds: int
    regions: int

    def write(self, joint: JointGraph) -> None:
        """Takes the regions by rows, in a graph that has the plan written into it already."""
        for _ in range(self.rounds):
            take_by_rows(joint)


def streaming(front: Front) -> Way[Streamed]:
    """The streamed plans of some plans of a front."""
    return Way(
        front,
        worth_streaming(front),
        _STREAMED_ROLES,
        lambda candidate: streamed_plans(front.joint, candidate, front.device),
    )


def streamed_plans(joint: JointGraph, candidate: Candidate, device: Device) -> Iterator[Streamed]:
    """A plan with the regions at its peak taken by rows, then those at the next peak, and so on."""
    twin, lowest, regions = written_copy(joint, candidate.choice), candidate.peak, 0
    for number in range(1, _ROUNDS + 1):
        count = take_by_rows(twin)
        if not count:
            return
        regions += count
        schedule = schedule_of(twin)
        peak = simulate(schedule).peak
        if peak >= lowest:
            return
        lowest = peak
        seconds = total_seconds((t.node for t in schedule.tasks), device)
        yield Streamed(candidate, peak, seconds, number, regions)


def take_by_rows(joint: JointGraph) -> int:
    """Takes by rows the regions of the widest kind that is in memory at the peak of a written plan.

    Returns:
        How many regions; 0 if nothing at the peak can be streamed.
    """
    alive = simulate(schedule_of(joint)).alive()
    kinds = dict.fromkeys(_kind(a.node) for a in alive if a.role in _STREAMED_ROLES)
    for kind in kinds:
        gone: set[fx.Node] = set()
        count = 0
        for node in [n for n in joint.nodes if _kind(n) == kind]:
            region = None if node in gone else region_around(joint, node)
            if region is not None:
                compute_by_rows(joint, region, _CHUNKS)
                gone |= region.nodes
                count += 1
        if count:
            return count
    return 0


def worth_streaming(front: Front) -> list[Candidate]:
    """Some plans of a front, the same for every budget: the lowest peaks, and some of the rest."""
    best = front.best()
    nodes = max(1, len(front.joint.graph.nodes))
    count = min(len(best), max(_FEWEST, min(_MOST, _NODES // nodes)))
    low = -(-count // 2)  # where whole regions do not fit, those with the lowest peaks are wanted
    rest = best[: len(best) - low]
    return [*(rest[i * len(rest) // (count - low)] for i in range(count - low)), *best[-low:]]


def _kind(node: fx.Node) -> tuple[object, ...]:
    val = node.meta.get("val")
    side = runs_in(node) if node.op == "call_function" else Side.FORWARD
    return node.target, tuple(map(str, getattr(val, "shape", ()))), side
