"""Choosing which indices to erase so that a target is met.

Indices go in the order of their scores, a class never loses its last `multiple_of`, and the sizes
that are left are multiples of it (classes that are smaller stay whole).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gtrans.analysis.axes import Axis
from gtrans.analysis.erasable import ErasableClass, Structure
from gtrans.analysis.unit_scores import Scores
from gtrans.errors import OptionError, PlanError

Selection = dict[str, torch.Tensor]
"""For each class by name, a boolean vector that is true at the indices to erase."""


@dataclass(frozen=True)
class Target:
    """What erasure must reach; exactly one is given.

    Attributes:
        sparsity: share of the indices to erase: floor(sparsity · indices) of them.
        params: share of the parameters that may be left.
        flops: share of the floating-point operations that may be left.
    """

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


@dataclass(frozen=True)
class _Chunk:
    name: str
    indices: torch.Tensor
    score: float


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
    chunks = _ranked(classes, scores, before, multiple_of, scope)
    if target.sparsity is not None:
        return _by_count(classes, chunks, before, target.sparsity)
    return _by_measure(structure, classes, chunks, before, target)


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
) -> list[_Chunk]:
    per_class = {c.name: _chunks(c, scores[c.name], before[c.name], multiple_of) for c in classes}
    if scope == "global":
        return sorted((k for ks in per_class.values() for k in ks), key=lambda k: k.score)
    pools: dict[object, list[_Chunk]] = {}
    for c in classes:
        pools.setdefault(c.name if scope == "local" else signature(c), []).extend(per_class[c.name])
    sizes = {c.name: c.size for c in classes}
    order: list[tuple[float, _Chunk]] = []
    for pool in pools.values():
        pool.sort(key=lambda k: k.score)
        total, done = sum(sizes[name] for name in {k.name for k in pool}), 0
        for k in pool:
            # By how much of its pool is gone: pools shrink alike.
            order.append(((done + len(k.indices)) / total, k))
            done += len(k.indices)
    return [k for _, k in sorted(order, key=lambda pair: pair[0])]


def signature(cls: ErasableClass) -> object:
    """Equal for classes that stand in the same kinds of places with the same sizes."""
    members = sorted((m.dim, m.producer, len(m.labels)) for m in cls.members)
    return (cls.size, cls.parameters, tuple(members))


def _chunks(
    cls: ErasableClass, scores: torch.Tensor, before: torch.Tensor, multiple_of: int
) -> list[_Chunk]:
    """What may go, in the order in which it goes; scores never fall along the way."""
    left = (~before).nonzero().flatten()
    order = left[torch.argsort(scores[left], stable=True)].cpu()
    made: list[_Chunk] = []
    position, remaining, highest = 0, len(order), -float("inf")
    while remaining > multiple_of:
        step = remaining % multiple_of or multiple_of
        indices = order[position : position + step]
        highest = max(highest, float(scores[indices].mean()))
        made.append(_Chunk(cls.name, indices, highest))
        position, remaining = position + step, remaining - step
    return made


def _by_count(
    classes: Sequence[ErasableClass],
    chunks: list[_Chunk],
    before: Mapping[str, torch.Tensor],
    sparsity: float,
) -> Selection:
    total = sum(c.size for c in classes)
    done = sum(int(b.sum()) for b in before.values())
    # 0.29 · 100 is 28.999999999999996: a target is not missed by a rounding error.
    goal = int(sparsity * total + 1e-9)
    reachable = done + sum(len(k.indices) for k in chunks)
    if goal > reachable:
        raise PlanError(
            f"sparsity {sparsity:g} asks for {goal} of {total} indices, but only {reachable} can "
            f"go; the largest reachable sparsity is {floored(reachable / total)} (every class "
            "keeps an index, or `multiple_of` of them)"
        )
    result = {name: b.clone() for name, b in before.items()}
    blocked: set[str] = set()
    for k in chunks:
        if k.name in blocked or done + len(k.indices) > goal:
            blocked.add(k.name)
            continue
        result[k.name][k.indices] = True
        done += len(k.indices)
    return result


def _by_measure(
    structure: Structure,
    classes: Sequence[ErasableClass],
    chunks: list[_Chunk],
    before: Mapping[str, torch.Tensor],
    target: Target,
) -> Selection:
    name = "params" if target.params is not None else "flops"
    share = target.params if target.params is not None else target.flops
    assert share is not None
    measure = structure.parameters if name == "params" else structure.flops
    whole = measure({})

    def with_first(count: int) -> Selection:
        result = {n: b.clone() for n, b in before.items()}
        for k in chunks[:count]:
            result[k.name][k.indices] = True
        return result

    def left(count: int) -> int:
        return measure(kept(classes, with_first(count)))

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
    return with_first(low)


def floored(share: float) -> str:
    """A share in four digits that does not promise more than there is."""
    return f"{int(share * 10000) / 10000:.4f}"
