"""Choose the fastest plan whose true peak stays under a budget, or say that there is none.

    plan(budget) = argmin seconds over { c in front : peak(c) + held elsewhere <= budget }

The front does not depend on the budget, so peak and predicted time are monotone in it. The peak
that counts is the one of the graph with the plan written into it; where a plan takes an offer of a
pass, whose function is only known then, it is checked on a copy first. Where a plan of the front
fits but is not the fastest one, a faster one that fits with its wide regions taken by rows (see
`gtrans.plan.streamed`), or with values on the host (`gtrans.plan.offloaded`), is preferred to it.
Where a pass rebuilds streams of a reversible network, that is done for none, some or all blocks
(see `gtrans.plan.inversion`), whichever is fastest.
"""

from dataclasses import dataclass

from gtrans.analysis.cost import Device, node_seconds
from gtrans.analysis.liveness import Liveness, simulate
from gtrans.analysis.schedule import Schedule, schedule_of
from gtrans.analysis.workspace import is_for_loss
from gtrans.errors import BudgetError
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import human
from gtrans.ir.source import location
from gtrans.memory import Budget
from gtrans.plan.alive import alive_rows, listed
from gtrans.plan.cut import read_directly
from gtrans.plan.front import Front
from gtrans.plan.inversion import Variant, variants
from gtrans.plan.offloaded import Offloaded, offloading
from gtrans.plan.realise import write
from gtrans.plan.rebuild import Candidate, Choice, Rebuilder
from gtrans.plan.rewritten import Rewritten, same_choice, written_copy
from gtrans.plan.streamed import Streamed, streaming


@dataclass(frozen=True)
class Fit:
    """A plan that was written into a graph.

    Attributes:
        candidate: the plan.
        peak: bytes at its peak, with what is held elsewhere.
        plain_peak: the same without any plan.
        limit: the budget in bytes.
        slowdown: predicted time relative to the fastest plan.
        count: operators that run again.
        regions: how many regions are computed a few rows at a time.
        inverted: how many blocks have their streams rebuilt, of `blocks`.
        blocks: for how many blocks a pass offered that.
        on_host: how many saved values wait on the host.
        host_bytes: of all of them.
    """

    candidate: Candidate
    peak: int
    plain_peak: int
    limit: int
    slowdown: float
    count: int
    regions: int = 0
    inverted: int = 0
    blocks: int = 0
    on_host: int = 0
    host_bytes: int = 0


def plain_liveness(joint: JointGraph) -> Liveness:
    """The memory of a graph as autograd would run it: everything the backward reads is saved."""
    return simulate(_plain(joint))


def fit(joint: JointGraph, budget: Budget, device: Device) -> Fit:
    """Writes the fastest plan under a budget into a graph.

    Args:
        joint: edited in place, unless no plan fits.
        budget: bound of the whole step's peak: parameters, buffers and inputs of this graph, what
            `joint.surroundings` says is held elsewhere, and everything this graph allocates.
        device: what to predict times for.

    Raises:
        BudgetError: no plan fits; the message has the smallest peak that can be reached, and what
            is alive there.
    """
    around = joint.surroundings
    plain = around.plain_peak or plain_liveness(joint).peak + around.held_bytes
    limit = budget.in_bytes(plain)
    room = int(limit * (1 - around.slack)) - around.held_bytes
    found: _Search | None = None
    lowest: _Search | None = None
    fastest = 0.0
    for variant in variants(joint):
        if found is not None and _least_seconds(variant.joint, device) >= found.seconds:
            continue  # not searched, since no plan of it could be chosen
        search = _Search(variant, device, room)
        fastest = fastest or search.front.best()[0].seconds
        if search.fits and (found is None or search.seconds < found.seconds):
            found = search
        if lowest is None or search.lowest_peak < lowest.lowest_peak:
            lowest = search
    if found is None:
        assert lowest is not None  # there is one variant at least
        raise BudgetError(_infeasible(lowest, plain, limit, budget))
    count = found.write(joint)
    special = found.special
    streamed = special if isinstance(special, Streamed) else None
    offloaded = special if isinstance(special, Offloaded) else None
    return Fit(
        found.candidate,
        found.peak + around.held_bytes,
        plain,
        limit,
        found.seconds / fastest if fastest else 1.0,
        count,
        streamed.regions if streamed is not None else 0,
        found.variant.inverted,
        found.variant.blocks,
        offloaded.count if offloaded is not None else 0,
        offloaded.bytes if offloaded is not None else 0,
    )


