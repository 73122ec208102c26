"""Inverses of elementwise operators, solved for by sympy and tried out before they are believed.

    y = exp(x)   x = log(y)          y = c x   x = y / c        y = leaky_relu(x)   x = min(y, y/a)

An inverse that exists on paper may lose everything in floating point: artanh(tanh(20)) is inf.
So each is run there and back over the numbers that activations take, and one that does not return
them to rounding is no inverse.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

aten = torch.ops.aten

Function = Callable[[torch.Tensor], torch.Tensor]

_X, _Y = sympy.symbols("x y", real=True)

# What each operator computes of x and its numbers.
_FORMULAS: dict[Any, Callable[..., sympy.Expr]] = {
    aten.mul.Tensor: lambda x, c: c * x,
    aten.mul.Scalar: lambda x, c: c * x,
    aten.div.Tensor: lambda x, c: x / c,
    aten.div.Scalar: lambda x, c: x / c,
    aten.exp.default: sympy.exp,
    aten.expm1.default: lambda x: sympy.exp(x) - 1,
    aten.sinh.default: sympy.sinh,
    aten.asinh.default: sympy.asinh,
    aten.tanh.default: sympy.tanh,
    aten.sigmoid.default: lambda x: 1 / (1 + sympy.exp(-x)),
    aten.log.default: sympy.log,
    aten.reciprocal.default: lambda x: 1 / x,
    aten.leaky_relu.default: lambda x, a=0.01: sympy.Piecewise((x, x > 0), (a * x, True)),
}

_POSITIVE = frozenset({aten.exp.default, aten.sigmoid.default, aten.softplus.default})

_LARGEST = 64.0
"""Inverses are tried for numbers up to this size, of both signs."""


def inverse_of(node: fx.Node) -> Function | None:
    """The inverse of a call of one tensor and numbers; None if there is none that can be trusted.

    Args:
        node: a call in a joint graph.
    """
    if node.target not in _FORMULAS or node.kwargs or not node.args:
        return None
    if not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return None
    numbers = node.args[1:]
    if not all(type(n) in (int, float) for n in numbers):
        return None
    dtype = node.meta["val"].dtype
    if dtype not in _NUMPY or dtype != node.args[0].meta["val"].dtype:
        return None
    return _tried(node.target, numbers, dtype)


def is_never_zero(node: fx.Node) -> bool:
    """Whether a value is positive by the way it is made: an exponential, a sigmoid, shifted up."""
    while True:
        if node.target in _POSITIVE:
            return True
        given = node.args[1] if len(node.args) == 2 else None
        number = given if isinstance(given, (int, float)) else -1.0
        rises = node.target is aten.add.Tensor and number >= 0
        grows = node.target is aten.mul.Tensor and number > 0
        kept = node.target in (aten._to_copy.default, aten.view.default, aten.clone.default)
        if not (rises or grows or kept) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]


@cache
def _tried(target: Any, numbers: tuple[Any, ...], dtype: torch.dtype) -> Function | None:
    """The first solution that gives back every number it is tried on.

    In numpy, because torch's tensors are fake while a graph is rewritten.
    """
    formula = _FORMULAS[target](_X, *(sympy.Rational(*n.as_integer_ratio()) for n in numbers))
    sizes = np.logspace(-24, 0, 4096, base=2) * _LARGEST
    x = np.concatenate([-sizes[::-1], sizes]).astype(_NUMPY[dtype])
    allowed = 64 * np.finfo(x.dtype).eps * np.maximum(np.abs(x), 1)
    with np.errstate(all="ignore"):
        y = (sympy.lambdify(_X, formula, "numpy")(x) + 0 * x).astype(x.dtype)
        for solution in solutions(formula):
            back = sympy.lambdify(_Y, solution, "numpy")(y)
            if np.all(np.abs(back - x) <= allowed):  # no number passes for NaN
                made: Function = sympy.lambdify(_Y, solution, modules=[_TORCH, "numpy"])
                return made
    return None


def solutions(formula: sympy.Expr) -> list[sympy.Expr]:
    """The solutions x of `formula(x) = y` as expressions of `y`; some may hold for no real y.

    Args:
        formula: an expression of the real symbol `x`, or one of several pieces.
    """
    pieces = formula.args if isinstance(formula, sympy.Piecewise) else [(formula, sympy.true)]
    choices: list[list[Any]] = [[]]
    for piece, condition in pieces:
        # A condition on x holds for y where it holds for the solution.
        found = sympy.solve(sympy.Eq(piece, _Y), _X)
        choices = [[*c, (s, condition.subs(_X, s))] for c in choices for s in found]
    return [c[0][0] if len(c) == 1 else sympy.Piecewise(*c) for c in choices]


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _select(conditions: list[Any], values: list[Any], default: float) -> Any:
    """numpy's `select`, in which sympy writes pieces."""
    chosen: Any = default
    for condition, value in zip(reversed(conditions), reversed(values), strict=True):
        chosen = value if condition is True else torch.where(condition, value, chosen)
    return chosen


_TORCH = {
    "select": _select,
    **{name: getattr(torch, name) for name in ("exp", "log", "sinh", "sqrt")},
    **{name: getattr(torch, name) for name in ("less", "less_equal", "greater", "greater_equal")},
}
