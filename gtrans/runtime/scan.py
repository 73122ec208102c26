"""Affine recurrences in a logarithmic number of steps.

    h[t] = A[t] h[t-1] + b[t]        t = 0 .. T-1, h[-1] given or zero

Two neighbouring steps are one step: (A2, b2) after (A1, b1) is (A2 A1, A2 b1 + b2). So pairs are
joined, the half as long recurrence is solved the same way, and the values in between follow from
it: about 2 log2 T steps in a row and twice the work of the loop, whatever T is. `A` may be a
number, a diagonal or a matrix per step; products of many matrices cost d^3 each, so matrices are
for small d.
"""

import torch

Carry = float | torch.Tensor
"""A number, [T, *s] or broadcastable to it (a diagonal per step), or [T, *s, d] with d the last
of s (a matrix per step)."""


def affine_scan(
    carry: Carry,
    drive: torch.Tensor,
    initial: torch.Tensor | None = None,
    *,
    reverse: bool = False,
) -> torch.Tensor:
    """All values of h[t] = carry[t] h[t-1] + drive[t].

    Args:
        carry: see `Carry`; a matrix has one dimension more than `drive`.
        drive: [T, *s].
        initial: h before the first step, [*s]; zero if it is not given.
        reverse: run from the last step to the first: h[t] = carry[t] h[t+1] + drive[t].

    Returns:
        h, [T, *s].
    """
    if isinstance(carry, torch.Tensor) and carry.dim() <= drive.dim():
        carry = carry.expand_as(drive)
    if initial is not None and len(drive):
        at = -1 if reverse else 0
        first = drive[at] + apply_carry(_part(carry, at), initial)
        rest = drive[:-1] if reverse else drive[1:]
        drive = torch.cat([rest, first[None]] if reverse else [first[None], rest])
    if isinstance(carry, float | int):
        if carry == 0:
            return drive
        if carry == 1:
            return drive.flip(0).cumsum(0).flip(0) if reverse else drive.cumsum(0)
        carry = drive.new_full((1,) * drive.dim(), carry).expand(
            len(drive), *[1] * (drive.dim() - 1)
        )
    return Scan(carry, matrices=carry.dim() > drive.dim(), reverse=reverse)(drive)


class Scan:
    """h[t] = carry[t] h[t-1] + drive[t] for one carry and any number of drives.

    The products of carries that a scan needs are made once, here.

    Args:
        carry: one diagonal or one matrix for each step; that of the step that comes first is not
            used, since nothing comes before it.
        matrices: which of the two.
        reverse: as for `affine_scan`.
    """

    def __init__(self, carry: torch.Tensor, *, matrices: bool, reverse: bool = False) -> None:
        self.matrices, self.reverse = matrices, reverse
        self.levels = [carry.flip(0) if reverse else carry]
        while len(self.levels[-1]) > 1:
            a = self.levels[-1]
            stop = len(a) // 2 * 2
            first, second = a[0:stop:2], a[1:stop:2]
            self.levels.append(second @ first if matrices else second * first)

    def __call__(self, drive: torch.Tensor) -> torch.Tensor:
        """All values of h, [T, *s], for a drive of [T, *s]."""
        if self.reverse:
            return self._solve(drive.flip(0), 0).flip(0)
        return self._solve(drive, 0)

    def _solve(self, b: torch.Tensor, level: int) -> torch.Tensor:
        steps = len(b)
        if steps < 2:
            return b
        a, pairs = self.levels[level], steps // 2
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        odd = self._solve(self._advance(a[second], b[first], b[second]), level + 1)
        later = slice(2, steps, 2)  # the even steps but the first
        even = torch.cat([b[:1], self._advance(a[later], odd[: (steps - 1) // 2], b[later])])
        woven = torch.stack([even[:pairs], odd], 1).flatten(0, 1)
        return torch.cat([woven, even[pairs:]]) if steps % 2 else woven

    def _advance(self, a: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return b + apply_carry(a, h) if self.matrices else torch.addcmul(b, a, h)


def apply_carry(carry: Carry, h: torch.Tensor) -> torch.Tensor:
    """The product of a carry and a state of the same leading dimensions."""
    if isinstance(carry, torch.Tensor) and carry.dim() > h.dim():
        return (carry @ h.unsqueeze(-1)).squeeze(-1)
    return carry * h


def _part(carry: Carry, at: int) -> Carry:
    return carry[at] if isinstance(carry, torch.Tensor) else carry
