"""Choosing which indices to erase so that a target is met.

Indices go in the order of their scores, a class never loses its last `multiple_of`, and the sizes
that are left are multiples of it (classes that are smaller stay whole).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import torch

from gtrans.analysis.axes import Axis
from gtrans.analysis.erasable import ErasableClass, Structure
from gtrans.analysis.unit_scores import Scores
from gtrans.errors import OptionError, PlanError

Selection = dict[str, torch.Tensor]
"""For each class by name, a boolean vector that is true at the indices to erase."""


class TargetOptions(TypedDict, total=False):
    """What erasure must reach; exactly one is given.

    Attributes:
        sparsity: share of the indices to erase: floor(sparsity · indices) of them. Of operators,
            nested ones counted, so many at most.
        params: share of the parameters that may be left.
        flops: share of the floating-point operations that may be left.
    """

    sparsity: float | None
    params: float | None
    flops: float | None


@dataclass(frozen=True)
class Target:
    """`TargetOptions`, checked."""

    sparsity: float | None = None
    params: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise OptionError(
                "give exactly one of sparsity (share of indices to erase), params or flops "
                f"(share that may be left), got {given or 'none'}"
            )
        name, value = next(iter(given.items()))
        if not 0 <= value <= 1:
            raise OptionError(f"{name} must lie between 0 and 1, got {value}")

    def at(self, progress: float) -> "Target":
        """The target of the way there: progress 0 erases nothing, 1 everything."""
        if self.sparsity is not None:
            return Target(sparsity=self.sparsity * progress)
        if self.params is not None:
            return Target(params=1 - (1 - self.params) * progress)
        assert self.flops is not None
        return Target(flops=1 - (1 - self.flops) * progress)


class _Chunk(NamedTuple):
    """So many indices of a class go together; which, its ranking says."""

    name: str
    size: int
    score: float


@dataclass(frozen=True)
class _Ranking:
    """What goes first.

    Attributes:
        before: what is erased already.
        orders: for each class, the numbers of its other indices in the order in which they go.
        chunks: all classes' chunks in order.
    """

    before: Mapping[str, torch.Tensor]
    orders: Mapping[str, torch.Tensor]
    chunks: Sequence[_Chunk]

    def selection(self, taken: Mapping[str, int]) -> Selection:
        """What is erased once each class has lost so many more."""
        result = {name: b.clone() for name, b in self.before.items()}
        for name, count in taken.items():
            result[name][self.orders[name][:count]] = True
        return result


def choose(
    structure: Structure,
    classes: Sequence[ErasableClass],
    scores: Scores,
    target: Target,
    *,
    multiple_of: int = 1,
    chosen: Mapping[str, torch.Tensor] | None = None,
    scope: str = "global",
) -> Selection:
    """The indices to erase.

    Args:
        structure: knows parameters and operations.
        classes: what may be erased.
        scores: low ones go first.
        target: what to reach.
        multiple_of: sizes that are left are multiples of this.
        chosen: indices that are erased already and stay so.
        scope: "global" compares all indices, "local" takes the same share of every class,
            "isomorphic" compares the classes that stand in the same kinds of places.

    Raises:
        PlanError: the target cannot be reached; the message says what can.
    """
    if multiple_of < 1:
        raise OptionError(f"multiple_of must be at least 1, got {multiple_of}")
    before = {
        c.name: (chosen or {}).get(c.name, torch.zeros(c.size, dtype=torch.bool)) for c in classes
    }
    ranking = _ranked(classes, scores, before, multiple_of, scope)
    if target.sparsity is not None:
        return _by_count(classes, ranking, target.sparsity)
    return _by_measure(structure, classes, ranking, target)


@dataclass(frozen=True)
class IndexChoice:
    """Chooses indices of classes for a sparsifier; the fields are as for `choose`."""

    structure: Structure
    classes: Sequence[ErasableClass]
    multiple_of: int = 1
    scope: str = "global"

    def choose(
        self, scores: Scores, target: Target, chosen: Mapping[str, torch.Tensor]
    ) -> Selection:
        """See `choose`."""
        return choose(
            self.structure,
            self.classes,
            scores,
            target,
            multiple_of=self.multiple_of,
            chosen=chosen,
            scope=self.scope,
        )


def as_masks(
    classes: Sequence[ErasableClass], selection: Mapping[str, torch.Tensor]
) -> dict[Axis, torch.Tensor]:
    """A selection by axis instead of by class name."""
    return {c.atom: selection[c.name] for c in classes if c.name in selection}


def kept(
    classes: Sequence[ErasableClass], selection: Mapping[str, torch.Tensor]
) -> dict[Axis, int]:
    """How many indices of each class' axis stay."""
    return {a: int((~gone).sum()) for a, gone in as_masks(classes, selection).items()}


