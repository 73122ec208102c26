"""Keep one to four bits of an activation's derivative for the backward instead of its input.

    y  = h(x)                                 y     = h(x)
                                              bits  = pack(code(x))          # saved, 1 to 4 bits
    dx = dy * h'(x)                    -->    dx    = dy * level[unpack(bits)]

Code, stochastic: h'(x) rounded at random to one of two neighbouring levels, with the probabilities
that make its expectation h'(x). Code, nearest: how many thresholds are smaller than x.

Shapes: x, y, dx, dy: [*s] of one floating dtype; bits: uint8 of numel * b / 8 bytes.
Saves: numel * (itemsize - b / 8) bytes per match, where nothing else keeps x: a next layer that is
    frozen, as under LoRA. Where x stays for something else, the match is left as it is.
Costs: h'(x) and one random number per element in the forward; shifts and selects in the backward.
Contract: stochastic is unbiased (up to rounding of the working dtype); nearest is close: every
    element of dx is off by at most rtol / 2 * |dy|, where |dx| is about |dy| / 2 or more on
    average. A NaN in x does not come back in dx.
Needs: nothing of the model. Stochastic rounding draws from torch's generator in the forward, so
    that dropout draws other masks after it than it would without this pass.
Source: few-bit backward (arXiv:2202.00441), its dynamic program in `gtrans.analysis`; stochastic
    rounding of the derivative: gtrans. Not done: weights from measured histograms of x.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from gtrans.analysis.derivative_tables import (
    Table,
    Weight,
    nearest_table,
    samples_of,
    stochastic_table,
)
from gtrans.analysis.pointwise import Activation, activation_at, find_activations
from gtrans.contract import Close, Contract, Unbiased
from gtrans.core import HELD_BACK, Knob, Permission, SitePass, Stats, require
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import human, numel
from gtrans.plan.worth import Candidate, keep_what_pays
from gtrans.runtime.bits import pack_codes, unpack_codes

aten = torch.ops.aten


@dataclass(frozen=True)
class FewBit(SitePass[JointGraph]):
    """Replace the saved inputs of smooth pointwise activations by a few bits per element.

    Args:
        bits: bits per element, 1 to 4.
        rounding: "stochastic" is unbiased; "nearest" has the smaller error, always the same.
        weight: where "nearest" is to be good: "uniform" on [-10, 10], or "normal" for x ~ N(0, 1).
        min_numel: leave activations with fewer elements alone.
    """

    name: ClassVar[str] = "few-bit"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    bits: int = 2
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    weight: Weight = "uniform"
    min_numel: int = 4096

    def __post_init__(self) -> None:
        require(1 <= self.bits <= 4, f"few-bit: bits must be 1, 2, 3 or 4, got {self.bits}")
        require(self.min_numel >= 1, f"few-bit: min_numel must be at least 1, got {self.min_numel}")

    @property
    def contract(self) -> Contract:
        """Unbiased over the rounding, or close, with a bound that every table used keeps."""
        if self.rounding == "stochastic":
            return Unbiased(noise=frozenset({self.name}))
        return Close(rtol=2.0 ** (2 - self.bits))

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The gradient at the input of every pointwise activation."""
        return [a.dx for a in find_activations(graph)]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses what a table cannot stand for; whether it pays is decided by planning."""
        activation = _at(graph, site)
        val = activation.x.meta["val"]
        if numel(val) < self.min_numel:
            return "fewer elements than min_numel"
        if _packed_dim(val) is None and not all(isinstance(n, int) for n in val.shape):
            return "its shape is dynamic and no dimension of known size is a multiple of 8"
        dx = site.meta["val"]
        if not dx.is_contiguous() and activation.dy.meta["val"].stride() != dx.stride():
            return "the gradient changes its layout here"
        samples = samples_of(activation)
        if samples is None:
            return "the gradient is not linear in the incoming one"
        if not samples.is_finite:
            return "its derivative is not finite between -10 and 10"
        if not samples.is_bounded:
            return "its derivative is not bounded"
        if samples.is_piecewise_constant:
            return "piecewise linear: a mask keeps its derivative exactly"
        promise = self.contract
        if isinstance(promise, Close) and self._table(activation).largest > promise.rtol / 2:
            return f"{self.bits} bits cannot follow its derivative as closely as promised"
        return None

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Rewrites the sites that save bytes once the whole graph is planned."""
        stats = Stats()
        candidates: list[Candidate] = []
        for site in list(self.sites(graph)):
            stats.matched += 1
            reason = self.refuse(graph, site)
            if reason is None:
                found = _at(graph, site)
                size = numel(found.x.meta["val"]) * self.bits / 8
                candidates.append(Candidate(site, found.dy, found.x, size))
            else:
                stats.refuse(site, reason)
        verdict = keep_what_pays(graph, candidates, self.rewrite)
        stats.refuse_all(verdict.refused)
        notes: Counter[str] = Counter()
        for site in verdict.chosen:
            if not permitted(site.name):
                stats.refuse(site, HELD_BACK)
                continue
            notes[self._note(self._table(_at(graph, site)))] += 1
            self.rewrite(graph, site)
            stats.rewritten += 1
        stats.notes += [f"{count} x {note}" for note, count in notes.items()]
        if verdict.chosen:
            change = f"{human(verdict.bytes_before)} -> {human(verdict.bytes_after)}"
            stats.notes.append(f"saved for backward, once planned: {change}")
        return stats

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Packs codes in the forward and reads levels in the backward."""
        activation, table = _at(graph, site), self._table(_at(graph, site))
        val = activation.x.meta["val"]
        dim = _packed_dim(val)
        encode = partial(_encode, activation, table, self.bits, dim)
        packed = graph.splice_after(activation.x, encode, activation.x)
        shape = [] if dim is not None else list(val.shape)
        contiguous = site.meta["val"].is_contiguous()
        decode = partial(_scale, table, self.bits, dim, shape, contiguous, site.meta["val"].dtype)
        before = site.prev
        (dx,) = graph.splice_before(site, decode, activation.dy, *packed)
        while before.next is not site:
            before = before.next
            if graph.is_forward(before):  # levels: what is kept is their packed form
                graph.rebuild_in_backward(before)
        graph.replace(site, dx)
        for node in reversed(activation.backward[:-1]):
            graph.erase(node)

    def _table(self, activation: Activation) -> Table:
        samples = samples_of(activation)
        assert samples is not None
        if self.rounding == "nearest":
            return nearest_table(samples, self.bits, self.weight)
        return stochastic_table(samples, self.bits)

    def _note(self, table: Table) -> str:
        return (
            f"{self.bits} bits for an activation; predicted error of its gradient: relative "
            f"{table.relative:.3f} for x ~ N(0, 1), at most {table.largest:.3f} |dy|"
        )


def _at(graph: JointGraph, site: fx.Node) -> Activation:
    activation = activation_at(graph, site)
    assert activation is not None  # sites come from the same search
    return activation


def _packed_dim(val: torch.Tensor) -> int | None:
    """The outermost dimension that divides by eight: its planes are the longest runs."""
    for dim, size in enumerate(val.shape):
        if isinstance(size, int) and size % 8 == 0 and size > 0:
            return dim
    return None


def _encode(
    activation: Activation, table: Table, bits: int, dim: int | None, x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    wide = x.to(_wide(x.dtype))
    if table.thresholds:
        codes = (wide > table.thresholds[0]).to(torch.uint8)
        for threshold in table.thresholds[1:]:
            codes = codes + (wide > threshold).to(torch.uint8)
    else:
        low, step = table.levels[0], table.levels[1] - table.levels[0]
        position = (activation.derivative(wide) - low) * (1 / step)
        drawn = (position + torch.rand_like(position)).floor()
        codes = drawn.clamp(0, 2**bits - 1).to(torch.uint8)
    return pack_codes(codes, bits, dim)


def _scale(
    table: Table,
    bits: int,
    dim: int | None,
    shape: list[int],
    contiguous: bool,
    dtype: torch.dtype,
    dy: torch.Tensor,
    *packed: torch.Tensor,
) -> torch.Tensor:
    codes = unpack_codes(packed, bits, dim, shape)
    level = _select(codes, table.levels, bits - 1, _wide(dtype))
    dx = (dy.to(level.dtype) * level).to(dtype)
    return dx.contiguous() if contiguous else dx


def _select(
    codes: torch.Tensor, levels: tuple[float, ...], bit: int, dtype: torch.dtype
) -> torch.Tensor:
    """Looks levels up by the bits of their codes, without a table in memory."""
    if bit < 0:
        return torch.scalar_tensor(levels[0], dtype=dtype, device=codes.device)
    half = len(levels) // 2
    low = _select(codes, levels[:half], bit - 1, dtype)
    high = _select(codes, levels[half:], bit - 1, dtype)
    return torch.where(((codes >> bit) & 1).to(torch.bool), high, low)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
