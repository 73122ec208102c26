"""Choose the fastest plan whose true peak stays under a budget, or say that there is none.

    plan(budget) = argmin seconds over { c in front : peak(c) + held elsewhere <= budget }

The front does not depend on the budget, so peak and predicted time are monotone in it. The peak
that counts is the one of the graph with the plan written into it; where a plan takes an offer of a
pass, whose function is only known then, it is checked on a copy first. Where a plan of the front
fits but is not the fastest one, a faster one that fits with its wide regions taken by rows (see
`gtrans.plan.streamed`) is preferred to it.
"""

from dataclasses import dataclass

from gtrans.analysis.cost import Device
from gtrans.analysis.liveness import Liveness, simulate
from gtrans.analysis.schedule import schedule_of
from gtrans.errors import BudgetError
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import human
from gtrans.ir.source import location
from gtrans.memory import Budget
from gtrans.plan.alive import alive_rows, listed
from gtrans.plan.cut import read_directly
from gtrans.plan.front import Front
from gtrans.plan.realise import write
from gtrans.plan.rebuild import Candidate, Choice, Rebuilder
from gtrans.plan.streamed import fastest_streamed, streamed_plans, take_by_rows, written_copy


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
    """

    candidate: Candidate
    peak: int
    plain_peak: int
    limit: int
    slowdown: float
    count: int
    regions: int = 0


def plain_liveness(joint: JointGraph) -> Liveness:
    """The memory of a graph as autograd would run it: everything the backward reads is saved."""
    schedule = Rebuilder(joint).schedule(Choice(frozenset(read_directly(joint))))
    assert schedule is not None  # nothing runs twice but what passes placed there
    return simulate(schedule)


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
    front = Front(joint, device, stored=True)
    best = front.best()
    room = int(limit * (1 - around.slack)) - around.held_bytes
    peaks = {id(c): c.peak for c in best}
    fitting: Candidate | None = None
    for candidate in best:
        if candidate.peak <= room and _takes_offers(front, candidate):
            peaks[id(candidate)] = _peak_when_written(joint, candidate.choice)
        if peaks[id(candidate)] <= room:
            fitting = candidate
            break
    than = fitting.seconds if fitting is not None else float("inf")
    streamed = fastest_streamed(front, room, than, device)
    if streamed is not None:
        fitting, peak, seconds = streamed.candidate, streamed.peak, streamed.seconds
    elif fitting is not None:
        peak, seconds = peaks[id(fitting)], fitting.seconds
    else:
        lowest = min(best, key=lambda c: peaks[id(c)])
        raise BudgetError(_infeasible(front, lowest, peaks[id(lowest)], plain, limit, budget))
    count = write(joint, front.schedule(fitting))
    for _ in range(streamed.rounds if streamed is not None else 0):
        take_by_rows(joint)
    return Fit(
        fitting,
        peak + around.held_bytes,
        plain,
        limit,
        seconds / best[0].seconds if best[0].seconds else 1.0,
        count,
        streamed.regions if streamed is not None else 0,
    )


def _takes_offers(front: Front, candidate: Candidate) -> bool:
    return any(t.offered for t in front.schedule(candidate).tasks)


def _peak_when_written(joint: JointGraph, choice: Choice) -> int:
    return simulate(schedule_of(written_copy(joint, choice))).peak


def _infeasible(
    front: Front, candidate: Candidate, peak: int, plain: int, limit: int, budget: Budget
) -> str:
    liveness = front.simulate(front.schedule(candidate))
    for streamed in streamed_plans(front.joint, candidate, front.device):
        if streamed.peak < peak:
            peak = streamed.peak
            liveness = simulate(schedule_of(streamed.written_copy(front.joint)))
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
    if held:
        lines.append(f"    {human(held)} held by the model's other graphs (see docs/memory-budget)")
    lines.append(f"  Ask for memory='{-(-reached // 1024)}KiB' or more, or make the batch smaller.")
    return "\n".join(lines)
