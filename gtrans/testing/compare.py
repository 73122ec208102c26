"""Comparisons of recorded steps, element by element."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gtrans.errors import VerifyError
from gtrans.testing.measure import Values


def require_bitwise(expected: Values, found: Values, where: str) -> None:
    """Every element the same, NaN equal to NaN.

    Raises:
        VerifyError: one differs.
    """
    for name, a, b in pairs(expected, found, where):
        same = (a == b) | (a.isnan() & b.isnan())
        if not bool(same.all()):
            raise VerifyError(f"{where}{name} differs at {worst(a, b)}")


def require_near(expected: Values, found: Values, where: str, bound: float) -> None:
    """Every element within `bound` of the largest of its tensor.

    Gradients that are zero but for rounding (of a bias before a norm) have no size of their own;
    what rounding leaves there is measured by the largest gradient of the step.

    Raises:
        VerifyError: an element differs by more.
    """
    scale = largest(expected)
    for name, a, b in pairs(expected, found, where):
        # Where the reference is not finite, the other must be the same.
        regular = a.isfinite()
        same = (a == b) | (a.isnan() & b.isnan())
        own = float(torch.where(regular, a, 0).abs().max()) if a.numel() else 0.0
        allowed = bound * own + 1e-3 * bound * scale
        if not bool((same | (regular & ((a - b).abs() <= allowed))).all()):
            raise VerifyError(f"{where}{name} differs at {worst(a, b)}; allowed {allowed:.1e}")


def pairs(
    expected: Values, found: Values, where: str
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Both versions of each tensor in float64 (integers in int64).

    A compiled step gives zeros where autograd gives no gradient; both mean the same.

    Raises:
        VerifyError: a shape, dtype or name differs.
    """
    if expected.keys() != found.keys():
        raise VerifyError(f"{where}{sorted(expected.keys() ^ found.keys())} is only in one version")
    pairs = []
    for name, a in expected.items():
        b = found[name]
        if a is None and b is None:
            continue
        if a is None or b is None:
            a = torch.zeros_like(b) if a is None and b is not None else a
            b = torch.zeros_like(a) if b is None and a is not None else b
        if a is None or b is None:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerifyError(
                f"{where}{name} is {b.dtype} {tuple(b.shape)}, expected {a.dtype} {tuple(a.shape)}"
            )
        wide = torch.float64 if a.is_floating_point() else torch.int64
        pairs.append((name, a.detach().to(wide), b.detach().to(wide)))
    return pairs


def worst(a: torch.Tensor, b: torch.Tensor) -> str:
    """Where two tensors differ most, and by what."""
    difference = (a - b).abs().double()
    difference = torch.where(difference.isnan(), torch.inf, difference)
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, difference)
    index = [int(i) for i in torch.unravel_index(difference.argmax(), a.shape)]
    here = tuple(index)
    return f"{index}: {b[here].item():.17g} instead of {a[here].item():.17g}"


def rounding_bound(model: nn.Module, inputs: Sequence[Any]) -> float:
    """64 eps sqrt(K), K an upper bound of the terms of any sum in the step."""
    tensors = [t for t in (*inputs, *model.parameters()) if isinstance(t, torch.Tensor)]
    floating = [t.dtype for t in tensors if t.is_floating_point()]
    eps = max(torch.finfo(d).eps for d in floating)
    return 64 * eps * math.sqrt(max(t.numel() for t in tensors))


def largest(values: Values) -> float:
    """The largest finite element of all."""
    sizes = [
        float(torch.where(v.isfinite(), v, 0).abs().max())
        for v in values.values()
        if v is not None and v.numel() and v.is_floating_point()
    ]
    return max(sizes, default=0.0)


def flat(values: Values) -> torch.Tensor:
    """All values in one float64 vector."""
    parts = [v.double().flatten() for v in values.values() if v is not None]
    return torch.cat(parts)


def first_difference(before: str, after: str) -> str:
    """The first line in which two texts differ."""
    a, b = before.splitlines(), after.splitlines()
    for old, new in zip(a, b, strict=False):
        if old != new:
            return f"  - {old}\n  + {new}"
    longer, mark = (a, "-") if len(a) > len(b) else (b, "+")
    return "\n".join(f"  {mark} {line}" for line in longer[min(len(a), len(b)) :][:3])
