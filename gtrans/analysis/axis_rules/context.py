"""What a transfer rule works with: the axes of every value, and what it notes about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import Axis, freeze, unify
from gtrans.ir import ops

Axes = list[Axis]

Size = Any
"""A size argument after erasure: an int, an Axis (its kept size), `Total`, or a list of these."""


@dataclass(frozen=True)
class Total:
    """The sum of the kept sizes of axes, as the start of a slice is."""

    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Need:
    """A place where an erased index vanishes only if it is zero there: a sum runs over it.

    Attributes:
        node: the operator that sums.
        axis: what it sums over.
        operands: the summed dimension of each operand; one of them being zero is enough.
    """

    node: fx.Node
    axis: Axis
    operands: tuple[tuple[fx.Node, int], ...]


@dataclass
class Edits:
    """How one node must change when its axes shrink.

    Attributes:
        arguments: new values of size arguments by name.
        pieces: sizes into which the node splits dimension `dim` (for `split` and `chunk`).
        dim: see pieces.
        divisor: axes over which the node averages; their old size stays the divisor.
    """

    arguments: dict[str, Size] = field(default_factory=dict)
    pieces: tuple[Axis, ...] = ()
    dim: int = 0
    divisor: tuple[Axis, ...] = ()


@dataclass
class Context:
    """The state of an axis analysis.

    Attributes:
        axes: for each tensor value its axes; for a node of several tensors a list of those.
        edits: what must change in the graph.
        needs: where erased indices must be zero.
        contracted: (node, dim) of operands that are only summed over there, with the axis.
    """

    axes: dict[fx.Node, Any] = field(default_factory=dict)
    edits: dict[fx.Node, Edits] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    contracted: dict[tuple[fx.Node, fx.Node], dict[int, Axis]] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Axes:
        """The axes of a tensor value."""
        found: Axes = self.axes[node]
        return found

    def resize(self, node: fx.Node, name: str, value: Size) -> None:
        """Notes the new value of a size argument."""
        self.edits.setdefault(node, Edits()).arguments[name] = value

    def average(self, node: fx.Node, over: Sequence[Axis]) -> None:
        """Notes that the node divides by the size of these axes."""
        self.edits.setdefault(node, Edits()).divisor = tuple(over)

    def cut(self, node: fx.Node, pieces: Sequence[Axis], dim: int) -> None:
        """Notes that the node splits a dimension into these pieces."""
        edits = self.edits.setdefault(node, Edits())
        edits.pieces, edits.dim = tuple(pieces), dim

    def need(self, node: fx.Node, axis: Axis, *operands: tuple[fx.Node, int]) -> None:
        """Notes a sum over an axis."""
        self.needs.append(Need(node, axis, operands))

    def consume(self, node: fx.Node, operand: fx.Node, dim: int, axis: Axis) -> None:
        """Notes that an operand's dimension is summed over, so a weight's need not be zero."""
        self.contracted.setdefault((node, operand), {})[dim] = axis


Rule = Callable[[Context, fx.Node, dict[str, Any]], Any]
"""Gives the axes of a node's result; arguments come by name, defaults filled in."""


class Unsupported(Exception):
    """A rule meets a case it does not cover; the analysis freezes the operands instead."""


SAME_AS = {"transformers::grouped_mm_fallback": torch.ops.aten._grouped_mm}
"""Operators of other libraries that mean what one of ATen means, argument by argument."""


def packet_of(node: fx.Node) -> Any:
    """The operator of a call without its overload; None for anything but an operator."""
    op = ops.overload(node)
    return None if op is None else SAME_AS.get(op._name.partition(".")[0], op.overloadpacket)


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by name, with defaults."""
    op = ops.overload(node)
    if op is None:
        return {}
    bound: dict[str, Any] = {}
    for i, argument in enumerate(op._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
        else:
            bound[argument.name] = None
    return bound


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor value.

    Raises:
        Unsupported: a size is not a plain number.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Unsupported("not a tensor")
    if not all(isinstance(s, int) for s in value.shape):
        raise Unsupported("symbolic size")
    return tuple(value.shape)


def fresh(sizes: Sequence[int], reason: str | None) -> Axes:
    """New axes, frozen if a reason is given."""
    return [Axis(int(s), reason) for s in sizes]


def align(operands: Sequence[Axes], reason: str) -> Axes:
    """The axes of a broadcast: right-aligned, those of size other than 1 unified."""
    rank = max((len(o) for o in operands), default=0)
    result: Axes = []
    for position in range(-rank, 0):
        here = [o[position] for o in operands if len(o) >= -position]
        wide = [a for a in here if a.size != 1]
        for other in wide[1:]:
            unify(wide[0], other, reason)
        result.append(wide[0] if wide else here[0])
    return result


def normal(dim: int, rank: int) -> int:
    """A dimension counted from the left."""
    return dim % rank if rank else 0


def dims_of(dim: Any, rank: int) -> list[int]:
    """The dimensions a reduction names; all if it names none."""
    if dim is None or dim == []:
        return list(range(rank))
    return [normal(d, rank) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def freeze_all(axes: Sequence[Axis], reason: str) -> None:
    """Freezes several axes for one reason."""
    for axis in axes:
        freeze(axis, reason)
