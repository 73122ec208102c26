"""Arithmetic of streams that can be run backwards without losing a bit.

Numbers on the grid 2^-bits are kept as float64: sums and differences of them are exact as long as
they stay below 2^(53 - bits). What a product by less than one would lose is kept beside it:

    scale     V = q d + r          v' = q n + s,     store' = (store d + r) div n     (n < d)
              s = (store d + r) mod n
    halve     s = X mod 2          h = sign (X + s) / 2

Both use floor division, so that they are exact for negative numbers too (division that truncates,
with a remainder that is never negative, is not).

Source: exact multiplication of Maclaurin et al. (arXiv:1502.03492), section 2; BDIA
(arXiv:2407.09093). The gradient passes the rounding as if it were not there.
"""

from fractions import Fraction
from typing import Any

import torch

STORE_BITS = 62
"""Information that a store of one int64 an element can hold."""


class _OnGrid(torch.autograd.Function):
    """Rounds to a multiple of 2^-bits; its derivative is taken to be one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.dtype = x.dtype
        return torch.round(x.double() * 2.0**bits) * 2.0**-bits

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        return cotangents[0].to(ctx.dtype), None


def on_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds to a multiple of 2^-bits, with a straight-through derivative.

    Args:
        x: floating, of any shape.
        bits: binary places after the point.

    Returns:
        float64.
    """
    rounded: torch.Tensor = _OnGrid.apply(x, bits)  # type: ignore[no-untyped-call]
    return rounded


def most_links(factor: Fraction) -> int:
    """How many products by a factor one store holds the remainders of."""
    links = 0
    held = Fraction(1)
    while held * factor.denominator < 2**STORE_BITS:
        held = held / factor
        links += 1
    return links


@torch.library.custom_op("gtrans::scale", mutates_args=())
def scale(
    v: torch.Tensor, store: torch.Tensor, numerator: int, denominator: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """v times a fraction below one, and a store from which `unscale` gets v back exactly.

    Args:
        v: float64 on the grid, of any shape.
        store: int64 of the same shape, not negative; zeros to begin with.
        numerator: n.
        denominator: d > n.
        bits: of the grid.

    Returns:
        The product, rounded to the grid, and the store.
    """
    return _moved(v, store, numerator, denominator, bits)


@torch.library.custom_op("gtrans::unscale", mutates_args=())
def unscale(
    scaled: torch.Tensor, store: torch.Tensor, numerator: int, denominator: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `scale`, with the same fraction."""
    return _moved(scaled, store, denominator, numerator, bits)


def _moved(
    v: torch.Tensor, store: torch.Tensor, numerator: int, denominator: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = (v * 2.0**bits).to(torch.int64)
    quotient = torch.div(whole, denominator, rounding_mode="floor")
    store = store * denominator + (whole - quotient * denominator)
    rest = torch.div(store, numerator, rounding_mode="floor")
    whole = quotient * numerator + (store - rest * numerator)
    return whole.to(torch.float64) * 2.0**-bits, rest


@torch.library.custom_op("gtrans::halve", mutates_args=())
def halve(x: torch.Tensor, sign: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of x with a sign, on the same grid, and the bit from which `unhalve` gets x back.

    Args:
        x: float64 on the grid, of any shape.
        sign: 1 or -1, float64, broadcast over x.
        bits: of the grid.

    Returns:
        The half, and whether x was odd (bool, of the shape of x).
    """
    whole = x * 2.0**bits
    odd = torch.remainder(whole, 2.0)
    return sign * (whole + odd) * 2.0 ** (-bits - 1), odd != 0


def unhalve(half: torch.Tensor, odd: torch.Tensor, sign: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `halve`."""
    return 2.0 * sign * half - odd.to(half.dtype) * 2.0**-bits


def signs(x: torch.Tensor) -> torch.Tensor:
    """1 or -1 for each sample, drawn; float64, [B, 1, ...] for x: [B, ...]."""
    shape = [size if i == 0 else 1 for i, size in enumerate(x.shape)]
    draw = torch.randint(0, 2, shape, device=x.device)
    return (2 * draw - 1).to(torch.float64)


def bdia_mean(x: torch.Tensor, branch: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """(1 - g) x + (1 + g) f(x) with g = sign / 2, in float64."""
    half = 0.5 * sign
    return (1 - half) * x + (1 + half) * branch.to(torch.float64)


def unscaled_value(*arguments: Any) -> torch.Tensor:
    """The value of `unscale`."""
    value: torch.Tensor = unscale(*arguments)[0]
    return value


def unscaled_store(*arguments: Any) -> torch.Tensor:
    """The store of `unscale`."""
    store: torch.Tensor = unscale(*arguments)[1]
    return store


@scale.register_fake
@unscale.register_fake
def _(
    v: torch.Tensor, store: torch.Tensor, numerator: int, denominator: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(v), torch.empty_like(store)


@halve.register_fake
def _(x: torch.Tensor, sign: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _remember_factor(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.factor = inputs[2] / inputs[3]


def _scale_backward(ctx: Any, dv: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    return dv * ctx.factor, None, None, None, None


def _remember_sign(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(inputs[1])


def _halve_backward(ctx: Any, dx: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    (sign,) = ctx.saved_tensors
    return dx * (0.5 * sign), None, None


scale.register_autograd(_scale_backward, setup_context=_remember_factor)
halve.register_autograd(_halve_backward, setup_context=_remember_sign)

SCALE = torch.ops.gtrans.scale.default
HALVE = torch.ops.gtrans.halve.default
