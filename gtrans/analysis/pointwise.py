"""Find the backward of pointwise activations in a joint graph, whatever operators they are made of.

    y  = h(x)                 any chain of pointwise operators of one tensor x
    dx = dy * h'(x)           the pointwise backward nodes between dy and dx, linear in dy

The derivative h' is what these backward nodes compute, so it can be evaluated on any grid without
knowing the name of h: a new activation, written by hand, is found like `gelu`.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, tag

aten = torch.ops.aten

_LIKE = frozenset({aten.full_like.default, aten.zeros_like.default, aten.ones_like.default})
_CONSTANT = {aten.full.default: 1, aten.scalar_tensor.default: 0}  # position of the number
_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_LAYOUT_KEYS = ("device", "layout", "memory_format", "pin_memory", "non_blocking")


@dataclass(frozen=True)
class Activation:
    """The backward of one pointwise activation.

    Attributes:
        x: the forward tensor that the derivative is a function of.
        dy: the cotangent that comes in.
        dx: the node that holds dy * h'(x); of the same shape and dtype as x.
        forward: the nodes between x and what the backward reads, in order.
        backward: the nodes between dy and dx, in order; dx is the last.
    """

    x: fx.Node
    dy: fx.Node
    dx: fx.Node
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]

    def derivative(self, x: torch.Tensor, dy: float = 1.0) -> torch.Tensor:
        """Evaluates dy * h'(x), in the dtype of the argument.

        Args:
            x: [*s], of a floating dtype; the graph's own casts to other ones are left out.
            dy: the cotangent, the same for all elements.
        """
        values: dict[fx.Node, torch.Tensor] = {self.x: x, self.dy: torch.full_like(x, dy)}
        for node in (*self.forward, *self.backward):
            values[node] = _evaluate(node, values, x.dtype)
        return values[self.dx]

    @property
    def key(self) -> Hashable:
        """Equal for activations that are the same expression."""
        number = {self.x: "x", self.dy: "dy"}
        text = []
        for node in (*self.forward, *self.backward):
            given = (node.args, _plain(node))
            if node.target in _CONSTANT:  # its sizes may be nodes
                given = ((node.args[_CONSTANT[node.target]],), {})
            text.append(f"{node.target}{fx.map_arg(given, lambda n: _name(number, n))}")
            number[node] = f"v{len(text)}"
        return tuple(text)


def find_activations(joint: JointGraph) -> list[Activation]:
    """The backward of every activation of the graph; no two share a node.

    Of nested candidates the largest is taken: the whole chain of a hand-written activation.
    """
    found: list[Activation] = []
    taken: set[fx.Node] = set()
    for node in reversed(joint.nodes):
        if joint.is_backward(node) and node not in taken and _is_step(node):
            activation = _largest(joint, node)
            if activation is not None:
                found.append(activation)
                taken.update(activation.backward)
    return found[::-1]


def activation_at(joint: JointGraph, dx: fx.Node) -> Activation | None:
    """The activation whose backward ends in the given node."""
    return _largest(joint, dx)


def _largest(joint: JointGraph, dx: fx.Node) -> Activation | None:
    """Grows the backward part upwards from its exit, and remembers the last sound candidate."""
    best = None
    inside: set[fx.Node] = set()
    frontier = {dx}
    while frontier:
        node = max(frontier)
        frontier.remove(node)
        if not _is_step(node) or not _same_shape(node, dx):
            break
        if node is not dx and any(user not in inside for user in node.users):
            break
        inside.add(node)
        frontier |= {n for n in ops.tensor_inputs(node) if joint.is_backward(n)}
        if len(frontier) == 1:
            candidate = _candidate(joint, dx, next(iter(frontier)), inside)
            best = candidate or best
    return best


def _candidate(
    joint: JointGraph, dx: fx.Node, dy: fx.Node, inside: set[fx.Node]
) -> Activation | None:
    read = {n for b in inside for n in ops.tensor_inputs(b) if joint.is_forward(n)}
    regions = {tag(b).region for b in inside} - {None}
    found = _source(joint, read, regions)
    if found is None:
        return None
    x, forward = found
    if forward == () and all(b.target in _PRODUCTS for b in inside):
        return None  # a product with x, not an activation of it
    if not (_same_shape(x, dx) and _same_shape(dy, dx)):
        return None
    return Activation(x, dy, dx, forward, tuple(sorted(inside)))


_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.neg.default})


def _source(
    joint: JointGraph, read: set[fx.Node], regions: set[int | None]
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The one forward tensor that all values read are pointwise functions of, and the way there.

    It is the input of the activation, not what its backward happens to read (tanh reads its own
    output): forward nodes of the same autograd operators are looked through.
    """
    passed: set[fx.Node] = set()
    frontier = set(read)
    while True:
        constants = {n for n in frontier if n.target in _CONSTANT}
        passed |= constants
        frontier -= constants
        if not frontier:
            return None
        node = max(frontier)
        if len(frontier) == 1 and not (tag(node).region in regions and _is_step(node)):
            break
        if not _is_step(node) or not ops.tensor_inputs(node):
            return None
        frontier.remove(node)
        passed.add(node)
        frontier |= set(ops.tensor_inputs(node))
    shapes = [n for n in passed if n.target not in _CONSTANT and not _same_shape(n, node)]
    return None if shapes or not _is_floating(node) else (node, tuple(sorted(passed)))


def _is_step(node: fx.Node) -> bool:
    """Whether an activation may be made of this node: one tensor out, element by element."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if ops.is_random(node) or ops.is_effect(node):
        return False
    if any(isinstance(n.meta.get("val"), _SYMBOLIC) for n in node.all_input_nodes):
        return False  # a size that changes is no number to tabulate a derivative with
    return ops.is_pointwise(node) or node.target in _LIKE or node.target is aten._to_copy.default


def _evaluate(node: fx.Node, values: dict[fx.Node, torch.Tensor], dtype: torch.dtype) -> Any:
    like = next(iter(values.values()))
    if node.target in _CONSTANT:
        return torch.scalar_tensor(
            node.args[_CONSTANT[node.target]],  # type: ignore[arg-type]  # a number
            dtype=_wide(node.meta["val"].dtype, dtype),
            device=like.device,
        )
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = dict(fx.map_arg(_plain(node), lambda n: values[n]))
    if isinstance(kwargs.get("dtype"), torch.dtype):
        kwargs["dtype"] = _wide(kwargs["dtype"], dtype)
    target: Any = node.target
    return target(*args, **kwargs)


def _plain(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.kwargs.items() if k not in _LAYOUT_KEYS}


def _wide(dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    return wide if dtype.is_floating_point else dtype


def _name(number: dict[fx.Node, str], node: fx.Node) -> Any:
    return number[node]


def _is_floating(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype.is_floating_point


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return isinstance(one, torch.Tensor) and list(one.shape) == list(other.shape)
