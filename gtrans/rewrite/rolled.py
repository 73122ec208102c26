"""Put one call in the place of an unrolled loop: its step as a graph of its own, and what it reads.

The values that the steps read may be computed between the steps; they are moved in front of the
loop, which they must not depend on. The call stands where the first step stood.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from gtrans.analysis.loops import Loop, Source
from gtrans.ir import ops
from gtrans.ir.forward import ForwardGraph, arguments, is_inplace, value
from gtrans.ir.sizes import same_shape
from gtrans.ir.tracing import traced
from gtrans.runtime.batch_rules import quiet_loops, with_rules
from gtrans.runtime.loop import side_by_side

aten = torch.ops.aten

_COPIES = frozenset(
    {aten.clone.default, aten._to_copy.default, aten.detach.default, aten._conj.default}
)
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
    if any(map(_draws, between)):
        return "random numbers are drawn between its steps"
    return None


def _draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers; dropout does not where it drops nothing."""
    if node.target is torch.nn.functional.dropout:
        given = arguments(node)
        return bool(given["training"]) and given["p"] != 0
    return any(word in str(node.target) for word in _DRAWS)


def not_pointwise(loop: Loop, step: fx.GraphModule) -> str | None:
    """Why a loop's Jacobians are no diagonals, or None if its step works element by element."""
    carried = [value(n) for n in loop.starts]
    first = carried[0]
    if sum(2 if c.is_complex() else 1 for c in carried) > _MOST_CARRIED:
        return f"a step hands over more than {_MOST_CARRIED} values"
    precision = first.dtype.to_real()
    if any(not same_shape(c, first) or c.dtype.to_real() != precision for c in carried):
        return "the values that a step hands over differ in shape or type"
    if any(value(column[0]).dim() > first.dim() for column in loop.inputs):
        return "a step reads larger values than it hands over"
    operators = operators_of(loop, step)
    if isinstance(operators, str):
        return operators
    found = operators.graph
    moving = set(found.find_nodes(op="placeholder")[: len(carried)])
    for node in found.nodes:
        if node.op != "call_function" or moving.isdisjoint(node.all_input_nodes):
            continue
        if not _is_elementwise(node):
            return f"a step mixes elements ({node.target})"
        if not same_shape(node.meta["val"], first):
            return f"a step changes the shape of its carry ({node.target})"
        moving.add(node)
    return None


def not_side_by_side(loop: Loop, step: fx.GraphModule) -> str | None:
    """Why the steps of a loop cannot run as one batch, or None."""
    shared = _shared(loop)
    carries = [value(n) for n in loop.starts]
    if any(c.is_complex() for c in carries):
        return "the values that a step hands over are complex"
    if any(not (c.is_floating_point() and c.dtype == carries[0].dtype) for c in carries):
        return "the values that a step hands over differ in type"
    inputs = [value(column[0]) for column in loop.inputs]
    mode = fake_mode_of([*carries, *inputs])
    shape_env = getattr(mode, "shape_env", None)  # a trial must not fix sizes that change
    unguarded = nullcontext() if shape_env is None else shape_env.suppress_guards()
    try:
        with mode or nullcontext(), unguarded, torch.no_grad(), quiet_loops():
            several = [t.expand(2, *t.shape) for t in carries]
            pairs = zip(inputs, shared, strict=True)
            read = [t if one else t.expand(2, *t.shape) for t, one in pairs]
            side_by_side(with_rules(step), len(carries), shared)(*several, *read)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"its steps cannot run side by side: {str(error).strip().splitlines()[0]}"
    return None


def operators_of(loop: Loop, step: fx.GraphModule) -> fx.GraphModule | str:
    """The step as the operators that torch breaks it down to, or why it cannot run as a batch.

    Several steps run as a batch by a rule for each operator; for what is made of them, such as a
    cell or a normalisation, there is none.
    """
    try:
        graph = _traced(loop, step)
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"its step cannot be traced: {str(error).splitlines()[0]}"
    if graph.find_nodes(op="get_attr"):
        return "its step holds constants"
    return not_repeatable(graph) or _module(graph)


