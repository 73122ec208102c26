"""Put one call in the place of an unrolled loop: its step as a graph of its own, and what it reads.

The values that the steps read may be computed between the steps; they are moved in front of the
loop, which they must not depend on. The call stands where the first step stood.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from gtrans.analysis.loops import Loop, Source
from gtrans.ir import ops
from gtrans.ir.forward import ForwardGraph, is_inplace, value
from gtrans.ir.tracing import traced

aten = torch.ops.aten

_COPIES = frozenset({aten.clone.default, aten._to_copy.default, aten.detach.default})
_MOST_CARRIED = 4
_DRAWS = ("dropout", "rand", "bernoulli", "multinomial", "normal_", "uniform_", "exponential_")


def cannot_roll(graph: ForwardGraph, loop: Loop) -> str | None:
    """Why a loop must stay unrolled, or None."""
    outside = [*loop.starts, *(n for column in loop.inputs for n in column)]
    if not all(isinstance(value(n), torch.Tensor) for n in outside):
        return "a step reads what is no tensor"
    moved = _to_move(loop)
    if not moved.isdisjoint(loop.nodes):
        return "what a step reads depends on the steps before by another way than its carry"
    between = [n for n in graph.nodes if loop.steps[0][0] <= n <= loop.last]
    inplace = [n for n in between if is_inplace(n)]
    written = {n.all_input_nodes[0] for n in inplace if n.all_input_nodes}
    if any(is_inplace(n) or not written.isdisjoint(n.all_input_nodes) for n in moved):
        return "what a step reads is written in place"
    if not written.isdisjoint(loop.nodes | set(outside)):
        return "a step's values are written in place"
    if any(word in str(n.target) for n in between for word in _DRAWS):
        return "random numbers are drawn between its steps"
    return None


def not_pointwise(loop: Loop, step: fx.GraphModule) -> str | None:
    """Why a loop's Jacobians are no diagonals, or None if its step works element by element."""
    carried = [value(n) for n in loop.starts]
    first = carried[0]
    if len(carried) > _MOST_CARRIED:
        return f"a step hands over more than {_MOST_CARRIED} values"
    if first.is_complex():
        return "its values are complex"
    if any(c.shape != first.shape or c.dtype != first.dtype for c in carried):
        return "the values that a step hands over differ in shape or type"
    if any(value(column[0]).dim() > first.dim() for column in loop.inputs):
        return "a step reads larger values than it hands over"
    try:
        found = _traced(loop, step)
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"its step cannot be traced: {str(error).splitlines()[0]}"
    moving = set(found.find_nodes(op="placeholder")[: len(carried)])
    for node in found.nodes:
        if node.op != "call_function" or moving.isdisjoint(node.all_input_nodes):
            continue
        if not _is_elementwise(node):
            return f"a step mixes elements ({node.target})"
        shape = node.meta["val"].shape
        if list(shape) != list(first.shape):
            return f"a step changes the shape of its carry ({node.target})"
        moving.add(node)
    return None


def _is_elementwise(node: fx.Node) -> bool:
    return ops.is_pointwise(node) or node.target in _COPIES


def _traced(loop: Loop, step: fx.GraphModule) -> fx.Graph:
    """The operators of a step.

    Raises:
        RuntimeError, TypeError or AttributeError: torch cannot trace it.
    """
    arguments = [*loop.starts, *(column[0] for column in loop.inputs)]
    values = [value(n).detach() for n in arguments]
    return traced(lambda *a: tuple(step(*a)), arguments, values, _mode(values))


def _mode(values: Sequence[torch.Tensor]) -> Any:
    """The fake mode of some values."""
    return next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)


def _shared(loop: Loop) -> tuple[bool, ...]:
    """For each input, whether all steps read the same."""
    return tuple(len(set(column)) == 1 for column in loop.inputs)


def step_of(loop: Loop) -> fx.GraphModule:
    """The step: (carries, inputs) to (new carries, further results that something reads)."""
    graph = fx.Graph()
    carries = [graph.placeholder(f"carry_{i}") for i in range(len(loop.carried))]
    inputs = [graph.placeholder(f"input_{i}") for i in range(len(loop.inputs))]
    made: list[fx.Node] = []
    kinds: dict[str, list[fx.Node]] = {"body": made, "carry": carries, "input": inputs}
    for node, sources in zip(loop.steps[-1], loop.reads, strict=True):
        reads = iter(sources)

        def here(_: fx.Node, reads: Any = reads) -> fx.Node:
            source: Source = next(reads)
            return kinds[source.kind][source.number]

        args, kwargs = fx.map_arg((node.args, node.kwargs), here)
        made.append(graph.create_node(node.op, node.target, args, kwargs))
    graph.output(tuple(made[place] for place in _order(loop)))
    return fx.GraphModule({}, graph)


def roll(
    graph: ForwardGraph, loop: Loop, step: fx.GraphModule, function: Callable[..., Any]
) -> None:
    """Calls `function(step, starts, inputs, steps)` for the results of all steps.

    The loop must not be one of `cannot_roll`.
    """
    anchor = loop.steps[0][0]
    moved = _to_move(loop)
    for node in [n for n in graph.nodes if n in moved]:
        anchor.prepend(node)
    name = f"step_of_{loop.last.name}"
    graph.module.add_submodule(name, step)
    with graph.graph.inserting_before(anchor):
        body = graph.graph.get_attr(name)
    body.meta["example_value"] = step
    pairs = zip(loop.inputs, _shared(loop), strict=True)
    inputs = [column[0] if one else list(column) for column, one in pairs]
    call = graph.insert_before(anchor, function, body, list(loop.starts), inputs, len(loop))
    order = _order(loop)
    for t, nodes in enumerate(loop.steps):
        for i, place in enumerate(order):
            old = nodes[place]
            readers = [user for user in old.users if user not in loop.nodes]
            if readers:
                number = t * len(order) + i
                new = graph.insert_before(anchor, operator.getitem, call, number)
                for reader in readers:
                    reader.replace_input_with(old, new)


def _order(loop: Loop) -> list[int]:
    """The places of a step's results: what is handed over, then what else is read."""
    return [*loop.carried, *(place for place in loop.results() if place not in loop.carried)]


def _to_move(loop: Loop) -> set[fx.Node]:
    """What the steps read that is computed behind the first of them."""
    anchor = loop.steps[0][0]
    found: set[fx.Node] = set()
    pending = [n for column in loop.inputs for n in column] + list(loop.starts)
    while pending:
        node = pending.pop()
        if node not in found and not node < anchor and node.op != "placeholder":
            found.add(node)
            if node not in loop.nodes:
                pending += node.all_input_nodes
    return found
