"""Choose the fastest plan whose true peak stays under a budget, or say that there is none.

    plan(budget) = argmin seconds over { c in front : peak(c) + held elsewhere <= budget }

The front does not depend on the budget, so peak and predicted time are monotone in it. The peak
that counts is the one of the graph with the plan written into it; where a plan takes an offer of a
pass, whose function is only known then, it is checked on a copy first.
"""

from dataclasses import dataclass

from torch import fx

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
    """

    candidate: Candidate
    peak: int
    plain_peak: int
    limit: int
    slowdown: float
    count: int


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
    smallest: tuple[int, Candidate] | None = None
    for candidate in best:
        peak = candidate.peak
        if peak + around.held_bytes <= limit and any(
            t.offered for t in front.schedule(candidate).tasks
        ):
            peak = _peak_when_written(joint, candidate.choice)
        if smallest is None or peak < smallest[0]:
            smallest = (peak, candidate)
        if peak + around.held_bytes <= limit:
            count = write(joint, front.schedule(candidate))
            return Fit(
                candidate,
                peak + around.held_bytes,
                plain,
                limit,
                candidate.seconds / best[0].seconds if best[0].seconds else 1.0,
                count,
            )
    assert smallest is not None  # plain is always among them
    raise BudgetError(_infeasible(front, smallest[1], smallest[0], plain, limit, budget))


def _peak_when_written(joint: JointGraph, choice: Choice) -> int:
    twin = joint.copy()
    same = dict(zip(joint.nodes, twin.nodes, strict=True))

    def mapped(nodes: frozenset[fx.Node]) -> frozenset[fx.Node]:
        return frozenset(same[n] for n in nodes)

    hold = None if choice.hold is None else mapped(choice.hold)
    schedule = Rebuilder(twin).schedule(Choice(mapped(choice.save), hold, choice.window))
    assert schedule is not None  # as for the original
    write(twin, schedule)
    return simulate(schedule_of(twin)).peak


def _infeasible(
    front: Front, candidate: Candidate, peak: int, plain: int, limit: int, budget: Budget
) -> str:
    liveness = front.simulate(front.schedule(candidate))
    held = front.joint.surroundings.held_bytes
    reached = peak + held
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