def not_repeatable(graph: fx.Graph) -> str | None:
    """Why a step, as operators, may not run more than once for each time it is written, or None."""
    for node in graph.nodes:
        if ops.is_random(node):
            return f"its step draws random numbers ({node.target})"
        if any(ops.storage_of(n).op == "placeholder" for n in ops.written_by(node)):
            return f"its step writes to what it reads ({node.target})"
    return None


def gate_of(loop: Loop, step: fx.GraphModule) -> fx.GraphModule:
    """The operators of a step without constants, with gradients only where they are elementwise."""
    graph = _traced(loop, step)
    first = [value(n) for n in loop.starts]
    made: dict[fx.Node, fx.Node] = {}
    gate = fx.Graph()
    moving = set(graph.find_nodes(op="placeholder")[: len(first)])
    for node in graph.nodes:
        if node.op == "output":
            gate.output(fx.map_arg(node.args[0], lambda n: made[n]))
            continue
        moved = moving.intersection(node.all_input_nodes)
        if moved:
            moving.add(node)
        val = node.meta["val"]
        elementwise = _is_elementwise(node) and any(same_shape(val, c) for c in first)
        if moved and not elementwise:
            # What an operator returns in a list has no gradient: its own arguments had none.
            tensors = [n for n in moved if isinstance(n.meta["val"], torch.Tensor)]
            still = {n: gate.call_function(aten.detach.default, (made[n],)) for n in tensors}
            made[node] = gate.node_copy(node, ({**made, **still}).__getitem__)
        else:
            made[node] = gate.node_copy(node, lambda n: made[n])
    return _module(gate)


def _module(graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule({}, graph)


def _is_elementwise(node: fx.Node) -> bool:
    return ops.is_pointwise(node) or node.target in _COPIES


def _traced(loop: Loop, step: fx.GraphModule) -> fx.Graph:
    """The operators of a step.

    Raises:
        RuntimeError, TypeError or AttributeError: torch cannot trace it.
    """
    arguments = [*loop.starts, *(column[0] for column in loop.inputs)]
    values = [value(n).detach() for n in arguments]
    return traced(lambda *a: tuple(step(*a)), arguments, values, fake_mode_of(values))


def has_cotangent(value: torch.Tensor) -> bool:
    """Whether a value is of a type that gradients have."""
    return value.is_floating_point() or value.is_complex()


def fake_mode_of(values: Sequence[torch.Tensor]) -> Any:
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
    graph.output(tuple(made[place] for place in result_order(loop)))
    owner = loop.last.graph.owning_module
    held = {str(n.target) for n in loop.steps[-1] if n.op == "get_attr"}
    return fx.GraphModule({name: getattr(owner, name) for name in held}, graph)


def roll(
    graph: ForwardGraph,
    loop: Loop,
    step: fx.GraphModule,
    function: Callable[..., Any],
    **options: Any,
) -> None:
    """Calls `function(step, starts, inputs, steps, **options)` for the results of all steps.

    An option that is a module becomes a part of the graph.

    The loop must not be one of `cannot_roll`.
    """
    anchor = loop.steps[0][0]
    moved = _to_move(loop)
    for node in [n for n in graph.nodes if n in moved]:
        anchor.prepend(node)

    def held(module: fx.GraphModule, what: str) -> fx.Node:
        name = f"{what}_of_{loop.last.name}"
        graph.module.add_submodule(name, module)
        with graph.graph.inserting_before(anchor):
            node = graph.graph.get_attr(name)
        node.meta["example_value"] = module
        return node

    starts = list(loop.starts)
    pairs = zip(loop.inputs, _shared(loop), strict=True)
    inputs = [column[0] if one else list(column) for column, one in pairs]
    given = {k: held(v, k) if isinstance(v, fx.GraphModule) else v for k, v in options.items()}
    body = held(step, "step")
    call = graph.insert_before(anchor, function, body, starts, inputs, len(loop), **given)
    order = result_order(loop)
    for t, nodes in enumerate(loop.steps):
        for i, place in enumerate(order):
            old = nodes[place]
            readers = [user for user in old.users if user not in loop.nodes]
            if readers:
                number = t * len(order) + i
                new = graph.insert_before(anchor, operator.getitem, call, number)
                for reader in readers:
                    reader.replace_input_with(old, new)


def result_order(loop: Loop) -> list[int]:
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
