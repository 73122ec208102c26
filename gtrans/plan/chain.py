"""Another plan for every part of the forward: a dynamic program over the chain, on the peak.

The forward is cut at narrow places into segments 1 .. n. Each of a few plans for the whole graph
(an option) was simulated; per segment i, option c

    keeps   s[i,c]   bytes of values that the segment makes,
    needs   m[i,c]   bytes besides what segments 1 .. i keep, while it or its backward runs,
    takes   t[i,c]   seconds to compute values of the segment again.

When the backward reaches segment i, what later segments kept is gone, so the step stays under M if

    constants + sum_{j<=i} s[j,c(j)] + m[i,c(i)]  <=  M      for every i,

and of the assignments c that do, the one with the least time is found by a dynamic program whose
state is the option of a segment and the bytes kept so far. Where the option changes, everything
that crosses the boundary is kept besides, so that neither side needs what the other recomputes.

Source: the dynamic program over a chain of rotor (Beaumont et al. 2019), with whole plans of a
segment as its choices instead of "all or nothing"; the outcome is simulated, not trusted.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch import fx

from gtrans.analysis.liveness import Liveness
from gtrans.analysis.schedule import Schedule, Task
from gtrans.ir.joint import JointGraph, tag
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan.rebuild import Choice
from gtrans.plan.waists import Waists

Numbers = NDArray[np.float64]

# Resolution of the bytes kept so far, as a share of the room.
_LEVELS = 1024


@dataclass(frozen=True)
class Option:
    """A plan for the whole graph, taken apart by segment.

    Attributes:
        choice: what it saves.
        kept: bytes that live from the forward to the backward, per segment.
        needed: largest number of bytes besides constants and what this segment and earlier ones
            keep, per segment.
        seconds: time to compute values of the segment again, per segment; a row for each clock.
        crossing: bytes that cross the end of each segment but the last and that it does not save.
    """

    choice: Choice
    kept: Numbers
    needed: Numbers
    seconds: Numbers
    crossing: Numbers


class Chain:
    """The segments of one forward.

    Args:
        joint: the graph, not changed.
        waists: its narrow places.
        boundaries: positions where segments end; the last segment ends with the forward.
    """

    def __init__(self, joint: JointGraph, waists: Waists, boundaries: Sequence[int]) -> None:
        self.waists = waists
        self.boundaries = list(boundaries)
        self.length = len(self.boundaries) + 1
        self.crossing = [waists.values_at(p) for p in self.boundaries]
        self._nodes: list[set[fx.Node]] = [set() for _ in range(self.length)]
        for node in waists.nodes:
            self._nodes[self.segment(node)].add(node)
        self._home = self._segments_of_backward(joint)

    def segment(self, node: fx.Node) -> int:
        """The segment that makes a forward value; inputs belong to the first."""
        return bisect_left(self.boundaries, self.waists.position.get(node, 0))

    def option(
        self,
        choice: Choice,
        schedule: Schedule,
        liveness: Liveness,
        clocks: Sequence[Callable[[Task], float]],
    ) -> Option:
        """Takes a simulated plan apart; each clock is a way to count the seconds of a task."""
        kept, needed = np.zeros(self.length), np.full(self.length, -np.inf)
        again = np.zeros((len(clocks), self.length))
        for node, size in liveness.saved():
            kept[self.segment(node)] += size
        below = list(accumulate(kept))
        home = self.length - 1
        for number in reversed(range(len(schedule.tasks))):
            # From the end, because what runs again stands right before the node that it is for.
            task = schedule.tasks[number]
            if number >= schedule.boundary and not task.again:
                home = self._home.get(task.node, home)
            at = home if number >= schedule.boundary else self.segment(task.node)
            held = liveness.timeline[number] - liveness.constant_bytes - below[at]
            needed[at] = max(needed[at], held)
            if task.again:
                again[:, self.segment(task.node)] += [seconds(task) for seconds in clocks]
        return Option(choice, kept, needed, again, self.crossing_bytes(choice))

    def crossing_bytes(self, choice: Choice) -> Numbers:
        """`Option.crossing` of a choice."""
        missing = (nodes - choice.save for nodes in self.crossing)
        return np.array([sum(tensor_bytes(n.meta["val"]) for n in some) for some in missing], float)

    def solve(self, options: Sequence[Option], room: float, clock: int = 0) -> list[int] | None:
        """The fastest assignment of options to segments.

        Args:
            options: what to choose from.
            room: bytes that the step may take besides constants.
            clock: the number of the one that counts.

        Returns:
            The number of an option per segment; None if none of the assignments fits.
        """
        return _Program(self, options, room, clock).solve() if room > 0 else None

    def mixed(self, options: Sequence[Option], assignment: Sequence[int]) -> Choice:
        """The choice that follows another option in every segment."""
        save: set[fx.Node] = set()
        hold: set[fx.Node] = set()
        for i, number in enumerate(assignment):
            choice = options[number].choice
            mine = self._nodes[i]
            save |= choice.save & mine
            hold |= mine if choice.hold is None else choice.hold & mine
            if i + 1 < self.length and assignment[i + 1] != number:
                save |= self.crossing[i]
        save |= {n for o in options for n in o.choice.save if n not in self.waists.position}
        window = max(o.choice.window for o in options)
        dropped = frozenset(
            (node, position)
            for i, number in enumerate(assignment)
            for node, position in options[number].choice.dropped
            if node in self._nodes[i]
        )
        if all(options[number].choice.hold is None for number in assignment):
            return Choice(frozenset(save), dropped=dropped)
        return Choice(frozenset(save), frozenset(hold), window, dropped)

    def _segments_of_backward(self, joint: JointGraph) -> dict[fx.Node, int]:
        """The segment that a backward node belongs to: that of its operator's forward."""
        regions: dict[int, int] = {}
        for node in self.waists.nodes:
            region = tag(node).region
            if region is not None:
                regions[region] = self.segment(node)
        return {
            n: regions[region]
            for n in joint.nodes
            if joint.is_backward(n)
            and n.op == "call_function"
            and (region := tag(n).region) in regions
            and region is not None
        }


