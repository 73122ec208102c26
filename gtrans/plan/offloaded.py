"""Plans that let saved values wait in the host's memory, where the way there costs no time.

    forward     | v made ...... v read for the last time | ......    | first read of v |   backward
    to host          [== n / BW ==]
    to device                                       [== n / BW ==]

A value of n bytes may go if what is computed between its last use in the forward and its first one
in the backward takes at least 2 n / BW, and if both copies find room in two queues, one for each
direction: copies out as early as they can, in the order in which values are made; copies back as
late as they can, in the order in which values are wanted. Then nothing waits for them, so such a
plan takes as long as the one it is made from.

Source: the rule of DeepSpeed's and torch's offloading of activations, with queues instead of a sum.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from torch import fx

from gtrans.analysis.cost import Device, node_seconds
from gtrans.analysis.liveness import simulate
from gtrans.analysis.schedule import Schedule, schedule_of
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan.front import Front
from gtrans.plan.rebuild import Candidate
from gtrans.plan.rewritten import Rewritten, Way, written_copy
from gtrans.rewrite.to_host import Trip, send_to_host

# Smaller values are not worth a copy of their own.
LEAST_BYTES = 1 << 20
# Shares of what may go, tried from the first to the last: no more is copied than has to be.
_SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Offloaded(Rewritten):
    """A plan of the front, with some of its saved values on the host.

    Attributes:
        count: how many values.
        bytes: of all of them.
        device: what copies were planned for.
        share: how much of what may go to the host goes.
    """

    count: int
    bytes: int
    device: Device
    share: float

    def write(self, joint: JointGraph) -> None:
        """Sends the values to the host, in a graph that has the plan written into it already."""
        send_to_host(joint, hidden_trips(joint, self.device, LEAST_BYTES, self.share))


def offloading(front: Front) -> Way[Offloaded]:
    """The plans of a front with values on the host; none where the device has no host."""
    return Way(
        front,
        front.best() if front.device.host_bytes_per_s else (),
        ("saved",),
        lambda candidate: offloaded_plans(front.joint, candidate, front.device),
    )


def offloaded_plans(joint: JointGraph, candidate: Candidate, device: Device) -> Iterator[Offloaded]:
    """A plan with more and more of its saved values on the host, each with a lower peak."""
    lowest, seen = candidate.peak, 0
    for share in _SHARES:
        twin = written_copy(joint, candidate.choice)
        trips = hidden_trips(twin, device, LEAST_BYTES, share)
        if len(trips) <= seen:
            continue
        seen = len(trips)
        size = sum(tensor_bytes(t.value.meta["val"]) for t in trips)
        send_to_host(twin, trips)
        peak = simulate(schedule_of(twin)).peak
        if peak < lowest:
            lowest = peak
            yield Offloaded(candidate, peak, candidate.seconds, seen, size, device, share)


def hidden_trips(
    joint: JointGraph, device: Device, least_bytes: int, share: float = 1.0
) -> list[Trip]:
    """The trips that hide behind what is computed.

    Args:
        joint: a graph with its plan written into it.
        device: with the bandwidth to its host.
        least_bytes: of a value.
        share: how much of what may go is to go, those that wait longest first.
    """
    clock = _Clock(schedule_of(joint), device)
    found = [s for s in clock.stays() if s.bytes >= least_bytes and s.idle >= 2 * s.copy]
    found.sort(key=lambda s: -s.idle)
    queues, sent = _Queues(clock.begins[clock.schedule.boundary]), 0
    wanted = share * sum(s.bytes for s in found)
    for stay in found:
        if sent >= wanted:
            break
        if queues.take(stay):
            sent += stay.bytes
    return clock.trips(queues)


@dataclass(frozen=True)
class _Stay:
    """A saved value between forward and backward; times in seconds since the step began.

    Attributes:
        value: the node.
        bytes: its size.
        copy: seconds that a copy of it takes.
        made: when it is there.
        left: when the forward has read it for the last time.
        wanted: when the backward first reads it.
    """

    value: fx.Node
    bytes: int
    copy: float
    made: float
    left: float
    wanted: float

    @property
    def idle(self) -> float:
        return self.wanted - self.left


class _Queues:
    """The copies to the host and those back, each one after another.

    Args:
        half: seconds at which the backward begins, and with it the copies back.
    """

    def __init__(self, half: float) -> None:
        self.half = half
        self.by_made: list[_Stay] = []
        self.by_wanted: list[_Stay] = []

    def take(self, stay: _Stay) -> bool:
        """Adds both copies of a value, if there is room for them."""
        insort(self.by_made, stay, key=lambda s: s.made)
        insort(self.by_wanted, stay, key=lambda s: s.wanted)
        if self.fetched() is not None:
            return True
        self.by_made.remove(stay)
        self.by_wanted.remove(stay)
        return False

    def gone(self) -> dict[fx.Node, float]:
        """When each value has arrived on the host."""
        found, free = dict[fx.Node, float](), 0.0
        for s in self.by_made:
            free = found[s.value] = max(free, s.made) + s.copy
        return found

    def fetched(self) -> dict[fx.Node, float] | None:
        """When each copy back starts; None if one would have to before the value has left."""
        gone, found, busy = self.gone(), dict[fx.Node, float](), inf
        for s in reversed(self.by_wanted):
            busy = found[s.value] = min(busy, s.wanted) - s.copy
            if busy < max(gone[s.value], self.half):
                return None
        return found


class _Clock:
    """When each task of a schedule begins, if nothing waits for copies."""

    def __init__(self, schedule: Schedule, device: Device) -> None:
        self.schedule = schedule
        self.bandwidth = device.host_bytes_per_s
        self.ends = list(accumulate(node_seconds(t.node, device) for t in schedule.tasks))
        self.begins = [0.0, *self.ends[:-1]]

    def stays(self) -> Iterator[_Stay]:
        """The saved values that could go: those that own their memory and are no output."""
        schedule, half = self.schedule, self.schedule.boundary
        cut, first = set(schedule.cut), self._fetch(0.0)
        readers: dict[fx.Node, list[int]] = {}
        owner_of = [t.node for t in schedule.tasks]
        for number, task in enumerate(schedule.tasks):
            for read in task.reads:
                readers.setdefault(owner_of[read], []).append(number)
        kept = {ops.storage_of(owner_of[k]) for k in schedule.kept if k < half}
        for number, task in enumerate(schedule.tasks[:half]):
            value = task.node
            if value not in cut or value.op != "call_function" or value in kept:
                continue
            if not value < first:
                continue  # part of a derivative: it is made late, whatever the schedule says
            if ops.storage_of(value) is not value or self._has_saved_views(value, cut):
                continue
            early = [r for r in self._all_readers(value, readers) if r < half]
            late = [r for r in readers.get(value, []) if r >= half]
            if late:
                size = tensor_bytes(value.meta["val"])
                yield _Stay(
                    value, size, size / self.bandwidth, self.ends[number],
                    max((self.ends[r] for r in early), default=self.ends[number]),
                    self.begins[min(late)],
                )  # fmt: skip

    def trips(self, queues: "_Queues") -> list[Trip]:
        """Where each value leaves and comes back."""
        gone, fetched = queues.gone(), queues.fetched()
        assert fetched is not None  # only what finds room was taken
        return [
            Trip(s.value, self._let_go(max(gone[s.value], s.left)), self._fetch(fetched[s.value]))
            for s in queues.by_wanted
        ]

    def _let_go(self, moment: float) -> fx.Node:
        """The first node that begins at a moment or later; of the backward if there is none."""
        number = bisect_left(self.begins, moment, hi=self.schedule.boundary)
        tasks = self.schedule.tasks
        return next(t.node for t in tasks[number:] if t.node.op == "call_function")

    def _fetch(self, moment: float) -> fx.Node:
        """The last node of the backward that begins at a moment or earlier."""
        half, tasks = self.schedule.boundary, self.schedule.tasks
        number = max(half, bisect_right(self.begins, moment, lo=half) - 1)
        while tasks[number].node.op != "call_function":
            number += 1
        return tasks[number].node

    def _all_readers(self, value: fx.Node, readers: dict[fx.Node, list[int]]) -> list[int]:
        """The tasks that read a value or a view of it."""
        found: list[int] = []
        pending = [value]
        while pending:
            node = pending.pop()
            found += readers.get(node, [])
            pending += [u for u in node.users if ops.is_view(u) or ops.is_getitem(u)]
        return found

    def _has_saved_views(self, value: fx.Node, cut: set[fx.Node]) -> bool:
        pending = [u for u in value.users if ops.is_view(u)]
        while pending:
            node = pending.pop()
            if node in cut:
                return True
            pending += [u for u in node.users if ops.is_view(u) or ops.is_getitem(u)]
        return False
