"""Plans of the front whose graph is rewritten once more, for a lower peak at nearly the same time.

    front:      c_0, c_1, ...        peak against time, see `gtrans.plan.front`
    rewritten:  c_i, then less of    some values at the peak of c_i get smaller or go elsewhere:
                some roles           by rows (`gtrans.plan.streamed`), to the host (`offloaded`)

Whatever is at the peak of c_i in other roles stays there, so it is a bound from below that is known
before anything is rewritten, which is what takes long.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gtrans.ir.joint import JointGraph
from gtrans.plan.front import Front
from gtrans.plan.realise import write
from gtrans.plan.rebuild import Candidate, Choice, Rebuilder


@dataclass(frozen=True)
class Rewritten(ABC):
    """A plan of the front, and what is done to its graph besides.

    Attributes:
        candidate: the plan.
        peak: simulated peak in bytes, constants included.
        seconds: predicted time of forward and backward.
    """

    candidate: Candidate
    peak: int
    seconds: float

    @abstractmethod
    def write(self, joint: JointGraph) -> None:
        """Rewrites a graph that has the plan written into it already."""

    def written_copy(self, joint: JointGraph) -> JointGraph:
        """A copy of the graph with this plan written into it."""
        twin = written_copy(joint, self.candidate.choice)
        self.write(twin)
        return twin


P = TypeVar("P", bound=Rewritten)


class Way(Generic[P]):
    """One way to rewrite the plans of a front.

    Args:
        front: of the graph.
        candidates: the plans to rewrite, fastest first.
        roles: of what it can make smaller, as in `gtrans.analysis.liveness.Alive`.
        plans: rewrites one more and more, each time with a lower peak.
    """

    def __init__(
        self,
        front: Front,
        candidates: Sequence[Candidate],
        roles: tuple[str, ...],
        plans: Callable[[Candidate], Iterator[P]],
    ) -> None:
        self.front = front
        self.candidates = candidates
        self.roles = roles
        self._plans = plans
        self._floors: dict[int, int] = {}
        self._done: dict[int, list[P]] = {}

    def fastest(self, room: int, faster_than_s: float) -> P | None:
        """The fastest plan that fits, if one is faster than what is at hand.

        Args:
            room: bytes that its peak may have, constants included.
            faster_than_s: predicted seconds of the best plan that fits otherwise.
        """
        found: P | None = None
        for candidate in self.candidates:
            if candidate.seconds >= faster_than_s:
                break  # to rewrite a plan makes it no faster
            if self.floor(candidate) > room:
                continue
            plan = next((p for p in self._rewritten(candidate) if p.peak <= room), None)
            if plan is not None and plan.seconds < faster_than_s:
                found, faster_than_s = plan, plan.seconds
        return found

    def lowest(self, below: int) -> P | None:
        """The plan with the lowest peak, if it is below so many bytes."""
        found: P | None = None
        for candidate in sorted(self.candidates, key=self.floor):
            if self.floor(candidate) >= below:
                break
            for plan in self._rewritten(candidate):
                if plan.peak < below:
                    found, below = plan, plan.peak
        return found

    def floor(self, candidate: Candidate) -> int:
        """What is at the peak of a plan however it is rewritten."""
        if id(candidate) not in self._floors:
            alive = self.front.simulate(self.front.schedule(candidate)).alive()
            kept = sum(a.bytes for a in alive if a.role not in self.roles)
            self._floors[id(candidate)] = kept
        return self._floors[id(candidate)]

    def _rewritten(self, candidate: Candidate) -> Iterator[P]:
        """The rewritten plans of one; what was looked at to the end is known from then on."""
        if id(candidate) in self._done:
            yield from self._done[id(candidate)]
            return
        found: list[P] = []
        for plan in self._plans(candidate):
            found.append(plan)
            yield plan
        self._done[id(candidate)] = found


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
