"""What one step of a Python loop over time holds, whole: its loops and all that is between them.

    for t in range(T):  a = neuron(a, first(x)); b = neuron(b, second(a)); total += last(b)

Each neuron is a loop of its own, see `gtrans.analysis.loops`; a stage is one loop whose body is
`first` to `last`. It hands over what its loops do and nothing more: a running sum stays outside.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from gtrans.analysis.loops import CALLS, Loop, alike, find_loops, loop_of
from gtrans.ir.forward import ForwardGraph


@dataclass(frozen=True)
class Stage:
    """Several loops that run step by step beside one another.

    Attributes:
        whole: as one loop.
        parts: the loops, and which of its steps is the first of the whole.
    """

    whole: Loop
    parts: tuple[tuple[Loop, int], ...]

    @property
    def ahead(self) -> int:
        """How many steps run before the first of the whole."""
        return max(first + loop.begun for loop, first in self.parts)

    @property
    def length(self) -> int:
        """How many steps the longest of the loops has."""
        return max(loop.length + loop.begun for loop, _ in self.parts)


def find_stages(graph: ForwardGraph, min_steps: int = 4) -> list[Stage]:
    """The stages of a graph, in order; a loop that stands alone is one too.

    Running sums, and steps that read weights of their own, are left out.
    """
    order = [n for n in graph.nodes if n.op in CALLS]
    at = {n: i for i, n in enumerate(order)}
    found = find_loops(graph, min_steps)
    loops = [loop for loop in found if loop.tied and not loop.is_running_sum()]
    groups: list[list[Loop]] = []
    for loop in sorted(loops, key=lambda loop: at[loop.steps[0][0]]):
        for group in groups:
            if _beside(group[0], loop, at, min_steps):
                group.append(loop)
                break
        else:
            groups.append([loop])
    stages: list[Stage] = []
    for group in groups:
        others = {n for loop in found if loop not in group for n in loop.nodes}
        stages += _stages_of(order, at, group, others)
    return stages


def _stages_of(
    order: Sequence[fx.Node], at: dict[fx.Node, int], group: list[Loop], others: set[fx.Node]
) -> list[Stage]:
    """The stage of some loops, of whichever of them comes first in a step; or one of each."""
    best: Stage | None = None
    for first in group:
        loops = [first, *(loop for loop in group if loop is not first)]
        for skip in range(2):  # the first step may be unlike the others around its loops
            stage = _Grown(order, at, loops, others, skip).stage()
            if stage is not None and (best is None or _rows(stage) > _rows(best)):
                best = stage
    return [best] if best is not None else [Stage(loop, ((loop, 0),)) for loop in group]


def _rows(stage: Stage) -> int:
    return len(stage.whole.reads)


def _period(loop: Loop, at: dict[fx.Node, int]) -> int:
    return at[loop.steps[1][0]] - at[loop.steps[0][0]]


def _first(loop: Loop, base: Loop, at: dict[fx.Node, int]) -> int:
    """The step of a loop that runs beside the first step of another of the same period."""
    return -((at[loop.steps[0][0]] - at[base.steps[0][0]]) // _period(base, at))


def _beside(base: Loop, loop: Loop, at: dict[fx.Node, int], min_steps: int) -> bool:
    if _period(base, at) != _period(loop, at):
        return False
    skip = _first(loop, base, at)
    return min(len(base), len(loop) - skip) - max(0, -skip) >= max(2, min_steps - 1)


class _Grown:
    """The stage of some loops: rows of nodes, one a step, grown by what they read and are read by.

    A row is known by the place of its node in the first step; its others are a period later each.
    """

    def __init__(
        self,
        order: Sequence[fx.Node],
        at: dict[fx.Node, int],
        loops: list[Loop],
        others: set[fx.Node],
        skip: int,
    ) -> None:
        self.order, self.at, self.others = order, at, others
        self.period = _period(loops[0], at)
        firsts = [_first(loop, loops[0], at) for loop in loops]
        start = skip + max(0, *(-f for f in firsts))  # the first step that all of them have
        stop = min(len(loop) - f for loop, f in zip(loops, firsts, strict=True))
        self.steps = range(stop - start)
        self.parts = tuple((x, f + start) for x, f in zip(loops, firsts, strict=True))
        self.own = {at[n] for loop, first in self.parts for n in loop.steps[first]}
        self.carried = {
            at[loop.steps[first][place]] for loop, first in self.parts for place in loop.carried
        }

    def stage(self) -> Stage | None:
        """All rows as one loop; None if a step reads the one before by another way."""
        if len(self.steps) < 2:
            return None
        places = self._without_detours(self._grown())
        rows = None if places is None else self._rows(places)
        whole = loop_of(rows) if rows is not None and self._repeat(rows) else None
        return None if whole is None else Stage(replace(whole, tied=True), self.parts)

    def _rows(self, places: Iterable[int]) -> list[list[fx.Node]]:
        inner = sorted(places)
        return [[self.order[p + t * self.period] for p in inner] for t in self.steps]

    def _repeat(self, rows: list[list[fx.Node]]) -> bool:
        return all(alike(rows, t, first=t == 1) for t in self.steps[1:])

    def _grown(self) -> set[int]:
        found = {p % self.period: p for p in self.own}
        pending = sorted(self.own)
        while pending:
            here = self.order[pending.pop() + self.period]
            for node in (*here.all_input_nodes, *here.users):
                place = self.at.get(node, -1) - self.period
                if place % self.period not in found and self._fits(place, found):
                    found[place % self.period] = place
                    pending.append(place)
        return set(found.values())

    def _fits(self, place: int, found: dict[int, int]) -> bool:
        """Whether a row does the same in each step, and hands nothing over but what loops carry."""
        if place < 0 or place + self.steps[-1] * self.period >= len(self.order):
            return False
        column = self._column(place)
        if not self.others.isdisjoint(column) or not self._repeat([[n] for n in column]):
            return False

        def step_of(node: fx.Node) -> tuple[int, int] | None:
            own = found.get(self.at[node] % self.period) if node in self.at else None
            step = -1 if own is None else (self.at[node] - own) // self.period
            return (own, step) if own is not None and step in self.steps else None

        before, here = column[:2]
        if before in here.all_input_nodes:
            return False
        reads = [s for n in here.all_input_nodes if (s := step_of(n)) is not None]
        read_by = [s for n in here.users if (s := step_of(n)) is not None]
        return all(t == 1 or (t == 0 and p in self.carried) for p, t in reads) and all(
            t == 1 for _, t in read_by
        )

    def _without_detours(self, places: set[int]) -> set[int] | None:
        """Leaves out what reads a value from outside that depends on the steps before."""
        while True:
            body = {n for row in self._rows(places) for n in row}
            behind = set(body)
            for node in self.order[min(places) :]:
                if not behind.isdisjoint(node.all_input_nodes):
                    behind.add(node)
            outside = behind - body
            astray = {
                p for p in places
                if any(not outside.isdisjoint(n.all_input_nodes) for n in self._column(p))
            }  # fmt: skip
            if not astray:
                return places
            if not astray.isdisjoint(self.own):
                return None
            places = places - astray

    def _column(self, place: int) -> list[fx.Node]:
        return [self.order[place + t * self.period] for t in self.steps]