def _ranked(
    classes: Sequence[ErasableClass],
    scores: Scores,
    before: Mapping[str, torch.Tensor],
    multiple_of: int,
    scope: str,
) -> _Ranking:
    orders: dict[str, torch.Tensor] = {}
    per_class: dict[str, list[_Chunk]] = {}
    for c in classes:
        left = (~before[c.name]).nonzero().flatten()
        values, order = scores[c.name][left].double().cpu().sort(stable=True)
        orders[c.name] = left[order]
        per_class[c.name] = _chunks(c.name, values, multiple_of)
    if scope == "global":
        chunks = sorted((k for ks in per_class.values() for k in ks), key=lambda k: k.score)
        return _Ranking(before, orders, chunks)
    pools: dict[object, list[_Chunk]] = {}
    for c in classes:
        pools.setdefault(c.name if scope == "local" else signature(c), []).extend(per_class[c.name])
    sizes = {c.name: c.size for c in classes}
    placed: list[tuple[float, _Chunk]] = []
    for pool in pools.values():
        pool.sort(key=lambda k: k.score)
        total, done = sum(sizes[name] for name in {k.name for k in pool}), 0
        for k in pool:
            # By how much of its pool is gone: pools shrink alike.
            placed.append(((done + k.size) / total, k))
            done += k.size
    placed.sort(key=lambda pair: pair[0])
    return _Ranking(before, orders, [k for _, k in placed])


def signature(cls: ErasableClass) -> object:
    """Equal for classes that stand in the same kinds of places with the same sizes."""
    members = sorted((m.dim, m.producer, len(m.labels)) for m in cls.members)
    return (cls.size, cls.parameters, tuple(members))


def _chunks(name: str, values: torch.Tensor, multiple_of: int) -> list[_Chunk]:
    """What may go of a class with these scores, in rising order; scores never fall along it."""
    count = len(values)
    if count <= multiple_of:
        return []
    # The first makes what is left a multiple; a last one stays.
    starts = np.arange(count % multiple_of or multiple_of, count, multiple_of)
    starts = np.concatenate(([0], starts))
    sizes = np.diff(starts)
    means = np.add.reduceat(values.numpy(), starts)[:-1] / sizes
    highest = np.maximum.accumulate(means)
    return [_Chunk(name, *k) for k in zip(sizes.tolist(), highest.tolist(), strict=True)]


def _by_count(classes: Sequence[ErasableClass], ranking: _Ranking, sparsity: float) -> Selection:
    total = sum(c.size for c in classes)
    done = sum(int(b.sum()) for b in ranking.before.values())
    # 0.29 · 100 is 28.999999999999996: a target is not missed by a rounding error.
    goal = int(sparsity * total + 1e-9)
    reachable = done + sum(k.size for k in ranking.chunks)
    if goal > reachable:
        raise PlanError(
            f"sparsity {sparsity:g} asks for {goal} of {total} indices, but only {reachable} can "
            f"go; the largest reachable sparsity is {floored(reachable / total)} (every class "
            "keeps an index, or `multiple_of` of them)"
        )
    taken: Counter[str] = Counter()
    blocked: set[str] = set()
    for k in ranking.chunks:
        if k.name in blocked or done + k.size > goal:
            blocked.add(k.name)
            continue
        taken[k.name] += k.size
        done += k.size
    return ranking.selection(taken)


def _by_measure(
    structure: Structure, classes: Sequence[ErasableClass], ranking: _Ranking, target: Target
) -> Selection:
    name = "params" if target.params is not None else "flops"
    share = target.params if target.params is not None else target.flops
    assert share is not None
    measure = structure.parameters if name == "params" else structure.flops
    whole, chunks = measure({}), ranking.chunks

    def first(count: int) -> Counter[str]:
        taken: Counter[str] = Counter()
        for k in chunks[:count]:
            taken[k.name] += k.size
        return taken

    def left(count: int) -> int:
        taken = first(count)
        return measure({c.atom: len(ranking.orders[c.name]) - taken[c.name] for c in classes})

    if left(len(chunks)) > share * whole:
        smallest = left(len(chunks)) / max(1, whole)
        raise PlanError(
            f"{name}={share:g} cannot be reached: with every class at its smallest, "
            f"{smallest:.4f} of the {name} are left; ask for {name}={smallest + 5e-5:.4f} or more"
        )
    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if left(middle) <= share * whole:
            high = middle
        else:
            low = middle + 1
    return ranking.selection(first(low))


def floored(share: float) -> str:
    """A share in four digits that does not promise more than there is."""
    return f"{int(share * 10000) / 10000:.4f}"
