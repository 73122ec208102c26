"""The normal form: what every pass may rely on in a joint graph.

1. No `detach`, `alias` or `lift_fresh`: after autograd they are identities. No copy of a value in
   the same layout either, such as an operator in place leaves behind: nothing in the graph is
   overwritten. Copies of what others see, arguments and results, stay, as these may be overwritten;
   so do copies of a part, without which the whole would be kept.
2. No view that changes nothing, no view of a view (`view`, `_unsafe_view`), no `t(t(x))`.
3. No two pure nodes that compute the same value (common subexpressions are one node). The earlier
   one stays, so a forward value that autograd computes again in the backward is read from the
   forward; the planner decides where it is computed.
4. No dead nodes.
5. Every node has `meta["val"]`, of the type its operator really returns, and its nested `meta`
   dictionaries are its own.

Patterns matched on raw graphs silently match nothing: the raw joint graph of a ReLU reads
`relu -> detach -> detach -> threshold_backward`.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from gtrans.errors import GraphError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Side, tag
from gtrans.ir.sizes import numel, same_shape
from gtrans.ir.source import location

aten = torch.ops.aten

_IDENTITIES = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})
_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default})


def normalise(joint: JointGraph) -> None:
    """Brings a joint graph into normal form, in place.

    Raises:
        GraphError: a node has no recorded value.
    """
    _own_metadata(joint)
    _correct_batch_norm(joint)
    _erase_identities(joint)
    _erase_copies(joint)
    _merge_views(joint)
    _merge_common_subexpressions(joint)
    joint.eliminate_dead_code()


def _own_metadata(joint: JointGraph) -> None:
    for node in joint.graph.nodes:
        if ops.has_no_result(node):
            node.meta.setdefault("val", None)
        if node.op != "output" and node.op != "get_attr" and "val" not in node.meta:
            raise GraphError(f"node {node.name} ({location(node)}) has no recorded value")
        for key, nested in node.meta.items():
            if type(nested) is dict:
                node.meta[key] = dict(nested)


def _correct_batch_norm(joint: JointGraph) -> None:
    """Records that updated running statistics have the type of those that were given.

    They are copies of them; torch's tracing states float32 whatever they are.
    """
    for norm in joint.calls(aten._native_batch_norm_legit_functional.default):
        results = list(norm.meta["val"])
        for i, given in ((3, norm.args[3]), (4, norm.args[4])):
            if isinstance(given, fx.Node):
                results[i] = results[i].to(given.meta["val"].dtype)
        norm.meta["val"] = tuple(results)
        for part in norm.users:
            if ops.is_getitem(part):
                part.meta["val"] = results[int(str(part.args[1]))]


def _erase_identities(joint: JointGraph) -> None:
    for node in joint.nodes:
        if node.target in _IDENTITIES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            joint.replace(node, source)


def _erase_copies(joint: JointGraph) -> None:
    seen_outside = {ops.storage_of(n) for n in joint.output.all_input_nodes}
    for node in joint.calls(aten.clone.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        whole = ops.storage_of(source)
        if whole.op == "placeholder" or not seen_outside.isdisjoint((node, whole)):
            continue
        val, original = node.meta["val"], source.meta["val"]
        same = same_shape(val, original) and val.stride() == original.stride()
        if same and numel(whole.meta["val"]) == numel(val):
            joint.replace(node, source)


def _merge_views(joint: JointGraph) -> None:
    for node in joint.nodes:
        if node.target is aten.t.default:
            inner = node.args[0]
            if isinstance(inner, fx.Node) and inner.target is aten.t.default:
                origin = inner.args[0]
                assert isinstance(origin, fx.Node)
                joint.replace(node, origin)
        elif node.target in _RESHAPES:
            _merge_reshape(joint, node)


def _merge_reshape(joint: JointGraph, node: fx.Node) -> None:
    """Reads through a chain of reshapes, and drops it if the value ends unchanged."""
    origin = node
    while origin.target in _RESHAPES:
        source = origin.args[0]
        assert isinstance(source, fx.Node)
        origin = source
    val, start = node.meta["val"], origin.meta["val"]
    if same_shape(val, start) and val.stride() == start.stride():
        joint.replace(node, origin)
    elif origin is not node.args[0] and start.is_contiguous():
        # Of a contiguous value every reshape is a view, so the ones in between are not needed.
        node.args = (origin, node.args[1])


def _merge_common_subexpressions(joint: JointGraph) -> None:
    seen: dict[Hashable, fx.Node] = {}
    for node in joint.nodes:
        if node.op != "call_function" or _has_identity(node):
            continue
        key = _key(node)
        first = seen.setdefault(key, node) if key is not None else node
        if first is not node:
            if isinstance(node.meta["val"], torch.Tensor):
                joint.replace(node, first)
            else:
                node.replace_all_uses_with(first)
                joint.erase(node)


def _has_identity(node: fx.Node) -> bool:
    """Whether two equal calls are still two different things (draws, effects, gradient sums)."""
    return ops.is_random(node) or ops.is_effect(node) or tag(node).side is Side.BACKWARD


def _key(node: fx.Node) -> Hashable | None:
    """Equal for calls that compute the same value; None where the arguments cannot be compared."""
    key = (node.target, _frozen(node.args), _frozen(dict(node.kwargs)))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(argument: Any) -> Hashable:
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(argument.items()))
    if isinstance(argument, fx.Node):
        return argument
    return (type(argument), argument)  # 1, 1.0 and True are equal but not the same argument
