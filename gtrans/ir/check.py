"""Structural verification of a joint graph: what every pass must leave intact.

1. torch.fx's own rules (topological order, no dangling uses).
2. Placeholders are the ones of the original, in order.
3. Every output has the shape and dtype of the original's; `None` stays `None`.
4. Forward outputs depend on no tangent.
5. Every node has a recorded value and a tag, and its side follows from its inputs.
"""

from typing import Any

import torch
from torch import fx

from gtrans.errors import GraphError
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph, tag
from gtrans.ir.program import Program
from gtrans.ir.sizes import shape_text
from gtrans.ir.source import location


def check_joint(joint: JointGraph, original: JointGraph | None = None) -> None:
    """Checks the rules above; rules 2 and 3 need the graph as it was before.

    Raises:
        GraphError: a rule is broken; the message names the node and its source line.
    """
    _lint(joint.graph)
    tangents = set(joint.tangents)
    for node in joint.graph.nodes:
        if node.op == "output":
            continue
        if node.op != "get_attr" and "val" not in node.meta:
            raise GraphError(f"node {node.name} ({location(node)}) has no recorded value")
        backward = node in tangents or any(joint.is_backward(n) for n in node.all_input_nodes)
        if joint.is_backward(node) is not backward:
            raise GraphError(
                f"node {node.name} ({location(node)}) is tagged {tag(node).side.value} but "
                f"{'depends' if backward else 'does not depend'} on a tangent"
            )
    for output in joint.forward_outputs:
        if joint.is_backward(output):
            raise GraphError(f"forward output {output.name} depends on a tangent")
    if original is not None:
        _check_interface(joint, original)


def check_forward(graph: ForwardGraph, original: ForwardGraph) -> None:
    """Checks that a forward graph is sound and keeps its inputs.

    Raises:
        GraphError: a rule is broken.
    """
    _lint(graph.graph)
    _same_placeholders(graph.graph, original.graph)


def check_program(program: Program, original: Program) -> None:
    """Checks that a program is sound, that its parameters fit it, and that its interface stays.

    Raises:
        GraphError: a rule is broken.
    """
    _lint(program.graph)
    inputs = [[x.name for x in p.leaves.values() if x.kind == "input"] for p in (program, original)]
    if inputs[0] != inputs[1]:
        raise GraphError(f"inputs changed from {inputs[1]} to {inputs[0]}")
    for node, tensor in program.tensors.items():
        if list(tensor.shape) != list(node.meta["val"].shape):
            raise GraphError(
                f"{program.leaves[node].name} is {tuple(tensor.shape)}, but the graph reads it as "
                f"{shape_text(node.meta['val'])}; call `refresh()` after changing a tensor's size"
            )
    outputs = [
        [shape_text(n.meta.get("val")) for n in p.graph.output_node().all_input_nodes]
        for p in (program, original)
    ]
    if outputs[0] != outputs[1]:
        raise GraphError(f"outputs changed from {outputs[1]} to {outputs[0]}")


def _lint(graph: fx.Graph) -> None:
    try:
        graph.lint()
    except RuntimeError as error:
        raise GraphError(f"torch.fx finds the graph broken: {error}") from error


def _same_placeholders(graph: fx.Graph, original: fx.Graph) -> None:
    names = [n.target for n in graph.find_nodes(op="placeholder")]
    before = [n.target for n in original.find_nodes(op="placeholder")]
    if names != before:
        raise GraphError(f"placeholders changed from {before} to {names}")


def _check_interface(joint: JointGraph, original: JointGraph) -> None:
    _same_placeholders(joint.graph, original.graph)
    pairs = [
        *zip(joint.forward_outputs, original.forward_outputs, strict=False),
        *zip(joint.gradients, original.gradients, strict=False),
    ]
    counts = [(len(g.forward_outputs), len(g.gradients)) for g in (joint, original)]
    if counts[0] != counts[1]:
        raise GraphError(f"the number of outputs changed from {counts[1]} to {counts[0]}")
    for index, (new, old) in enumerate(pairs):
        if _kind(new) != _kind(old):
            raise GraphError(
                f"output {index} changed from {_kind(old)} to {_kind(new)}"
                + (f" ({location(new)})" if isinstance(new, fx.Node) else "")
            )


def _kind(output: Any) -> str:
    if not isinstance(output, fx.Node):
        return str(output)
    val = output.meta.get("val")
    return shape_text(val) if isinstance(val, torch.Tensor) else type(val).__name__
