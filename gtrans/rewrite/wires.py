"""Edits of the wire between a value and its cotangent, found by `gtrans.runtime.tap` markers."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.joint import JointGraph
from gtrans.ir.source import readable_path
from gtrans.runtime.tap import TAP, TAP_BACKWARD

aten = torch.ops.aten


@dataclass(frozen=True)
class Tap:
    """A marked value and its cotangent.

    Attributes:
        key: the name it was marked with.
        value: the forward marker.
        cotangent: the backward marker; its input is the true cotangent. None if no loss reaches it.
        aux: the tensor that was marked along with it, if any.
    """

    key: str
    value: fx.Node
    cotangent: fx.Node | None
    aux: fx.Node | None


def mark(graph: ForwardGraph, node: fx.Node, key: str) -> fx.Node:
    """Marks a value of a forward graph; every reader then reads the marker."""
    marker = graph.insert_after(node, TAP, node, None, key)
    node.replace_all_uses_with(marker, delete_user_cb=lambda user: user is not marker)
    return marker


def outputs_of_modules(graph: ForwardGraph, pattern: str) -> list[fx.Node]:
    """The differentiable values that modules hand to the rest of the model.

    Args:
        graph: a captured forward.
        pattern: path of a module ("encoder.layers.3"), or a pattern of paths whose "*" stands for
            one name ("encoder.layers.*"). Every call of a reused module counts.
    """
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    inside: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        for path in filter(wanted.fullmatch, modules_of(node)):
            inside.setdefault(path, set()).add(node)
    found = {
        node
        for nodes in inside.values()
        for node in nodes
        if _is_floating(node) and any(user not in nodes for user in node.users)
    }
    return sorted(found)


def modules_of(node: fx.Node) -> list[str]:
    """The paths of the modules that ran a node, from the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    return [readable_path(entry[0]) for entry in stack.values()]


def taps(joint: JointGraph) -> list[Tap]:
    """The marked pairs of a joint graph, in forward order."""
    backward = {n.args[2]: n for n in joint.calls(TAP_BACKWARD)}
    return [
        Tap(str(n.args[2]), n, backward.get(n.args[2]), _node(n.args[1])) for n in joint.calls(TAP)
    ]


def feed(joint: JointGraph, wire: Tap, source: fx.Node) -> None:
    """Lets everything below a marked value read another cotangent than the true one."""
    if wire.cotangent is not None:
        joint.replace(wire.cotangent, source)


def erase_taps(joint: JointGraph) -> None:
    """Removes all markers; what they copied is read directly."""
    for marker in joint.calls(TAP, TAP_BACKWARD):
        source = marker.args[0]
        assert isinstance(source, fx.Node)
        joint.replace(marker, source)


def cut(joint: JointGraph, wire: Tap) -> None:
    """Lets nothing flow below a marked value, as `detach` in the model would.

    What would only multiply zeros is removed. Correct for backward operators that are linear in the
    cotangent; those give zero for zero.
    """
    if wire.cotangent is None:
        return
    dead = {wire.cotangent}
    pending = [wire.cotangent]
    while pending:
        node = pending.pop()
        for user in list(node.users):
            if user.op == "output" or user in dead:
                continue
            alive = [n for n in user.all_input_nodes if joint.is_backward(n) and n not in dead]
            if not alive:
                dead.add(user)
                pending.append(user)
            elif user.target is aten.add.Tensor and len(alive) == 1 and not user.kwargs:
                joint.replace(user, alive[0])
    _zero_what_is_left(joint, dead)


def _zero_what_is_left(joint: JointGraph, dead: set[fx.Node]) -> None:
    """Gradients that only zeros reach, and readers that mix (`cat`), read zeros."""
    belongs_to = dict(zip(joint.gradients, joint.primals, strict=False))
    for node in sorted(dead):
        readers = [u for u in node.users if u not in dead]
        val = node.meta.get("val")
        if readers and isinstance(val, torch.Tensor):
            # Sizes come from the primal, or are known; else from the dead value, which then stays.
            like = belongs_to.get(node, node)
            (zeros,) = joint.splice_before(node, torch.zeros_like, like)
            joint.replace_uses(node, zeros, readers)


def _is_floating(node: fx.Node) -> bool:
    val = value(node)
    return isinstance(val, torch.Tensor) and val.is_floating_point()


def _node(argument: Any) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None
