"""Run a captured graph on values, without its model: both halves of a joint graph, or a forward.

What a graph computes is a dictionary of its tensors by kind ("output", "gradient", "buffer") and
name, which two versions of one graph share.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from gtrans.backends.eager import Eager
from gtrans.capture import split
from gtrans.comparison import Comparison, compare_tensors, default_loss, rounding_scale
from gtrans.contract import Contract
from gtrans.errors import GraphError
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.half import Backend, Half, Role
from gtrans.ir.joint import JointGraph
from gtrans.plan.planner import Plan

StepGraph = JointGraph | ForwardGraph
"""The graphs of a training step, as opposed to whole programs."""

Values = Mapping[str, Any]
Results = dict[tuple[str, str], torch.Tensor | None]

Lowerings = Mapping[Role, Backend]
"""What lowers each half; a half that is not named runs as `eager` does."""


def run(graph: StepGraph, values: Values, seed: int, lowerings: Lowerings | None = None) -> Results:
    """Runs a graph on the values of its placeholders.

    Args:
        graph: a joint graph, both halves of which are run, or a forward graph, through which torch
            differentiates.
        values: by name of the placeholder; they are not changed.
        seed: seed of the random state.
        lowerings: backends to lower halves with, rather than to run them operator by operator.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(graph, JointGraph):
            return _run_joint(graph, values, seed, lowerings or {})
        return _run_forward(graph, values, seed)


def every_value(graph: StepGraph, values: Values, seed: int) -> dict[str, Any]:
    """What every node of a graph computes, by its name."""
    found: dict[str, Any] = {}

    class Keeping(fx.Interpreter):
        """Keeps a copy of each value, so that later writes do not change it."""

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found[n.name] = pytree.tree_map(_copy, value)
            return value

    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        inputs = [_copy(values[name]) for name in names]
        Keeping(graph.module).run(*inputs, enable_io_processing=False)
    return found


def compare(expected: Results, found: Results, contract: Contract, terms: int) -> list[Comparison]:
    """Compares what two versions of one graph compute.

    Raises:
        GraphError: one version has a tensor that the other lacks.
    """
    if expected.keys() != found.keys():
        odd = sorted(" ".join(key) for key in expected.keys() ^ found.keys())
        raise GraphError(f"only one version of the graph computes {', '.join(odd)}")
    floor = rounding_scale({str(key): (key[0], v) for key, v in expected.items()})
    return [
        compare_tensors(name, kind, value, found[kind, name], contract, terms, floor)
        for (kind, name), value in expected.items()
        if value is not None or found[kind, name] is not None
    ]


def _run_joint(joint: JointGraph, values: Values, seed: int, lowerings: Lowerings) -> Results:
    if joint.cut is None:  # no plan, or a pass ran after it
        joint = joint.copy()
        Plan(recompute="none").run(joint, lambda site: True)
    forward, backward = split(joint)
    primals = _copies({n.name: values[n.name] for n in joint.primals})
    count = joint.signature.num_forward_outputs
    found: Results = {}
    outputs = _call(forward, primals, "forward", lowerings, range(count))
    for i in range(count):
        _keep(found, ("output", str(i)), outputs[i])
    tangents = {n.name: values[n.name] for n in joint.tangents if n.name in values}
    if tangents or not joint.tangents:
        torch.manual_seed(seed + 1)
        known = _by_name(forward, outputs) | _copies(tangents)
        gradients = _call(backward, known, "backward", lowerings, ())
        for info, gradient in zip(joint.signature.inputs, gradients, strict=False):
            _keep(found, ("gradient", info.name), gradient)
    for node, info in zip(joint.primals, joint.signature.inputs, strict=True):
        if info.kind == "buffer":
            _keep(found, ("buffer", info.name), primals[node.name])
    return found


def _call(
    module: fx.GraphModule, known: Values, role: Role, lowerings: Lowerings, visible: Sequence[int]
) -> Sequence[Any]:
    inputs = module.graph.find_nodes(op="placeholder")
    half = Half(module, [n.meta["val"] for n in inputs], role, visible_outputs=list(visible))
    lowering = lowerings.get(role) or Eager()
    runnable = lowering.compile(lowering.prepare(half))
    with torch.no_grad():
        return runnable([known[n.name] for n in inputs])


def _run_forward(graph: ForwardGraph, values: Values, seed: int) -> Results:
    inputs = _copies(values)
    leaves = {
        name: v.requires_grad_()
        for name, v in inputs.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point() and values[name].requires_grad
    }
    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    with torch.enable_grad():
        # A write into a leaf is refused by autograd; into a copy of it, it is not.
        arguments = [inputs[n].view_as(inputs[n]) if n in leaves else inputs[n] for n in names]
        outputs = fx.Interpreter(graph.module).run(*arguments)
        loss = default_loss(outputs, seed)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found: Results = {}
    for i, output in enumerate(pytree.tree_leaves(outputs)):
        _keep(found, ("output", str(i)), output)
    for name, gradient in zip(leaves, gradients, strict=True):
        _keep(found, ("gradient", name), gradient)
    return found


def _by_name(module: fx.GraphModule, values: Sequence[Any]) -> dict[str, Any]:
    """What a half returned, by the name of the node that made it."""
    outputs: Any = module.graph.output_node().args[0]
    return {
        node.name: value
        for node, value in zip(outputs, values, strict=True)
        if isinstance(node, fx.Node)
    }


def _keep(found: Results, key: tuple[str, str], value: Any) -> None:
    while key in found:  # two primals of one name: an argument that was flattened
        key = (key[0], key[1] + "'")
    if value is None or isinstance(value, torch.Tensor):
        found[key] = None if value is None else value.detach().clone()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _copies(values: Values) -> dict[str, Any]:
    return {name: _copy(value) for name, value in values.items()}
