"""Values as linear combinations of others, and what two of them say about a third.

    y1 = y0 + h/2 (f0 + f1)                 2 y1 - z1 = z0 + h f1
    z1 = 2 y0 - z0 + h f0          -->      (y0 and f0 = f(z0) both drop out)

That is a step of the reversible Heun method: neither sum can be undone alone, both together can.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from gtrans.ir import ops

aten = torch.ops.aten

Form = dict[fx.Node, Fraction]


def linear_form(node: fx.Node) -> Form:
    """A value as a sum of multiples of others.

    Sums, differences and products with numbers are taken apart as long as nobody else reads them;
    what several nodes read stands for itself.
    """
    found: Counter[fx.Node] = Counter()
    pending: list[tuple[fx.Node, Fraction]] = [(node, Fraction(1))]
    while pending:
        top, factor = pending.pop()
        terms = _terms(top) if top is node or len(top.users) == 1 else None
        if terms is None:
            found[top] += factor  # type: ignore[assignment]  # counts fractions
        else:
            pending += [(n, factor * f) for n, f in terms]
    return {n: Fraction(f) for n, f in found.items() if f}


@dataclass(frozen=True)
class Elimination:
    """`first y + second z` as a combination of fewer values.

    Attributes:
        first: multiple of the one.
        second: multiple of the other.
        rest: what their sum is.
    """

    first: Fraction
    second: Fraction
    rest: Form


def eliminations(y: Form, z: Form) -> Iterator[Elimination]:
    """The combinations of two forms in which more than one shared value drops out."""
    shared = [n for n in y if n in z]
    for node in shared:
        first, second = z[node], -y[node]
        rest = {n: first * y.get(n, Fraction(0)) + second * z.get(n, Fraction(0)) for n in y | z}
        rest = {n: f for n, f in rest.items() if f}
        if sum(n not in rest for n in shared) > 1:
            yield Elimination(first, second, rest)


def combination(*values: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """The sum of some values with weights."""
    total = weights[0] * values[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + weight * value
    return total


def _terms(node: fx.Node) -> list[tuple[fx.Node, Fraction]] | None:
    """What a node adds up; None if it is no sum, difference or multiple."""
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        first, second = node.args[:2]
        alpha: Any = ops.argument(node, "alpha", 1)
        if isinstance(first, fx.Node) and isinstance(second, fx.Node):
            sign = -1 if node.target is aten.sub.Tensor else 1
            return [(first, Fraction(1)), (second, sign * Fraction(alpha))]
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        value, number = node.args
        if isinstance(value, fx.Node) and type(number) in (int, float) and number:
            factor = Fraction(number)  # type: ignore[arg-type]  # a number
            return [(value, factor if node.target is aten.mul.Tensor else 1 / factor)]
    if node.target is aten.neg.default and isinstance(node.args[0], fx.Node):
        return [(node.args[0], Fraction(-1))]
    return None
