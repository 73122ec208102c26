"""How the backward reads a forward value: linearly, only its sign, quadratically, or otherwise.

If every reader is affine in a value, random noise of mean zero in the value leaves the expectation
of all gradients as it is:

    mm, bmm, convolution     each operand: dA reads B only, dB reads A only
    mul                      each factor
    attention                values and output; not queries and keys, which are exponents
    threshold at zero        the sign, which a code can keep exactly
    norms                    quadratic in their input; affine in each of two independent copies
    softmax                  quadratic in its output; affine in each of two independent copies
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph

aten = torch.ops.aten


class Role(Enum):
    """What a reader does with a value."""

    LINEAR = "linear"
    SIGN = "sign"
    NORM = "norm"
    SOFTMAX = "softmax"
    OTHER = "other"


# Arguments in which an operator of the backward is affine, by name in its schema. No property of
# torch says so.
_FACTORS: dict[Any, tuple[str, ...]] = {
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
    aten.dot.default: ("self", "tensor"),
    aten.mv.default: ("self", "vec"),
    aten.mul.Tensor: ("self", "other"),
    aten.convolution_backward.default: ("input", "weight"),
    # These read no more of it than its shape.
    aten.max_pool2d_with_indices_backward.default: ("self",),
    aten.max_pool3d_with_indices_backward.default: ("self",),
    aten.avg_pool2d_backward.default: ("self",),
    aten.avg_pool3d_backward.default: ("self",),
    aten._adaptive_avg_pool2d_backward.default: ("self",),
    aten._adaptive_avg_pool3d_backward.default: ("self",),
}
_ATTENTION = ("value", "out")
_NORMS = {
    aten.native_layer_norm_backward.default,
    aten._fused_rms_norm_backward.default,
    aten.native_batch_norm_backward.default,
}


@dataclass(frozen=True)
class Use:
    """One backward node that reads a value.

    Attributes:
        reader: the backward node.
        operand: what it reads: the value, or a view of it.
        role: how.
    """

    reader: fx.Node
    operand: fx.Node
    role: Role


def uses_of(joint: JointGraph, value: fx.Node) -> list[Use]:
    """Every backward node that reads a value, directly or through views; in graph order."""
    found: list[Use] = []
    pending = [value]
    while pending:
        operand = pending.pop()
        for user in operand.users:
            if joint.is_backward(user):
                found.append(Use(user, operand, _role(user, operand)))
            elif ops.is_view(user) or (ops.is_getitem(user) and ops.is_view(operand)):
                pending.append(user)
    return sorted(found, key=lambda u: u.reader)


def flows_into_another(readers: Iterable[fx.Node]) -> fx.Node | None:
    """A reader that a gradient made by another of them reaches, if there is one.

    The noise of a value that both read would then multiply with itself, and its square has an
    expectation of its own.
    """
    targets = set(readers)
    seen: set[fx.Node] = set()
    pending = [user for r in targets for user in r.users]
    while pending:
        node = pending.pop()
        if node in targets:
            return node
        if node not in seen:
            seen.add(node)
            pending += node.users
    return None


@dataclass(frozen=True)
class NormUse:
    """The backward of a norm, whatever kind it is.

    Attributes:
        backward: its node; its parts are the gradients of x, of the weight and of the bias.
        dy: the cotangent.
        x: the input.
        y: the output; None if nothing else reads it.
        mean: of each group; None for an RMS norm.
        rstd: one over the deviation of each group.
        weight, bias: None where there is none.
        channels: whether groups are channels, as of a batch norm; otherwise trailing dimensions.
        rank: how many trailing dimensions share statistics.
    """

    backward: fx.Node
    dy: fx.Node
    x: fx.Node
    y: fx.Node | None
    mean: fx.Node | None
    rstd: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    channels: bool
    rank: int

    @property
    def terms(self) -> Any:
        """How many elements share statistics."""
        val = self.x.meta["val"]
        if self.channels:
            return val.numel() // val.shape[1]
        return int(torch.Size(val.shape[val.dim() - self.rank :]).numel())


def norm_use(node: fx.Node) -> NormUse | None:
    """A norm's backward by its parts; None for other nodes, and for norms in evaluation mode."""
    if node.target not in _NORMS:
        return None
    channels = node.target is aten.native_batch_norm_backward.default
    if channels and ops.argument(node, "train") is not True:
        return None
    mean = ops.argument(node, "save_mean" if channels else "mean")
    rstd = ops.argument(node, "save_invstd" if channels else "rstd")
    if not isinstance(rstd, fx.Node) or not ops.is_getitem(rstd):
        return None
    made_by = rstd.all_input_nodes[0]
    shape = ops.argument(node, "normalized_shape", ())
    return NormUse(
        backward=node,
        dy=ops.argument(node, "grad_out"),
        x=ops.argument(node, "input"),
        y=ops.parts(made_by).get(0),
        mean=mean,
        rstd=rstd,
        weight=ops.argument(node, "weight"),
        bias=ops.argument(made_by, "bias"),
        channels=channels,
        rank=len(shape),
    )


def _role(reader: fx.Node, operand: fx.Node) -> Role:
    names = _argument_names(reader, operand)
    if len(names) != 1:
        return Role.OTHER
    (name,) = names
    if name in _FACTORS.get(reader.target, ()) or (name in _ATTENTION and _is_attention(reader)):
        return Role.LINEAR
    if reader.target is aten.threshold_backward.default and name == "self":
        return Role.SIGN if ops.argument(reader, "threshold") == 0 else Role.OTHER
    if reader.target is aten._softmax_backward_data.default and name == "output":
        return Role.SOFTMAX
    norm = norm_use(reader)
    return Role.NORM if norm is not None and operand is norm.x and name == "input" else Role.OTHER


def _argument_names(reader: fx.Node, operand: fx.Node) -> list[str]:
    op = ops.overload(reader)
    if op is None:
        return []
    return [a.name for a in op._schema.arguments if ops.argument(reader, a.name) is operand]


def _is_attention(node: fx.Node) -> bool:
    return ops.is_contraction(node) and ops.argument(node, "logsumexp") is not None
