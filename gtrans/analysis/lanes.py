"""A backward that recovers one block while it computes the gradients of another, as a list of work.

    recover(i) -> recover(i+1)        the streams of a block are rebuilt from those of the one after
    recover(i) -> grads(i)            gradients read what was rebuilt
    grads(i)   -> grads(i+1)          and the cotangent that arrives

Blocks are numbered as the backward meets them: block 0 is the last one of the network. With a
look-ahead of q there are q + 1 lanes, and block i runs on lane i mod (q + 1):

    q = 1     lane 0:  R0  G0  R2  G2  R4 ...        R2 beside G1, R3 beside G2, ...
              lane 1:  R1      G1  R3  G3 ...

A lane runs its work in order, so that recover(i + q + 1) starts once grads(i) is through: at most
q + 1 blocks are alive, and what a block keeps is made and freed on one lane. What crosses lanes are
the streams and the cotangent of a block boundary.

Source: PaReprop (arXiv:2306.09342), for which q is 1. Any number of blocks, odd ones included, is
handled alike: nothing depends on which of two buffers is in turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gtrans.errors import PlanError

Kind = Literal["recover", "grads"]


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work on one lane.

    Attributes:
        kind: rebuild a block's values, or compute its gradients.
        block: number of the block.
        lane: where it runs.
        waits: numbers of the pieces on other lanes that must have ended before it starts.
        frees: the block whose rebuilt values nobody reads after it.
    """

    kind: Kind
    block: int
    lane: int
    waits: tuple[int, ...] = ()
    frees: int | None = None

    @property
    def name(self) -> str:
        """``recover(3)``."""
        return f"{self.kind}({self.block})"


@dataclass(frozen=True)
class LaneSchedule:
    """The work of a backward in the order in which it is issued.

    Attributes:
        blocks: how many blocks there are.
        look_ahead: by how many blocks recovery may be ahead of gradients.
        works: every piece; a piece comes after all it needs.
    """

    blocks: int
    look_ahead: int
    works: tuple[Work, ...]

    @property
    def lanes(self) -> int:
        """How many lanes are in use."""
        return min(self.look_ahead + 1, self.blocks)

    @property
    def signals(self) -> frozenset[int]:
        """The pieces whose end another lane waits for."""
        return frozenset(w for work in self.works for w in work.waits)

    def on_lane(self, lane: int) -> list[int]:
        """The numbers of a lane's pieces, in order."""
        return [i for i, work in enumerate(self.works) if work.lane == lane]

    def check(self) -> None:
        """Proves that whatever lanes do between their waits, nothing is read early or freed early.

        Raises:
            PlanError: a piece may start before one that it needs has ended, or after its block was
                freed, or more than q + 1 blocks may be alive at once.
        """
        before = self.before()
        number = {(w.kind, w.block): i for i, w in enumerate(self.works)}
        for i, work in enumerate(self.works):
            for need in _needs(work.kind, work.block):
                if number[need] not in before[i]:
                    raise PlanError(f"{work.name} may start before {need[0]}({need[1]}) has ended")
            late = work.block - self.look_ahead - 1
            if work.kind == "recover" and late >= 0 and number["grads", late] not in before[i]:
                raise PlanError(
                    f"{work.name} may start while block {late} is alive: more than "
                    f"{self.look_ahead + 1} blocks at once"
                )
        for i, work in enumerate(self.works):
            for j, other in enumerate(self.works):
                reads = work.frees is not None and (other.kind, other.block) in _readers(work.frees)
                if reads and j != i and j not in before[i]:
                    raise PlanError(f"{work.name} frees what {other.name} may still read")

    def before(self) -> list[set[int]]:
        """For each piece, those that have ended when it starts, whatever the lanes do."""
        found: list[set[int]] = []
        latest: dict[int, int] = {}
        for i, work in enumerate(self.works):
            direct = [*work.waits, *([latest[work.lane]] if work.lane in latest else [])]
            found.append({n for d in direct for n in (d, *found[d])})
            latest[work.lane] = i
        return found


def lane_schedule(blocks: int, look_ahead: int = 1) -> LaneSchedule:
    """The schedule of a backward over some blocks.

    Args:
        blocks: how many, at least 0.
        look_ahead: q; 0 runs one piece after the other on one lane.

    Raises:
        PlanError: a number is negative.
    """
    if blocks < 0 or look_ahead < 0:
        raise PlanError(f"no schedule for {blocks} blocks with a look-ahead of {look_ahead}")
    works: list[Work] = []
    number: dict[tuple[Kind, int], int] = {}
    for kind, block in _order(blocks, look_ahead):
        lane = block % (look_ahead + 1)
        needed = [number[need] for need in _needs(kind, block)]
        waits = tuple(n for n in needed if works[n].lane != lane)
        number[kind, block] = len(works)
        works.append(Work(kind, block, lane, waits, block if kind == "grads" else None))
    return LaneSchedule(blocks, look_ahead, tuple(works))


def _order(blocks: int, look_ahead: int) -> Iterator[tuple[Kind, int]]:
    recovered = 0
    for block in range(blocks):
        while recovered < min(blocks, block + look_ahead + 1):
            yield "recover", recovered
            recovered += 1
        yield "grads", block


def _needs(kind: Kind, block: int) -> list[tuple[Kind, int]]:
    before: list[tuple[Kind, int]] = [(kind, block - 1)] if block else []
    return before if kind == "recover" else [("recover", block), *before]


def _readers(block: int) -> Sequence[tuple[Kind, int]]:
    """Who reads what recovering a block made inside of it."""
    return [("recover", block), ("grads", block)]