class _Program:
    """The dynamic program for one room: least seconds per option of the last segment and level."""

    def __init__(self, chain: Chain, options: Sequence[Option], room: float, clock: int) -> None:
        self.options = options
        self.length = chain.length
        self.unit = room / _LEVELS
        kept = np.array([o.kept for o in options])
        self.kept = np.rint(kept / self.unit).astype(int)
        needed = np.array([o.needed for o in options])
        self.most = np.floor((room - needed) / self.unit)  # levels at which an option still fits
        self.seconds = np.array([o.seconds[clock] for o in options])
        crossing = np.array([o.crossing for o in options])
        self.change = np.rint(crossing / self.unit).astype(int)

    def solve(self) -> list[int] | None:
        count = len(self.options)
        best = np.full((count, _LEVELS + 1), np.inf)
        best[:, 0] = 0.0
        trail: list[tuple[NDArray[np.bool_], NDArray[np.int64]]] = []
        for i in range(self.length):
            if i:
                moved = np.array([_shift(best[c], self.change[c, i - 1]) for c in range(count)])
                source = moved.argmin(axis=0)
                elsewhere = moved.min(axis=0)
                changed = elsewhere < best
                trail.append((changed, source))
                best = np.where(changed, elsewhere, best)
            best = np.array(
                [_shift(best[c], self.kept[c, i]) + self.seconds[c, i] for c in range(count)]
            )
            levels = np.arange(_LEVELS + 1)
            best[levels[None, :] > self.most[:, i, None]] = np.inf
        if not np.isfinite(best).any():
            return None
        option, level = np.unravel_index(best.argmin(), best.shape)
        return self._back(trail, int(option), int(level))

    def _back(
        self, trail: list[tuple[NDArray[np.bool_], NDArray[np.int64]]], option: int, level: int
    ) -> list[int]:
        found = [option]
        for i in reversed(range(1, self.length)):
            level -= int(self.kept[option, i])
            changed, source = trail[i - 1]
            if changed[option, level]:
                option = int(source[level])
                level -= int(self.change[option, i - 1])
            found.append(option)
        return found[::-1]


def _shift(values: Numbers, by: int) -> Numbers:
    """Moves values to higher levels; what would leave the range is lost."""
    if by <= 0:
        return values
    moved = np.full_like(values, np.inf)
    moved[by:] = values[: len(values) - by] if by < len(values) else moved[by:]
    return moved
