"""Keep a code of the derivative of an activation, 1 to 4 bits an element, and not its input.

    y  = h(x)                                 y     = h(x)
                                              bits  = pack(code(x))          # saved
    dx = dy * h'(x)                    -->    dx    = dy * level[unpack(bits)]

Several passes do this, with tables of their own: `gtrans.analysis.derivative_tables`.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from gtrans.analysis.derivative_tables import Samples, Table
from gtrans.analysis.pointwise import Activation, activation_at
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.rewrite.late import seed_of, splice_late
from gtrans.runtime.bits import join, pack_codes, packed_dim, split, unpack_codes
from gtrans.runtime.noise import uniform, uniforms


@dataclass(frozen=True)
class DerivativeCodes:
    """How the derivative of activations is kept.

    Args:
        bits: bits per element, 1 to 4.
    """

    bits: int

    def obstacle(self, activation: Activation) -> str | None:
        """Why the shape or layout of an activation rules codes out, or None."""
        val, dx = activation.x.meta["val"], activation.dx.meta["val"]
        if packed_dim(val) is None and not all(isinstance(n, int) for n in val.shape):
            return "its shape is dynamic and no dimension of known size is a multiple of 8"
        if not dx.is_contiguous() and activation.dy.meta["val"].stride() != dx.stride():
            return "the gradient changes its layout here"
        return None

    def bytes(self, activation: Activation) -> float:
        """What is kept of an activation."""
        return numel(activation.x.meta["val"]) * self.bits / 8

    def rewrite(self, table: Table, graph: JointGraph, site: fx.Node) -> None:
        """Packs codes in the forward and reads levels in the backward.

        Args:
            table: the levels.
            graph: the graph to edit.
            site: the gradient at the input of an activation.
        """
        activation = codes_at(graph, site)
        x, dx = activation.x, activation.dx
        val, gradient = x.meta["val"], dx.meta["val"]
        dim = packed_dim(val)
        if table.thresholds:
            sources = [x]
            encode = partial(_nearest, table, self.bits, dim)
        else:
            sources = [x, seed_of(graph, f"{x.name} {dx.name}")]
            encode = partial(_stochastic, activation, table, self.bits, dim)
        packed = graph.splice_after(x, encode, *sources)
        shape = () if dim is not None else tuple(val.shape)
        contiguous = gradient.is_contiguous()
        decode = partial(_scale, table, self.bits, dim, shape, contiguous, gradient.dtype)
        (made,) = splice_late(graph, dx, decode, activation.dy, *packed)
        graph.replace(dx, made)
        for node in reversed(activation.backward[:-1]):
            graph.erase(node)


def obstacle_to_levels(samples: Samples | None) -> str | None:
    """Why no table of levels can stand for a derivative, or None."""
    if samples is None:
        return "the gradient is not linear in the incoming one"
    if not samples.is_finite:
        return "its derivative is not finite between -10 and 10"
    if not samples.is_bounded:
        return "its derivative is not bounded"
    if samples.is_piecewise_constant:
        return "piecewise linear: a mask keeps its derivative exactly"
    return None


def codes_at(graph: JointGraph, site: fx.Node) -> Activation:
    """The activation of a site that a search in the same graph found."""
    activation = activation_at(graph, site)
    assert activation is not None
    return activation


def _nearest(table: Table, bits: int, dim: int | None, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wide = x.to(_wide(x.dtype))
    codes = torch.zeros_like(wide)
    for threshold in table.thresholds:
        codes = codes + torch.where(wide > threshold, 1.0, 0.0)
    return pack_codes(codes, bits, dim)


def _stochastic(
    activation: Activation,
    table: Table,
    bits: int,
    dim: int | None,
    x: torch.Tensor,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    def drawn(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        slope = activation.derivative(x.to(_wide(x.dtype)))
        return ((slope - table.levels[0]) * (1 / table.step) + u).floor().clamp(0, 2**bits - 1)

    if dim is None or 8 % bits:
        return pack_codes(drawn(x, uniform(seed, x.shape)), bits, dim)
    planes = split(x, bits, dim)
    draws = uniforms(seed, planes[0].shape, len(planes))
    return (join([drawn(*pair) for pair in zip(planes, draws, strict=True)], bits),)


def _scale(
    table: Table,
    bits: int,
    dim: int | None,
    shape: tuple[int, ...],
    contiguous: bool,
    dtype: torch.dtype,
    dy: torch.Tensor,
    *packed: torch.Tensor,
) -> torch.Tensor:
    codes = unpack_codes(packed, bits, dim, shape)
    wide = _wide(dtype)
    if table.thresholds:
        level = _select(codes.to(torch.int32), table.levels, 0, wide)
    else:
        level = codes.to(wide) * table.step + table.levels[0]
    dx = (dy.to(wide) * level).to(dtype)
    return dx.contiguous() if contiguous else dx


def _select(
    codes: torch.Tensor, levels: tuple[float, ...], first: int, dtype: torch.dtype
) -> torch.Tensor:
    """Looks up the levels of codes from `first` on, without a table in memory."""
    if len(levels) == 1:
        return torch.scalar_tensor(levels[0], dtype=dtype, device=codes.device)
    half = len(levels) // 2
    low = _select(codes, levels[:half], first, dtype)
    high = _select(codes, levels[half:], first + half, dtype)
    return torch.where(codes >= first + half, high, low)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
