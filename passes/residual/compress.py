"""Keep forward values in 2, 4 or 8 bits where the gradient stays unbiased.

    y  = relu(a), gelu(a), attention, ...     y
                                              low, span, codes = encode(y)     # saved
    dw = mm(dz, y)                     -->    dw = mm(dz, decode(low, span, codes))

Values that the backward is affine in (operands of products and convolutions, factors, the values
and outputs of attention, inputs of norms and outputs of softmax in two copies) are rounded at
random, group by group, with the expectation they have. Outputs of ReLU keep their zeros, and so
their mask, exactly. A fused product of queries, keys and values is kept slice by slice. Pointwise
activations keep their derivative, to which their gradient is linear, in codes as `few-bit` does.

Shapes: a value: [*s], floating; codes: uint8, numel * bits / 8 bytes; low, span: one of each a
    group, 8 bytes, once for all copies; averages of spatial maps: 2 bytes a block.
Saves: numel * (itemsize - bits / 8 - 8 / group) per value; the plan decides which values pay,
    together with the derivatives, and all is rolled back unless its bytes fall.
Costs: one pass for the range of each group and one to code in the forward, one to decode.
Contract: stochastic is unbiased: every gradient is affine in each coded copy, copies have
    independent noise, and no gradient made of a value flows into another reader of it. Nearest is
    close at 8 bits and only aligned below. A NaN or infinity spoils its group.
Needs: nothing of the model. Below 8 bits, and with random rounding, values that any reader is not
    affine in stay as they are, with the reason: queries and keys of fused attention. Nearest
    rounding to 8 bits takes those as well, unless their reader compares them with something, and
    does without codes of derivatives.
Source: see `gtrans.runtime.quantise`. Norms and softmax in two copies, zeros with a code of their
    own, and one choice for values and derivatives together: gtrans. Not done: running range
    estimates (Mesa), bits per sample (ActNN).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from gtrans.analysis.derivative_tables import nearest_table, stochastic_table
from gtrans.analysis.linear_uses import Role, flows_into_another, norm_use, uses_of
from gtrans.analysis.pointwise import find_activations
from gtrans.analysis.rounding import relative_error
from gtrans.contract import Aligned, Close, Contract, Unbiased
from gtrans.core import Knob, require
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.ir.printer import target_name
from gtrans.ir.sizes import numel
from gtrans.plan.slopes import slope_proposal
from gtrans.plan.widths import Widths
from gtrans.plan.worth import Candidate, PayingPass
from gtrans.rewrite.coded_slices import Slices, order_of, slices_of
from gtrans.rewrite.coded_values import CodedValue, coded_value
from gtrans.runtime.quantise import Grid, group_size, memory_order

_ROUNDED = Close(rtol=0.1)
_NO_GROUPS = "its inner sizes do not divide into groups of a multiple of 8"
# The averages of smaller blocks take more than half a bit an element, which codes use better.
_SMALLEST_SIDE = 6
# The heads of an attention have four dimensions as well, but no neighbours.
_SPATIAL = ("convolution", "batch_norm", "pool2d", "upsample")
_CODED = (Role.LINEAR, Role.NORM, Role.SOFTMAX)


@dataclass(frozen=True)
class Compress(PayingPass):
    """Keep values for the backward as small whole numbers.

    Args:
        bits: per element of a value: 8, 4 or 2.
        group: elements that share their range, at most.
        rounding: "stochastic" is unbiased; "nearest" has half the variance, and a bias.
        slope_bits: per element of an activation's derivative, 1 to 4.
        block: largest side of the blocks of spatial maps whose averages are kept apart; 0: none.
        min_numel: leave values with fewer elements alone.
        widths: bits of single values, as `gtrans.adapt` chooses them; the others have `bits`.
    """

    name: ClassVar[str] = "compress"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    bits: int = 4
    group: int = 256
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    slope_bits: int = 2
    block: int = 8
    min_numel: int = 4096
    widths: Widths | None = None

    def __post_init__(self) -> None:
        require(self.bits in (2, 4, 8), f"compress: bits must be 2, 4 or 8, got {self.bits}")
        require(self.group >= 8, f"compress: group must be at least 8, got {self.group}")
        require(
            1 <= self.slope_bits <= 4,
            f"compress: slope_bits must be 1, 2, 3 or 4, got {self.slope_bits}",
        )
        require(self.block >= 0, f"compress: block must not be negative, got {self.block}")
        require(
            self.min_numel >= 1, f"compress: min_numel must be at least 1, got {self.min_numel}"
        )

    @property
    def contract(self) -> Contract:
        """Unbiased over the rounding; nearest is close at 8 bits."""
        if self.rounding == "stochastic":
            return Unbiased(noise=frozenset({self.name}))
        return _ROUNDED if self.bits == 8 else Aligned()

    def proposals(self, graph: JointGraph) -> Iterable[Candidate | str]:
        """Every activation's derivative, and every value that some backward node is affine in."""
        # Eight bits stand for any value, so that no derivative needs codes.
        activations = [] if self._any_reader else find_activations(graph)
        table = partial(
            nearest_table if self.rounding == "nearest" else stochastic_table, bits=self.slope_bits
        )
        slopes = [slope_proposal(a, self.slope_bits, self.min_numel, table) for a in activations]
        # What computes a derivative that has codes of its own asks for no values; nor does what
        # this pass has made.
        others = {
            node.name
            for activation, slope in zip(activations, slopes, strict=True)
            if isinstance(slope, Candidate)
            for node in activation.backward
        }
        others |= {n.name for n in graph.nodes if n.op != "output" and tag(n).made_by == self.name}
        norms = [norm_use(n) for n in graph.nodes if graph.is_backward(n)]
        images = {n.y for n in norms if n is not None}  # made of the codes of the norm's input
        values = [
            n
            for n in graph.nodes
            if n not in images and _is_value(graph, n) and self._has_use(graph, n, others)
        ]
        return [*slopes, *(self._value(graph, n, others) for n in values)]

    @property
    def _any_reader(self) -> bool:
        """Whether values are coded for readers that are not affine in them as well."""
        return self.bits == 8 and self.rounding == "nearest"

    def _has_use(self, graph: JointGraph, value: fx.Node, others: Collection[str]) -> bool:
        uses = [u for u in uses_of(graph, value) if u.reader.name not in others]
        return any(u.role in _CODED or self._any_reader for u in uses)

    def _value(self, graph: JointGraph, value: fx.Node, others: Collection[str]) -> Candidate | str:
        val = value.meta["val"]
        if numel(val) < self.min_numel:
            return "fewer elements than min_numel"
        if sum(not isinstance(n, int) for n in val.shape) > 1:
            return "several of its sizes are dynamic"
        slices = None if self._any_reader else slices_of(graph, value, others)
        if slices is not None:
            return self._sliced(graph, slices, others)
        grid = self._grid(graph, value)
        if grid is None:
            return _NO_GROUPS
        code = partial(coded_value, grid=grid, others=others, any_reader=self._any_reader)
        coded = code(graph, value)
        if not coded.readers:
            return "its readers compare it with something"
        reader = None if self._any_reader else flows_into_another(coded.noisy_readers)
        if reader is not None:
            return (
                "its noise would multiply with itself: a gradient made of it flows into "
                f"{target_name(reader)}, which reads it as well"
            )

        def rewrite(graph: JointGraph, site: fx.Node) -> None:
            code(graph, site).rewrite(graph)

        return Candidate(value, value, coded.bytes, coded.let_go, rewrite, self._note(coded))

    def _sliced(
        self, graph: JointGraph, slices: Slices, others: Collection[str]
    ) -> Candidate | str:
        """One slice of a value in codes, and copies of the others."""
        inner = [[n.meta["val"].shape[d] for d in order_of(n.meta["val"])] for n in slices.coded]
        groups = [group_size(sizes, self.group) for sizes in inner]
        group = min((n for n in groups if n is not None), default=0)
        if None in groups:
            return _NO_GROUPS
        reader = flows_into_another({u.reader for uses in slices.coded.values() for u in uses})
        if reader is not None:
            return f"its noise would multiply with itself in {target_name(reader)}"
        bits, stochastic = self._bits(graph, slices.value), self.rounding == "stochastic"
        grid = Grid(bits, group, (), stochastic=stochastic)

        def rewrite(graph: JointGraph, site: fx.Node) -> None:
            found = slices_of(graph, site, others)
            assert found is not None
            found.rewrite(graph, grid)

        value, note = slices.value, f"{grid.bits} bits for a slice, copies of the other slices"
        return Candidate(value, value, slices.bytes(grid), slices.let_go, rewrite, note)

    def _bits(self, graph: JointGraph, value: fx.Node) -> int:
        chosen = None if self.widths is None else self.widths.of(graph, value)
        return chosen or self.bits

    def _grid(self, graph: JointGraph, value: fx.Node) -> Grid | None:
        val = value.meta["val"]
        order = memory_order(val)
        if order is None:
            return None
        group = group_size([val.shape[d] for d in order], self.group)
        if group is None:
            return None
        zeros = any(u.role is Role.SIGN for u in uses_of(graph, value))
        block = self._side(val) if not zeros and _is_map(value) else 0
        stochastic = self.rounding == "stochastic"
        return Grid(self._bits(graph, value), group, order, zeros, block, stochastic)

    def _side(self, val: torch.Tensor) -> int:
        """The side of the blocks of a spatial map, if there is one that divides it."""
        if val.dim() != 4 or not self.block:
            return 0
        smallest = min(self.block, _SMALLEST_SIDE)
        sides = range(self.block, smallest - 1, -1)
        known = all(isinstance(n, int) for n in val.shape[2:])
        return next((n for n in sides if known and all(s % n == 0 for s in val.shape[2:])), 0)

    def _note(self, coded: CodedValue) -> str:
        kind = "norm's input, in two copies" if coded.norms else "value"
        kind = "softmax's output, in two copies" if coded.softmaxes else kind
        kind = "ReLU output, its mask exact" if coded.grid.zeros else kind
        error = relative_error(
            coded.grid.bits, coded.grid.group, stochastic=self.rounding == "stochastic"
        )
        return (
            f"{coded.grid.bits} bits for a {kind}; predicted relative error {error:.3f} "
            f"if it is N(0, 1) in groups of {coded.grid.group}"
        )


def _is_map(node: fx.Node) -> bool:
    """Whether a value lies in space, where neighbours are alike, by what makes and reads it."""
    near = [*(node.all_input_nodes if ops.is_getitem(node) else [node]), *node.users]
    return any(word in target_name(n) for n in near for word in _SPATIAL)


def _is_value(graph: JointGraph, node: fx.Node) -> bool:
    val = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(val, torch.Tensor)
        and val.dtype.is_floating_point
        and graph.is_forward(node)
        and tag(node).placement is Placement.AUTO
        and ops.storage_of(node) is node
    )