class _Search:
    """The fastest plan of one variant of a graph that fits into some room.

    Attributes:
        best: the front of the variant.
        fits: whether any plan does; if none does, `candidate` is the one with the lowest peak.
        special: the plan that is rewritten once more, if that is the fastest one.
    """

    def __init__(self, variant: Variant, device: Device, room: int) -> None:
        self.variant = variant
        self.front = Front(variant.joint, device, stored=True)
        self.best = self.front.leanest()
        self.peaks = {id(c): c.peak for c in self.best}
        fitting = next((c for c in self.best if self._peak_within(c, room) <= room), None)
        than = fitting.seconds if fitting is not None else float("inf")
        self.ways = streaming(self.front), offloading(self.front)
        special: Rewritten | None = None
        for way in self.ways:
            special = way.fastest(room, special.seconds if special else than) or special
        self.special = special
        self.fits = fitting is not None or special is not None
        if special is not None:  # its candidate need not be one of the leanest
            self.candidate, self.peak = special.candidate, special.peak
            self.seconds = special.seconds
        else:
            self.candidate = fitting or min(self.best, key=lambda c: self.peaks[id(c)])
            self.peak = self.peaks[id(self.candidate)]
            self.seconds = self.candidate.seconds

    @property
    def lowest_peak(self) -> int:
        """Of the plans whose regions are taken as a whole."""
        return min(self.peaks.values())

    def write(self, joint: JointGraph) -> int:
        """Writes the plan into the graph; returns how many nodes run again."""
        self.variant.write(joint)
        choice = same_choice(self.candidate.choice, self.variant.joint, joint)
        schedule = Rebuilder(joint).schedule(choice)
        assert schedule is not None  # it was simulated
        count = write(joint, schedule)
        if self.special is not None:
            self.special.write(joint)
        return count

    def _peak_within(self, candidate: Candidate, room: int) -> int:
        """The peak of a plan; what offers take is known once they are written."""
        if candidate.peak <= room and _takes_offers(self.front, candidate):
            self.peaks[id(candidate)] = _peak_when_written(self.variant.joint, candidate.choice)
        return self.peaks[id(candidate)]


def _plain(joint: JointGraph) -> Schedule:
    schedule = Rebuilder(joint).schedule(Choice(frozenset(read_directly(joint))))
    assert schedule is not None  # nothing runs twice but what passes placed there
    return schedule


def _least_seconds(joint: JointGraph, device: Device) -> float:
    """What no plan of a graph can be faster than: nothing runs again but what passes ask for."""
    return sum(node_seconds(t.node, device) for t in _plain(joint).tasks)


def _takes_offers(front: Front, candidate: Candidate) -> bool:
    return any(t.offered for t in front.schedule(candidate).tasks)


def _peak_when_written(joint: JointGraph, choice: Choice) -> int:
    return simulate(schedule_of(written_copy(joint, choice))).peak


def _infeasible(search: _Search, plain: int, limit: int, budget: Budget) -> str:
    front, candidate, peak = search.front, search.candidate, search.peak
    liveness = front.simulate(front.schedule(candidate))
    for way in search.ways:
        lowest = way.lowest(peak)
        if lowest is not None:
            peak = lowest.peak
            liveness = simulate(schedule_of(lowest.written_copy(front.joint)))
    held = front.joint.surroundings.held_bytes
    reached = int((peak + held) / (1 - front.joint.surroundings.slack))
    node = liveness.peak_node
    share = f" ({budget} of the plain peak)" if budget.fraction is not None else ""
    lines = [
        f"no plan keeps this step under {human(limit)}{share}: the smallest peak that can be "
        f"reached is {human(reached)} ({reached} bytes, {reached / plain:.2f} of the plain "
        f"{human(plain)}), at {node.name} ({location(node)}). Alive there:",
        listed(alive_rows(liveness)),
    ]
    if is_for_loss(node):
        allowed = human(liveness.workspace()[liveness.peak_task])
        lines.append(
            f"    {allowed} allowed for a loss computed outside of the model; a model that returns "
            "its loss needs none"
        )
    reserved = front.joint.surroundings.reserved_bytes
    if held > reserved:
        others = human(held - reserved)
        lines.append(f"    {others} held by the model's other graphs (see docs/memory-budget)")
    if reserved:
        lines.append(f"    {human(reserved)} reserved, as for the optimizer's state")
    lines.append(f"  Ask for memory='{-(-reached // 1024)}KiB' or more, or make the batch smaller.")
    return "\n".join(lines)
