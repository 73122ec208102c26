"""All the plans worth having for one graph: the front of peak memory against time.

Candidates, each turned into a schedule, simulated for its true peak and timed by the roofline:

1. Plain: what autograd keeps.
2. Minimum cuts over a sweep of the price of a second of recomputation, with growing classes of
   operators that may run again: pointwise and row-wise; everything but draws, effects, collectives;
   the same with products dear and all else next to free.
3. Segments between narrow places of the forward: only what crosses them is kept, or besides it
   what is dear to compute again. Inside a segment that is computed again all values wait for their
   reader, or only those that autograd would save and are dear.
4. Mixtures of these, another one for every segment, by a dynamic program over the chain of segments
   (`gtrans.plan.chain`) for a range of peaks.
5. Local search: a value that is alive at the peak is saved no longer, or let go of there and
   computed again for its next reader; or a value that costs most to compute again is saved. In a
   small graph every value is tried.

The list does not depend on any budget, so that a larger budget never gives a slower plan.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import NamedTuple, TypeVar

from torch import fx

from gtrans.analysis.cost import Device, node_flops, node_seconds
from gtrans.analysis.liveness import Liveness, simulate
from gtrans.analysis.schedule import Schedule, Task
from gtrans.analysis.workspace import workspaces
from gtrans.errors import PlanError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan import store
from gtrans.plan.chain import Chain, Option
from gtrans.plan.choose import DEARER, fastest, leanest
from gtrans.plan.cut import Cutter, read_directly
from gtrans.plan.rebuild import Candidate, Choice, Rebuilder
from gtrans.plan.waists import Waists

_T = TypeVar("_T")

Weight = Callable[[fx.Node], float | None]
"""Seconds that a node counts for if it runs again; None forbids it."""

_SEGMENTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
# Prices of a second of recomputation, in saved bytes, relative to (bytes autograd keeps) / (seconds
# of the forward).
_PRICES = (0.02, 0.1, 0.3, 0.6, 1.0, 1.6, 2.5, 4.0)
_INNER_PRICES = (0.001, 0.3)
# What seconds count for that are not spent on products, where these are to be avoided.
_LEAN = 0.05
# The dynamic program: segments, options, and how many peaks it is asked for.
_LENGTH, _OPTIONS, _ROOMS = 48, 24, 30
# Neighbours on the front that are mixed in the end, in how many parts, and how many tries it takes.
_GAPS, _PARTS, _TRIES = 8, 4, 9
# Share of the simulations that cuts and segments may use up.
_SHARE = 0.5
# Readers of one recomputed value that are this many backward nodes apart share it.
_WINDOW = 8
# Simulations: so many tasks in all, but not fewer or more simulations than this.
_TASKS, _FEWEST, _MOST = 2_000_000, 70, 320
# Graphs of so few forward operators are searched further, with so many simulations.
_SMALL, _MANY = 12, 600


class _Uniform(NamedTuple):
    """A minimum cut of the whole graph, and how what it recomputes may wait."""

    label: str
    weight: Weight
    price: float
    crossing: frozenset[fx.Node]
    hold: frozenset[fx.Node]
    boundaries: tuple[int, ...]


class Front:
    """Finds the candidates of one graph and keeps those that no other one beats.

    Args:
        joint: the graph, not changed.
        device: what to predict times for.
        stored: whether to look the front up on disk before searching, and to write it there.
    """

    def __init__(self, joint: JointGraph, device: Device, *, stored: bool = False) -> None:
        self.joint = joint
        self.device = device
        self.rebuilder = Rebuilder(joint)
        self._cutter = Cutter(joint)
        self.candidates: list[Candidate] = []
        self._seconds = {n: node_seconds(n, device) for n in joint.nodes if n.op == "call_function"}
        self._offer_seconds = {
            n: o.passes_over_memory * tensor_bytes(n.meta["val"]) / device.bytes_per_s
            + device.launch_s
            for n, o in joint.offers.items()
        }
        self._dear: dict[fx.Node, float] = {}
        self._workspaces = workspaces((*self._seconds, *joint.tangents))
        self._tried: set[Choice] = set()
        self._plain = frozenset(read_directly(joint))
        self.waists = Waists(joint, self._plain)
        nodes = max(1, len(joint.graph.nodes))
        self._values = [n for n in self._seconds if joint.is_forward(n) and _is_savable(n)]
        self.is_small = len(self._values) <= _SMALL
        most = _MANY if self.is_small else _MOST
        self.left = max(_FEWEST, min(most, _TASKS // (2 * nodes)))
        key = store.key_of(joint, (self._seconds, self._offer_seconds, self._workspaces))
        known = store.load(joint, key) if stored else None
        if known:
            self.candidates = known
            return
        self._search()
        if stored:
            store.save(joint, key, dict.fromkeys((*self.best(), *self.leanest())))

    def best(self) -> list[Candidate]:
        """The candidates that no other beats in both peak and time, fastest first."""
        return fastest(self.candidates)

    def leanest(self) -> list[Candidate]:
        """Candidates that are about as fast, and run fewer products again; fastest first."""
        return leanest(self.candidates)

    def schedule(self, candidate: Candidate) -> Schedule:
        """The schedule of a candidate."""
        schedule = self.rebuilder.schedule(candidate.choice)
        assert schedule is not None  # it was simulated
        return schedule

    def simulate(self, schedule: Schedule) -> Liveness:
        """The memory of a schedule of this graph."""
        return simulate(schedule, self._workspaces)

    def seconds(self, schedule: Schedule) -> float:
        """Predicted time of a schedule."""
        return sum(map(self._task_seconds, schedule.tasks))

    # ------------------------------------------------------------------ candidates

    def _search(self) -> None:
        self._dear = self._shares_of_products()
        self._try("plain", Choice(self._plain))
        rate = sum(self._plain_bytes()) / max(sum(self._forward_seconds()), 1e-9)
        cheap = self._cut(self._rowwise, 0.3 * rate)
        held = frozenset((*cheap, *self._plain_dear()))
        self._uniform(held, rate)
        segments = Chain(self.joint, self.waists, self.waists.boundaries(_LENGTH))
        if segments.length > 1:
            self._mixtures(segments)
            self._local_search(self.left // 2)
            self._between(segments)
        self._local_search()

    def _uniform(self, held: frozenset[fx.Node], rate: float) -> None:
        """Tries cuts and segments, or evenly spread ones of them where simulations are dear."""
        found = [*self._cuts(held, rate), *self._segments(held, rate)]
        for label, weight, price, crossing, hold, at in _spread(
            found, int(self.left * _SHARE) // 2
        ):
            save = self._cut(weight, price, crossing)
            self._try(label, Choice(save, hold, _WINDOW), at)
            self._try(label, Choice(save), at)

    def _cuts(self, held: frozenset[fx.Node], rate: float) -> Iterator[_Uniform]:
        classes: dict[str, Weight] = {
            "row-wise": self._rowwise,
            "all": self._seconds.__getitem__,
            "lean": self._lean,
        }
        for name, weight in classes.items():
            hold = frozenset() if name == "row-wise" else held
            for price in _PRICES:
                label = f"{name} operators at price {price:g}"
                yield _Uniform(label, weight, price * rate, frozenset(), hold, ())

    def _segments(self, held: frozenset[fx.Node], rate: float) -> Iterator[_Uniform]:
        seen: set[tuple[int, ...]] = set()
        for count in _SEGMENTS:
            at = self.waists.boundaries(count)
            if not at or at in seen:
                continue
            seen.add(at)
            crossing = frozenset(v for p in at for v in self.waists.values_at(p))
            for price in _INNER_PRICES:
                label = f"{len(at) + 1} segments at price {price:g}"
                yield _Uniform(label, self._seconds.__getitem__, price * rate, crossing, held, at)

    def _mixtures(self, segments: Chain) -> None:
        options = [self._option(segments, c) for c in self._options()]
        constants = self.simulate(self.schedule(self.candidates[0])).constant_bytes
        for room, clock in self._rooms(min(_ROOMS, self.left // 2)):
            found = segments.solve(options, room - constants, clock)
            if found is not None:
                used = len(set(found))
                label = f"{segments.length} segments of {used} kinds"
                self._try(label, segments.mixed(options, found))

    def _rooms(self, count: int) -> Iterator[tuple[float, int]]:
        """Peaks to aim at, and whether seconds (0) or the cost (1) is to be least.

        The lower, the closer to one another.
        """
        lowest = 0.8 * min(c.peak for c in self.candidates)
        ratio = self.candidates[0].peak / lowest
        for i in range(count):
            room = lowest * ratio ** (i / count)
            yield room, 0
            if i % 3 == 0:
                yield room, 1

    def _between(self, segments: Chain) -> None:
        """Tries mixtures of neighbours on the front, where it has the widest gaps."""
        constants = self.simulate(self.schedule(self.candidates[0])).constant_bytes
        pairs = sorted(
            pairwise(self.leanest()),
            key=lambda pair: (pair[1].peak - pair[0].peak) * (pair[1].cost - pair[0].cost),
        )
        for pair in pairs[: max(1, min(_GAPS, self.left // _TRIES))]:
            high, low = pair
            options = [self._option(segments, c) for c in pair]
            for part in (0.75, 0.5, 0.25):
                room = low.peak + part * (high.peak - low.peak) - constants
                found = segments.solve(options, room, 1)
                if found is not None:
                    label = f"{segments.length} segments of two kinds"
                    self._try(label, segments.mixed(options, found))
            for position in self.waists.boundaries(_PARTS):
                for first, then in (pair, pair[::-1]):
                    joined = self._joined(first.choice, then.choice, position)
                    self._try(f"two kinds, split at {position}", joined)

    def _joined(self, first: Choice, then: Choice, position: int) -> Choice:
        """One choice up to a position of the forward, another one after it."""

        def either(one: frozenset[fx.Node], other: frozenset[fx.Node]) -> frozenset[fx.Node]:
            early = {n for n in one if self._at(n) <= position}
            return frozenset(early.union(n for n in other if self._at(n) > position))

        everything = frozenset(self.waists.nodes)
        holds = [everything if c.hold is None else c.hold for c in (first, then)]
        hold = None if first.hold is None and then.hold is None else either(*holds)
        window = max(first.window, then.window)
        return Choice(either(first.save, then.save), hold, window)

    def _options(self) -> list[Candidate]:
        """The candidates to mix: the front first, then those that are near it."""
        count = max(8, min(_OPTIONS, self.left // 2))  # to take one apart takes as long as a try
        front = [*_spread(self.best(), count // 2), *_spread(self.leanest(), count // 4)]
        return list(dict.fromkeys((*front, *self._near_front())))[:count]

    def _near_front(self) -> list[Candidate]:
        """The candidates that another one beats, the closest ones first."""
        front = self.best()
        rest = [c for c in self.candidates if c not in front]
        rest.sort(key=lambda c: min(max(c.peak / f.peak, c.seconds / f.seconds) for f in front))
        return rest

    def _option(self, segments: Chain, candidate: Candidate) -> Option:
        schedule = self.schedule(candidate)
        return segments.option(
            candidate.choice,
            schedule,
            self.simulate(schedule),
            (self._task_seconds, self._task_cost),
        )

    def _local_search(self, until: int = 0) -> None:
        """Tries what differs little from a plan of the front, until so many tries are left."""
        tried: set[Choice] = set()
        while self.left > until:
            front = dict.fromkeys((*self.best(), *self.leanest()))
            fresh = [c for c in front if c.choice not in tried]
            if not fresh and self.is_small:
                fresh = [c for c in self._near_front() if c.choice not in tried][:8]
            if not fresh:
                return
            for c in _spread(fresh, 8):
                if self.left <= until:
                    return
                tried.add(c.choice)
                for choice in chain(self._moves(c), self._flips(c) if self.is_small else ()):
                    self._try(
                        c.label.removesuffix(", improved") + ", improved", choice, c.boundaries
                    )

    def _moves(self, candidate: Candidate) -> Iterator[Choice]:
        choice, schedule = candidate.choice, self.schedule(candidate)
        liveness = self.simulate(schedule)
        alive = liveness.alive()
        saved = [
            a.node for a in alive if a.role == "saved" and not self.rebuilder.must_save(a.node)
        ]
        for node in saved[:3]:
            like = sorted(n for n in saved if _kind(n) == _kind(node))
            yield replace(choice, save=choice.save - {node})
            for count in sorted({-(-len(like) // 2), len(like)} - {1}):
                yield replace(choice, save=choice.save.difference(like[:count]))
        waiting = [a.node for a in alive if a.role == "recomputed"]
        hold = frozenset(t.node for t in schedule.again) if choice.hold is None else choice.hold
        for node in waiting[:2]:
            if node in hold:
                yield replace(choice, hold=hold - {node})
            elif choice.window:
                yield replace(choice, hold=hold, window=0)
        again = sorted(
            {t.node for t in schedule.again if _is_savable(t.node)},
            key=lambda n: -self._per_byte(n),
        )
        for dearest in again[:1]:
            same = [n for n in again if _kind(n) == _kind(dearest)]
            for count in sorted({1, -(-len(same) // 2), len(same)}):
                yield replace(choice, save=choice.save.union(same[:count]))
        position = _position_of_peak(liveness)
        if position is not None:
            for node in [*saved, *waiting][: None if self.is_small else 2]:
                yield replace(choice, dropped=choice.dropped | {(node, position)})

    def _flips(self, candidate: Candidate) -> Iterator[Choice]:
        """Every choice that differs by one value, or by how long values wait."""
        choice = candidate.choice
        hold = frozenset(self._values) if choice.hold is None else choice.hold
        for node in self._values:
            yield replace(choice, save=choice.save ^ {node})
            yield replace(choice, hold=hold ^ {node})
        for window in (0, 1, 2, _WINDOW):
            yield replace(choice, hold=hold, window=window)
        for position in range(1, len(self.rebuilder.backward)):
            for node in self._values:
                yield replace(choice, dropped=choice.dropped ^ {(node, position)})

    def _try(self, label: str, choice: Choice, boundaries: tuple[int, ...] = ()) -> None:
        if choice in self._tried or (self.left <= 0 and self.candidates):
            return
        self._tried.add(choice)
        self.left -= 1
        try:
            schedule = self.rebuilder.schedule(choice)
        except PlanError:  # a cycle through an offer: not a plan
            return
        if schedule is not None:
            peak = self.simulate(schedule).peak
            self.candidates.append(
                Candidate(
                    label, choice, peak, self.seconds(schedule), self._cost(schedule), boundaries
                )
            )

    def _cut(
        self, weight: Weight, price: float, crossing: frozenset[fx.Node] = frozenset()
    ) -> frozenset[fx.Node]:
        def cost(node: fx.Node) -> float | None:
            if node in crossing:
                return None
            if node in self._offer_seconds:
                return price * self._offer_seconds[node]
            seconds = weight(node)
            return None if seconds is None else price * seconds

        return frozenset(self._cutter.cut(cost))

    # ------------------------------------------------------------------ figures

    def _task_seconds(self, task: Task) -> float:
        if task.offered:
            return self._offer_seconds[task.node]
        return self._seconds.get(task.node, 0.0)

    def _shares_of_products(self) -> dict[fx.Node, float]:
        """Of every product its share of the flops of the plain step, in seconds of that step."""
        flops = {n: node_flops(n) for n in self._seconds if ops.is_contraction(n)}
        plain = self.rebuilder.schedule(Choice(self._plain))
        assert plain is not None  # nothing runs twice but what passes placed there
        seconds = self.seconds(plain) / max(1, sum(flops.get(t.node, 0) for t in plain.tasks))
        return {n: f * seconds for n, f in flops.items()}

    def _per_byte(self, node: fx.Node) -> float:
        cost = self._seconds[node] + self._dear.get(node, 0.0)
        return cost / max(1, tensor_bytes(node.meta["val"]))

    def _task_cost(self, task: Task) -> float:
        dear = 0.0 if task.offered else self._dear.get(task.node, 0.0)
        return self._task_seconds(task) + DEARER * dear

    def _cost(self, schedule: Schedule) -> float:
        dear = sum(self._dear.get(t.node, 0.0) for t in schedule.again if not t.offered)
        return self.seconds(schedule) + DEARER * dear

    def _lean(self, node: fx.Node) -> float:
        return self._dear.get(node, _LEAN * self._seconds[node])

    def _rowwise(self, node: fx.Node) -> float | None:
        cheap = _is_cheap(node) or node.target in ops.ROWWISE
        return self._seconds[node] if cheap else None

    def _plain_bytes(self) -> Iterator[int]:
        for n in self._plain:
            if n.op == "call_function":
                yield tensor_bytes(n.meta["val"])

    def _forward_seconds(self) -> Iterator[float]:
        return (s for n, s in self._seconds.items() if self.joint.is_forward(n))

    def _plain_dear(self) -> Iterator[fx.Node]:
        """What autograd keeps and is no cheap operator's result."""
        return (n for n in self._plain if not _is_cheap(_maker(n)))

    def _at(self, node: fx.Node) -> int:
        return self.waists.position.get(node, -1)


def _position_of_peak(liveness: Liveness) -> int | None:
    """The number of the backward node that runs at the peak, or for which something runs again."""
    schedule, at = liveness.schedule, liveness.peak_task
    if at < schedule.boundary:
        return None
    before = schedule.tasks[schedule.boundary : at]
    return sum(t.node.op == "call_function" and not t.again for t in before)


def _spread(items: Sequence[_T], count: int) -> list[_T]:
    """Some items of a list, evenly spread, the last one among them."""
    if len(items) <= count:
        return list(items)
    return [items[-1 - i * len(items) // count] for i in range(count)][::-1]


def _maker(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if ops.is_getitem(node) else node


def _is_cheap(node: fx.Node) -> bool:
    return ops.is_pointwise(node) or ops.is_fill(node) or node.target in ops.COPIES


def _is_savable(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return hasattr(val, "element_size") and not ops.is_view(node)


def _kind(node: fx.Node) -> tuple[object, ...]:
    val = node.meta.get("val")
    source = _maker(node)
    return source.target, tuple(map(str, getattr(val, "shape", ()))), len(source.args)
