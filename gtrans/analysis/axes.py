"""Axes: what a tensor dimension is made of, and which dimensions must change size together.

An axis is an atom of n indices, a product of axes (row-major, as a reshape merges them) or a
concatenation of axes (as `cat` joins them):

    packed qkv [3·H·D]  =  prod[3, H, D]          cat([a, b], 1)  =  cat[a, b]
    flatten [C·H·W]     =  prod[C, H, W]          GQA heads       =  prod[kv, repeats]

Axes live in a union-find, so that what is learnt of one dimension (it splits into heads; it is
the same as another) holds at once wherever the axis occurs. Erasing is a choice of indices per
atom; the mask of a product is the outer product of its factors' masks, that of a concatenation
their concatenation.

An atom that must keep its size is frozen, with the reason. Everything here is sound: where two
structures do not fit together, both are frozen.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, pairwise
from math import prod
from typing import Literal

import torch

Kind = Literal["atom", "prod", "cat"]

_numbers = count()


class Axis:
    """One axis. Use the functions of this module; fields are valid on roots only (see `find`).

    Args:
        size: how many indices it has.
        frozen: why it must keep its size; None if it need not.
        kind: "atom", "prod" or "cat".
        parts: the axes it is made of; none for an atom.
    """

    __slots__ = ("_parent", "frozen", "kind", "number", "parts", "size")

    def __init__(
        self,
        size: int,
        frozen: str | None = None,
        kind: Kind = "atom",
        parts: tuple["Axis", ...] = (),
    ) -> None:
        self.size = size
        self.kind: Kind = kind
        self.parts = parts
        # Atoms of one index have nothing to erase.
        self.frozen = "has one index" if kind == "atom" and size <= 1 and not frozen else frozen
        self.number = next(_numbers)
        self._parent: Axis | None = None

    def __repr__(self) -> str:
        root = find(self)
        if root.kind == "atom":
            return f"{root.size}" + ("*" if root.frozen else "")
        return f"{root.kind}[{', '.join(map(repr, root.parts))}]"


def find(axis: Axis) -> Axis:
    """The representative of an axis."""
    root = axis
    while root._parent is not None:
        root = root._parent
    while axis._parent is not None:
        axis._parent, axis = root, axis._parent
    return root


def atoms(axis: Axis) -> list[Axis]:
    """The atoms of an axis from left to right, with repetitions."""
    root = find(axis)
    if root.kind == "atom":
        return [root]
    return [atom for part in root.parts for atom in atoms(part)]


def freeze(axis: Axis, reason: str) -> None:
    """Makes all atoms of an axis keep their size. The first reason stays."""
    for atom in atoms(axis):
        if atom.frozen is None:
            atom.frozen = reason


def is_frozen(axis: Axis) -> bool:
    """Whether no index of the axis can be erased."""
    return all(atom.frozen is not None for atom in atoms(axis))


def factors(axis: Axis) -> list[Axis]:
    """The factors of an axis, none of which is a product: itself unless it is one."""
    root = find(axis)
    if root.kind != "prod":
        return [root]
    return [factor for part in root.parts for factor in factors(part)]


def segments(axis: Axis) -> list[Axis]:
    """The pieces of an axis, none of which is a concatenation: itself unless it is one."""
    root = find(axis)
    if root.kind != "cat":
        return [root]
    return [piece for part in root.parts for piece in segments(part)]


def merge(parts: Iterable[Axis]) -> Axis:
    """The product of axes, the first one varying slowest."""
    found = [f for part in parts for f in factors(part) if f.size != 1]
    if len(found) == 1:
        return found[0]
    if not found:
        return Axis(1)
    return Axis(prod(f.size for f in found), kind="prod", parts=tuple(found))


def concatenate(parts: Iterable[Axis]) -> Axis:
    """The concatenation of axes."""
    found = [s for part in parts for s in segments(part) if s.size != 0]
    if len(found) == 1:
        return found[0]
    if not found:
        return Axis(0)
    return Axis(sum(s.size for s in found), kind="cat", parts=tuple(found))


def unify(a: Axis, b: Axis, reason: str = "sizes that do not fit together") -> None:
    """Makes two axes of one size the same axis; freezes both where their structures differ."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.size != b.size or (a.kind == "atom" and b.kind != "atom" and a in atoms(b)):
        freeze(a, reason)
        freeze(b, reason)
        return
    if a.kind == "atom":
        if a.frozen is not None:
            freeze(b, a.frozen)
        a._parent = b
        return
    # From here on both have parts. Unifying the parts may merge the roots themselves.
    if a.kind == b.kind == "prod":
        done = _unify_products(a, b, reason)
    else:
        done = _unify_concatenations(a, b, reason)
    if not done:
        freeze(a, reason)
        freeze(b, reason)
    elif find(a) is not find(b):
        find(a)._parent = find(b)


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Splits an axis into factors of the given sizes, whose product it is.

    Returns:
        One axis per size, or None if the structure does not allow it (nothing is frozen then).
    """
    pending = [f for f in factors(axis) if f.size != 1]
    made: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        need = size
        while need > 1:
            if not pending:
                return None
            first = pending.pop(0)
            if first.size > need:
                halves = _halve(first, need) if first.size % need == 0 else None
                if halves is None:
                    return None
                first, rest = halves
                pending[:0] = [f for f in factors(rest) if f.size != 1]
            if need % first.size:
                return None
            taken.append(first)
            need //= first.size
        made.append(merge(taken))
    return None if pending else made


def segment(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Cuts an axis into consecutive pieces of the given sizes.

    Returns:
        One axis per size, or None if the structure does not allow it (nothing is frozen then).
    """
    root = find(axis)
    sizes = list(sizes)
    if sum(sizes) != root.size:
        return None
    if sum(1 for s in sizes if s) <= 1:
        return [root if s else Axis(0) for s in sizes]
    if root.kind == "atom":
        pieces = [Axis(s, root.frozen) for s in sizes]
        root.kind, root.parts = "cat", tuple(p for p in pieces if p.size)
        return pieces
    if root.kind == "prod":
        first, *rest = [f for f in factors(root) if f.size != 1]
        inner = prod(f.size for f in rest)
        if any(s % inner for s in sizes):
            return None
        cut = segment(first, [s // inner for s in sizes])
        return None if cut is None else [merge([c, *rest]) if c.size else c for c in cut]
    return _segment_concatenation(root, sizes)


def mask(axis: Axis, erased: Mapping[Axis, torch.Tensor]) -> torch.Tensor:
    """Which indices of an axis stay.

    Args:
        axis: any axis.
        erased: for some atoms, a boolean vector that is true at the erased indices.

    Returns:
        A boolean vector of the axis' size, true at the indices that stay.
    """
    root = find(axis)
    if root.kind == "atom":
        gone = erased.get(root)
        return torch.ones(root.size, dtype=torch.bool) if gone is None else ~gone
    masks = [mask(part, erased) for part in root.parts]
    if root.kind == "cat":
        return torch.cat(masks)
    whole = masks[0]
    for m in masks[1:]:
        whole = (whole[:, None] & m[None, :]).reshape(-1)
    return whole


def labels(axis: Axis, atom: Axis) -> torch.Tensor:
    """To which index of an atom every index of an axis belongs; -1 where to none."""
    root = find(axis)
    if root.kind == "atom":
        if root is find(atom):
            return torch.arange(root.size)
        return torch.full((root.size,), -1)
    found = [labels(part, atom) for part in root.parts]
    if root.kind == "cat":
        return torch.cat(found)
    whole = found[0]
    for f in found[1:]:
        whole = torch.maximum(whole[:, None], f[None, :]).reshape(-1)
    return whole


def kept_size(axis: Axis, kept: Mapping[Axis, int]) -> int:
    """The size of an axis when atoms keep the given numbers of indices; others keep all."""
    root = find(axis)
    if root.kind == "atom":
        return kept.get(root, root.size)
    sizes = [kept_size(part, kept) for part in root.parts]
    return sum(sizes) if root.kind == "cat" else prod(sizes)


# ---------------------------------------------------------------------- private


def _halve(axis: Axis, leading: int) -> tuple[Axis, Axis] | None:
    """Splits an atom or concatenation into a leading factor of the given size and the rest."""
    root = find(axis)
    trailing = root.size // leading
    if root.kind == "atom":
        first, rest = Axis(leading, root.frozen), Axis(trailing, root.frozen)
        root.kind, root.parts = "prod", (first, rest)
        return first, rest
    # cat[a·m, b·m] read row-major as [a + b, m]: every piece ends in the same factor m.
    if root.kind != "cat" or any(p.size % trailing for p in root.parts):
        return None
    cuts = []
    for piece in segments(root):
        cut = split(piece, [piece.size // trailing, trailing])
        if cut is None:
            return None
        cuts.append(cut)
    for cut in cuts[1:]:
        unify(cuts[0][1], cut[1])
    return concatenate(c[0] for c in cuts), cuts[0][1]


def _segment_concatenation(root: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    pending = segments(root)
    made: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        need = size
        while need > 0:
            first = pending.pop(0)
            if first.size > need:
                cut = segment(first, [need, first.size - need])
                if cut is None:
                    return None
                first = cut[0]
                pending.insert(0, cut[1])
            taken.append(first)
            need -= first.size
        made.append(concatenate(taken))
    return made


def _unify_products(a: Axis, b: Axis, reason: str) -> bool:
    left, right = factors(a), factors(b)
    while left and right:
        x, y = find(left[0]), find(right[0])
        if x.size < y.size:
            left, right, x, y = right, left, y, x
        if x.size != y.size:
            halves = _halve(x, y.size) if x.size % y.size == 0 else None
            if halves is None:
                return False
            left[:1] = [f for h in halves for f in factors(h)]
            continue
        left.pop(0)
        right.pop(0)
        unify(x, y, reason)
    return not left and not right


def _unify_concatenations(a: Axis, b: Axis, reason: str) -> bool:
    """Aligns the boundaries of two axes at least one of which is a concatenation."""
    bounds = sorted(_bounds(a) | _bounds(b))
    sizes = [high - low for low, high in pairwise(bounds)]
    if len(sizes) < 2:
        return False
    left, right = segment(a, sizes), segment(b, sizes)
    if left is None or right is None:
        return False
    for x, y in zip(left, right, strict=True):
        unify(x, y, reason)
    return True


def _bounds(axis: Axis) -> set[int]:
    found, end = {0}, 0
    for piece in segments(axis):
        end += piece.size
        found.add(end)
    return found
