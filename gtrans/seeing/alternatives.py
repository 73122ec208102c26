"""The plans that a step could have had: peak memory against predicted time, and the one it has."""

from dataclasses import dataclass

from gtrans.analysis.cost import Device, device_of, node_seconds
from gtrans.analysis.liveness import simulate
from gtrans.analysis.schedule import schedule_of
from gtrans.ir.joint import JointGraph
from gtrans.plan.front import Front


@dataclass(frozen=True)
class Alternative:
    """One plan of one graph.

    Attributes:
        label: how it came about.
        peak: bytes at its peak, with what the model's other graphs hold.
        seconds: predicted time of forward and backward.
        saved: how many values it keeps.
    """

    label: str
    peak: int
    seconds: float
    saved: int


@dataclass(frozen=True)
class Alternatives:
    """The plans worth having for one graph, fastest first, and the one that was chosen."""

    graph: int
    device: str
    chosen: Alternative
    others: tuple[Alternative, ...]


def alternatives(
    index: int, unplanned: JointGraph, planned: JointGraph, device: Device | None = None
) -> Alternatives:
    """Searches the plans of a graph as a memory budget would, whether or not there is one.

    Args:
        index: number of the graph.
        unplanned: the graph right before the plan; it is not changed.
        planned: the same with its plan written into it.
        device: what to predict times for; the one of the tensors if it is not given.
    """
    device = device or device_of(unplanned)
    held = unplanned.surroundings.held_bytes
    others = tuple(
        Alternative(c.label, c.peak + held, c.seconds, len(c.choice.save))
        for c in Front(unplanned, device).best()
    )
    schedule = schedule_of(planned)
    chosen = Alternative(
        "the plan of this step",
        simulate(schedule).peak + held,
        sum(node_seconds(t.node, device) for t in schedule.tasks if t.node.op == "call_function"),
        len(schedule.cut),
    )
    return Alternatives(index, device.name, chosen, others)
