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

from gtrans.analysis.cost import Device, node_seconds
from gtrans.analysis.liveness import simulate
from gtrans.analysis.row_regions import region_around
from gtrans.analysis.schedule import schedule_of
from gtrans.ir.joint import JointGraph, Side, runs_in
from gtrans.plan.front import Front
from gtrans.plan.realise import write
from gtrans.plan.rebuild import Candidate, Choice, Rebuilder
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
class Streamed:
    """A plan of the front, with regions taken by rows.

    Attributes:
        candidate: the plan.
        rounds: how often the regions at its peak are taken by rows.
        peak: simulated peak in bytes, constants included.
        seconds: predicted time of forward and backward.
        regions: how many regions that are.
    """

    candidate: Candidate
    rounds: int
    peak: int
    seconds: float
    regions: int

    def written_copy(self, joint: JointGraph) -> JointGraph:
        """A copy of the graph with this plan written into it."""
        twin = written_copy(joint, self.candidate.choice)
        for _ in range(self.rounds):
            take_by_rows(twin)
        return twin


def fastest_streamed(
    front: Front, room: int, faster_than_s: float, device: Device
) -> Streamed | None:
    """The fastest streamed plan that fits, if one is faster than what is at hand.

    Args:
        front: of the graph.
        room: bytes that its peak may have, constants included.
        faster_than_s: predicted seconds of the best plan that fits without streaming.
        device: what to predict times for.
    """
    found: Streamed | None = None
    for candidate in worth_streaming(front):
        if candidate.seconds >= faster_than_s:
            break  # streaming makes no plan faster
        if _floor(front, candidate) > room:
            continue
        fitting = (s for s in streamed_plans(front.joint, candidate, device) if s.peak <= room)
        plan = next(fitting, None)
        if plan is not None and plan.seconds < faster_than_s:
            found, faster_than_s = plan, plan.seconds
    return found


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
        seconds = sum(node_seconds(t.node, device) for t in schedule.tasks)
        yield Streamed(candidate, number, peak, seconds, regions)


def written_copy(joint: JointGraph, choice: Choice) -> JointGraph:
    """A copy of a graph with a choice written into it."""
    twin = joint.copy()
    schedule = Rebuilder(twin).schedule(same_choice(choice, joint, twin))
    assert schedule is not None  # as for the original
    write(twin, schedule)
    return twin


def same_choice(choice: Choice, joint: JointGraph, twin: JointGraph) -> Choice:
    """A choice for one graph as a choice for another one with the same nodes."""
    same = dict(zip(joint.nodes, twin.nodes, strict=True))
    save = frozenset(same[n] for n in choice.save)
    hold = None if choice.hold is None else frozenset(same[n] for n in choice.hold)
    dropped = frozenset((same[n], position) for n, position in choice.dropped)
    return Choice(save, hold, choice.window, dropped)


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


def _floor(front: Front, candidate: Candidate) -> int:
    """What is at the peak of a plan whether or not regions are taken by rows."""
    alive = front.simulate(front.schedule(candidate)).alive()
    return sum(a.bytes for a in alive if a.role not in _STREAMED_ROLES)


def _kind(node: fx.Node) -> tuple[object, ...]:
    val = node.meta.get("val")
    side = runs_in(node) if node.op == "call_function" else Side.FORWARD
    return node.target, tuple(map(str, getattr(val, "shape", ()))), side
