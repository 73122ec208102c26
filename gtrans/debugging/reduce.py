"""Reduce a case to the few nodes that still show the same failure.

Any subset of a graph's calls is a graph again: what they read from outside becomes an input, with
the value that it had, and what nobody in the subset reads becomes an output. So the search needs no
rules about operators: a node either belongs to the failure, or is replaced by its value.

The search starts from the rewrites that are to blame and takes in their neighbours until the
failure shows, then leaves out nodes in ever smaller chunks (Zeller and Hildebrandt, Simplifying and
isolating failure-inducing input, 2002). Last, values are replaced by generated ones of the same
mean and deviation, where the failure survives that.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

from gtrans.comparison import Loss
from gtrans.debugging.bisect import minimal_failing
from gtrans.debugging.case import Case, Failure, made
from gtrans.debugging.check import Checker, failure_of
from gtrans.debugging.recording import Recording
from gtrans.debugging.running import every_value
from gtrans.debugging.values import describe
from gtrans.errors import GTransError, ModelError
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.joint import Input, JointGraph, Signature
from gtrans.pipeline import Gate, Pipeline, Rewrite

_NEAR = 4  # neighbourhoods of one rewrite that are tried before others are looked at

OnTry = Callable[[int, int, bool], None]
"""Told after every try: its number, how many nodes it kept, and whether it still failed."""


@dataclass(frozen=True)
class Reduction:
    """The result of `reduce`.

    Attributes:
        case: what is left, with its failure.
        nodes_before: how many nodes the graph had, inputs and output included.
        tries: how many smaller cases were tried.
    """

    case: Case
    nodes_before: int
    tries: int


def failing_case(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    *,
    backend: str = "eager",
    loss: Loss | None = None,
    seed: int = 0,
) -> Case:
    """The first graph of a model on which a pipeline fails, with the values of one step.

    Forward graphs are looked at first, then the joint graphs of what the forward passes made; all
    of them in float64, and if nothing fails there, in the model's own dtype.

    Raises:
        ModelError: nothing fails, or the model does not accept the inputs.
    """
    forward = replace(pipeline.on(ForwardGraph), unrolls=pipeline.reads_steps)

    def record(dtype: torch.dtype | None, before: Pipeline) -> Recording:
        return Recording(
            model, inputs, keyword_inputs, dtype=dtype, loss=loss, seed=seed, forward=before
        )

    for dtype in (torch.float64, None):
        try:
            recording = record(dtype, Pipeline(unrolls=pipeline.reads_steps))
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            if dtype is torch.float64:
                continue  # it only runs in its own dtype
            raise ModelError(f"the model does not accept these inputs: {error}") from error
        cases = recording.forwards if forward.passes else []
        for kind in (ForwardGraph, JointGraph):
            for case in cases if kind is ForwardGraph else recording.joints:
                whole = replace(case, pipeline=pipeline.on(kind), backend=backend)
                if (failure := failure_of(whole)) is not None:
                    return replace(whole, failure=failure)
            if kind is ForwardGraph and forward.passes:
                recording = record(dtype, forward)
    raise ModelError(
        f"there is nothing to reduce: on no graph of {type(model).__name__} does the pipeline "
        f"'{pipeline}' change anything beyond its contract"
    )


def reduce(case: Case, on_try: OnTry | None = None) -> Reduction:
    """Makes a failing case as small as it gets.

    Args:
        case: what fails; its failure is found if it is not given.
        on_try: called after every try.

    Raises:
        ModelError: nothing goes wrong in the case.
    """
    failure = case.failure or failure_of(case)
    if failure is None:
        raise ModelError(
            "there is nothing to reduce: with these values the pipeline "
            f"'{case.pipeline}' changes nothing beyond its contract"
        )
    search = _Search(failure, on_try)
    nodes = case.size
    case = replace(case, failure=failure)
    case = search.fewer_passes(case)
    case = search.fewer_nodes(case)
    case = search.generated_values(case)
    return Reduction(case, nodes, search.tries)


@dataclass
class _Search:
    """Tries smaller cases and keeps those that fail in the same way."""

    failure: Failure
    on_try: OnTry | None
    tries: int = 0
    known: dict[frozenset[str], Case | None] = field(default_factory=dict)

    def fails(self, case: Case) -> Case | None:
        """The case with its failure, if it is the same one."""
        self.tries += 1
        try:
            found = failure_of(case)
        except Exception:  # the smaller graph cannot be run at all: it shows nothing
            found = None
        same = self.failure.same_as(found)
        if self.on_try is not None:
            self.on_try(self.tries, case.size, same)
        return replace(case, failure=found) if same else None

    def fewer_passes(self, case: Case) -> Case:
        """Leaves out passes that the failure does not need."""
        if case.allowed is not None:
            return case  # the numbers of rewrites would mean others
        for p in case.pipeline.passes:
            if p.name in self.failure.passes:
                continue
            rest = Pipeline(tuple(q for q in case.pipeline.passes if q is not p))
            case = self.fails(replace(case, pipeline=rest)) or case
        return case

    def fewer_nodes(self, case: Case) -> Case:
        """Leaves out nodes: first all that are far from what fails, then chunk by chunk."""
        values = every_value(case.graph, case.values, case.seed)
        without_numbers = replace(case, allowed=None)
        calls = [n.name for n in case.graph.nodes if n.op.startswith("call")]

        def kept(names: Collection[str]) -> Case | None:
            key = frozenset(names)
            if key not in self.known:
                smaller = induced(without_numbers, values, key)
                self.known[key] = None if smaller is None else self.fails(smaller)
            return self.known[key]

        best = case
        for near in _surroundings(case, self.failure):
            if (found := kept(near)) is not None:
                best, calls = found, [c for c in calls if c in near]
                break
        size = len(calls)
        while size:
            before, start = len(calls), 0
            while start < len(calls):
                rest = calls[:start] + calls[start + size :]
                found = kept(rest) if rest else None
                if found is None:
                    start += size
                else:
                    best, calls = found, rest
            if size > 1:
                size = -(-size // 2)
            elif len(calls) == before:  # no single node can be left out
                size = 0
        return best

    def generated_values(self, case: Case) -> Case:
        """Replaces recorded values by generated ones, all at once or else one by one."""
        like = {name: describe(v, exact=False) for name, v in case.values.items()}
        if (found := self._with(case, like)) is not None:
            return found
        for name, description in like.items():
            case = self._with(case, {name: description}) or case
        return case

    def _with(self, case: Case, descriptions: dict[str, Any]) -> Case | None:
        values = {name: made(name, d, case.seed) for name, d in descriptions.items()}
        return self.fails(
            replace(
                case,
                values={**case.values, **values},
                descriptions={**case.descriptions, **descriptions},
            )
        )


def _surroundings(case: Case, failure: Failure) -> Iterator[set[str]]:
    """Names of nodes that may suffice to fail, smaller sets first.

    A pass that is wrong wherever it rewrites is wrong at its first rewrite, too, and the nodes
    around that one are tried in no time. Only where they do not fail are the rewrites that it takes
    searched for on the whole graph.
    """
    gate = Gate(case.allowed)
    try:
        case.pipeline.on(type(case.graph)).run(case.graph, gate=gate)
    except GTransError:
        raising = {gate.seen[-1].site} if gate.seen else set()
        yield from _neighbourhoods(case.graph.graph, raising)
        return
    performed = [r for r in gate.seen if r.performed]
    blamed = [r for r in performed if r.pass_name in failure.passes]
    for rewrite in blamed[:1]:
        yield from islice(_neighbourhoods(case.graph.graph, {rewrite.site}), _NEAR)
    yield from _neighbourhoods(case.graph.graph, _sites(case, performed))


def _sites(case: Case, performed: Sequence[Rewrite]) -> set[str]:
    """The names of the nodes that the fewest rewrites that fail are about."""
    checker = Checker(case)
    numbers = [r.number for r in performed]

    def fails(some: Sequence[int]) -> bool:
        return not checker.outcome(case.pipeline, gate=Gate(set(some))).ok

    if not numbers or not fails(numbers):
        return set()  # a fault of the backend
    blamed = minimal_failing(numbers, fails)
    return {r.site for r in performed if r.number in blamed}


def _neighbourhoods(graph: fx.Graph, sites: Collection[str]) -> Iterator[set[str]]:
    """The names of the nodes around some nodes, at growing distances."""
    reached = {n for n in graph.nodes if n.name in sites}
    while reached:
        yield {n.name for n in reached}
        around = {m for n in reached for m in (*n.all_input_nodes, *n.users)} | reached
        around = {n for n in around if n.op != "output"}
        if around == reached:
            break
        reached = around


def induced(case: Case, values: dict[str, Any], keep: Collection[str]) -> Case | None:
    """The case of some of a graph's calls; None if none of them can be called.

    Args:
        case: the whole.
        values: what every node computes.
        keep: names of the calls to keep.
    """
    kept: set[fx.Node] = set()
    for node in case.graph.nodes:
        read = [n for n in node.all_input_nodes if n not in kept]
        called = node.op.startswith("call") and node.name in keep
        if called and all(_can_be_input(values[n.name]) for n in read):
            kept.add(node)
    if not kept:
        return None
    if isinstance(case.graph, JointGraph):
        return _induced_joint(case, case.graph, values, kept)
    return _induced_forward(case, case.graph, values, kept)


def _induced_joint(
    case: Case, joint: JointGraph, values: dict[str, Any], kept: set[fx.Node]
) -> Case:
    read = {n for k in kept for n in k.all_input_nodes if n not in kept}
    ends = [n for n in joint.nodes if n in kept and _is_end(n, kept, values)]
    slots = _gradient_slots(joint, ends)
    inputs: list[Input] = []
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    given: dict[str, Any] = {}

    def place(node: fx.Node, name: str, val: Any) -> fx.Node:
        placeholder = graph.placeholder(name)
        placeholder.meta["val"] = node.meta.get("val")
        given[placeholder.name] = val
        return placeholder

    known = dict(zip(joint.primals, joint.signature.inputs, strict=True))
    for node in joint.nodes:
        wanted = node in read and not joint.is_backward(node)
        if wanted or node in slots.values():
            made[node] = place(node, node.name, values[node.name])
            inputs.append(known.get(node, Input(node.name, "input")))
    gradients: list[fx.Node | None] = [
        next((end for end, p in slots.items() if p is node), None) for node in made
    ]
    for end in ends:
        if joint.is_backward(end) and end not in slots:
            place(end, f"like_{end.name}", torch.zeros_like(values[end.name]))
            inputs.append(Input(f"like_{end.name}", "input"))
            gradients.append(end)
    for node in joint.nodes:
        if node in read and joint.is_backward(node):
            # Torch's split knows tangents by their names.
            name = node.name if node in joint.tangents else f"tangents_{node.name}"
            made[node] = place(node, name, values[node.name])
    for node in joint.nodes:
        if node in kept:
            made[node] = graph.node_copy(node, lambda n: made[n])
    outputs = [made[n] for n in ends if not joint.is_backward(n)]
    graph.output([*outputs, *(None if g is None else made[g] for g in gradients)])
    signature = Signature(tuple(inputs), len(outputs))
    smaller = JointGraph(fx.GraphModule(joint.module, graph), signature)
    return replace(case, graph=smaller, values=given)


def _induced_forward(
    case: Case, forward: ForwardGraph, values: dict[str, Any], kept: set[fx.Node]
) -> Case:
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    given: dict[str, Any] = {}
    read = {n for k in kept for n in k.all_input_nodes if n not in kept}
    for node in forward.nodes:
        if node in read:
            made[node] = graph.placeholder(node.name)
            traced = made[node].meta["example_value"] = value(node)
            recorded = values[node.name]
            if isinstance(traced, torch.Tensor) and traced.requires_grad:
                recorded = recorded.detach().clone().requires_grad_()
            given[made[node].name] = recorded
    for node in forward.nodes:
        if node in kept:
            made[node] = graph.node_copy(node, lambda n: made[n])
    ends = [n for n in forward.nodes if n in kept and _is_end(n, kept, values)]
    graph.output(tuple(made[n] for n in ends))
    smaller = ForwardGraph(fx.GraphModule(forward.module, graph))
    return replace(case, graph=smaller, values=given)


def _gradient_slots(joint: JointGraph, ends: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The primals whose gradients the ends are."""
    slots: dict[fx.Node, fx.Node] = {}
    for primal in joint.primals:
        gradient = joint.gradient_of(primal)
        if gradient is not None and gradient in ends and gradient not in slots:
            slots[gradient] = primal
    return slots


def _is_end(node: fx.Node, kept: set[fx.Node], values: dict[str, Any]) -> bool:
    """Whether nobody in the subset reads this tensor, or the whole graph returned it."""
    if not isinstance(values[node.name], torch.Tensor):
        return False
    return not any(u in kept for u in node.users) or any(u.op == "output" for u in node.users)


def _can_be_input(recorded: Any) -> bool:
    return isinstance(recorded, (torch.Tensor, int, float, bool)) or recorded is None
