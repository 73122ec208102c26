"""Elementwise inverses: believed only where they give back what went in."""

import pytest
import sympy
import torch
from torch import fx

from gtrans.analysis.inverses import inverse_of, solutions

aten = torch.ops.aten


def call(target: object, *numbers: float, dtype: torch.dtype = torch.float32) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(target, (x, *numbers))  # type: ignore[arg-type]
    x.meta["val"] = y.meta["val"] = torch.empty(3, dtype=dtype)
    return y


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        (aten.mul.Tensor, (0.9,)),
        (aten.mul.Tensor, (-3,)),
        (aten.div.Tensor, (7.0,)),
        (aten.exp.default, ()),
        (aten.asinh.default, ()),
        (aten.leaky_relu.default, ()),
        (aten.leaky_relu.default, (0.3,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(target: object, numbers: tuple[float, ...], dtype: torch.dtype) -> None:
    inverse = inverse_of(call(target, *numbers, dtype=dtype))
    assert inverse is not None
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64).to(dtype)
    there = target(x, *numbers)  # type: ignore[operator]
    assert ((inverse(there) - x).abs() <= 64 * torch.finfo(dtype).eps * x.abs().clamp(min=1)).all()


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        (aten.tanh.default, ()),  # flat for large numbers
        (aten.sigmoid.default, ()),
        (aten.sinh.default, ()),  # as sympy solves it, log(y + sqrt(y^2 + 1)), it cancels
        (aten.expm1.default, ()),  # its inverse log(y + 1) cancels
        (aten.log.default, ()),  # not defined for negative numbers
        (aten.mul.Tensor, (0.0,)),
        (aten.leaky_relu.default, (-0.5,)),  # two numbers have one image
        (aten.relu.default, ()),
    ],
)
def test_what_loses_numbers_has_no_inverse(target: object, numbers: tuple[float, ...]) -> None:
    assert inverse_of(call(target, *numbers)) is None


def test_low_precision_and_two_tensors_have_none() -> None:
    assert inverse_of(call(aten.mul.Tensor, 0.9, dtype=torch.bfloat16)) is None
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert inverse_of(graph.call_function(aten.mul.Tensor, (x, y))) is None


def test_sympy_solves_piece_by_piece() -> None:
    x, y = sympy.symbols("x y", real=True)
    (found,) = solutions(sympy.Piecewise((x, x > 0), (x / 4, True)))
    assert found.subs(y, 3) == 3
    assert found.subs(y, -3) == -12
