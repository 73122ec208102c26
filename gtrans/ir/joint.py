"""The joint forward and backward graph of one captured region, as a typed view of torch.fx.

A joint graph computes, from primals and tangents, the forward outputs and the gradients:

    primals, tangents  -->  forward outputs, gradients        (gradient i belongs to primal i)

A region is an optic: the forward and backward nodes of one autograd operator. What its backward
nodes read from its forward side is its residual. Every node carries a `Tag` of ours, because
torch's own keys (`seq_nr`, `partitioner_tag`) go stale as soon as a pass inserts a node.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal, TypeGuard

import torch
from torch import fx

from gtrans.errors import GraphError
from gtrans.ir import ops
from gtrans.ir.source import location
from gtrans.ir.tracing import traced


class Side(Enum):
    """On which side of the loss a node stands: a backward node depends on a tangent."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Placement(Enum):
    """What a pass decided about a forward value that the backward reads.

    AUTO leaves the choice to the planner, SAVED keeps the value from the forward, REBUILT runs its
    node again in the backward.
    """

    AUTO = "auto"
    SAVED = "saved"
    REBUILT = "rebuilt"


@dataclass(frozen=True)
class Unit:
    """The piece of work that a backward node belongs to, see `gtrans.analysis.lanes`.

    Attributes:
        kind: whether it rebuilds values of a block or computes its gradients.
        block: number of the block; -1 for gradients before the first of them.
        look_ahead: by how many blocks rebuilding may be ahead.
    """

    kind: Literal["recover", "grads"]
    block: int
    look_ahead: int


@dataclass(frozen=True)
class Tag:
    """What gtrans knows about a node. Frozen, so that copied `meta` dictionaries may share it.

    `recovers` is the number of the coupling, counted from the last, whose stream a node rebuilds,
    and `twin` a number that a rebuilt value shares with the forward's own value, which has both.
    """

    side: Side
    region: int | None = None
    placement: Placement = Placement.AUTO
    accumulates: bool = False
    made_by: str = ""
    recovers: int | None = None
    twin: int | None = None
    unit: Unit | None = None


TAG = "gtrans"

InputKind = Literal["parameter", "buffer", "input", "symbol"]


@dataclass(frozen=True)
class Input:
    """A primal: its path in the model ("encoder.weight") or argument name, and what it is."""

    name: str
    kind: InputKind


@dataclass(frozen=True)
class Signature:
    """How a joint graph's placeholders and outputs are to be read.

    Attributes:
        inputs: one entry per primal, in placeholder order; tangents follow them.
        num_forward_outputs: how many of the outputs belong to the forward.
    """

    inputs: tuple[Input, ...]
    num_forward_outputs: int


@dataclass(frozen=True)
class Region:
    """The forward and backward nodes of one autograd operator."""

    number: int
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Offer:
    """Another way to get a forward value in the backward: a function of other forward values.

    Attributes:
        function: plain torch code that returns the value, up to the contract of the offering pass.
        inputs: its arguments, nodes and constants.
        passes_over_memory: its cost, in writes of the value.
        made_by: name of the offering pass.
    """

    function: Callable[..., torch.Tensor]
    inputs: tuple[Any, ...]
    passes_over_memory: float = 1.0
    made_by: str = ""

    @property
    def nodes(self) -> list[fx.Node]:
        """The forward values it needs."""
        return [a for a in self.inputs if isinstance(a, fx.Node)]


@dataclass(frozen=True)
class Surroundings:
    """What is in memory beside a graph while it runs.

    Attributes:
        held_bytes: by the model's other graphs: values saved between their halves, gradients that
            are ready, parameters that this graph does not have; and what is reserved.
        plain_peak: what the whole step would peak at without any pass, held bytes included; None
            if nobody asked.
        slack: share of a memory budget to leave free for the backend.
        reserved_bytes: those of the held bytes that are no part of the model, such as the
            optimizer's state.
    """

    held_bytes: int = 0
    plain_peak: int | None = None
    slack: float = 0.0
    reserved_bytes: int = 0


class JointGraph:
    """A typed view of a joint graph, with the edits that passes need.

    Args:
        module: the traced joint graph. It is edited in place; use `copy` to keep the original.
        signature: how to read its placeholders and outputs.

    Raises:
        GraphError: placeholders or outputs do not fit the signature.
    """

    def __init__(self, module: fx.GraphModule, signature: Signature) -> None:
        self.module = module
        self.signature = signature
        self.cut: tuple[fx.Node, ...] | None = None
        self.offers: dict[fx.Node, Offer] = {}
        self.author = ""
        self.surroundings = Surroundings()
        placeholders = module.graph.find_nodes(op="placeholder")
        count = len(signature.inputs)
        outputs = self._output_arguments()
        if len(placeholders) < count or len(outputs) < signature.num_forward_outputs:
            raise GraphError(
                f"joint graph has {len(placeholders)} placeholders and {len(outputs)} outputs, its "
                f"signature {count} primals and {signature.num_forward_outputs} forward outputs"
            )
        self.primals: tuple[fx.Node, ...] = tuple(placeholders[:count])
        self.tangents: tuple[fx.Node, ...] = tuple(placeholders[count:])
        self._position_of = {primal: i for i, primal in enumerate(self.primals)}
        self._tag_new_nodes()

    # ------------------------------------------------------------------ reading

    @property
    def graph(self) -> fx.Graph:
        """The underlying torch.fx graph."""
        return self.module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in order."""
        return list(self.graph.nodes)

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return self.graph.output_node()

    @property
    def forward_outputs(self) -> tuple[Any, ...]:
        """What the forward returns: nodes, numbers or None."""
        return self._output_arguments()[: self.signature.num_forward_outputs]

    @property
    def gradients(self) -> tuple[fx.Node | None, ...]:
        """The gradient of each primal, None where there is none; in the order of `primals`."""
        return tuple(
            g if isinstance(g, fx.Node) else None
            for g in self._output_arguments()[self.signature.num_forward_outputs :]
        )

    @property
    def parameters(self) -> dict[str, fx.Node]:
        """The primals that are parameters, by their path in the model."""
        return {
            info.name: node
            for info, node in zip(self.signature.inputs, self.primals, strict=True)
            if info.kind == "parameter"
        }

    def input_of(self, primal: fx.Node) -> Input:
        """What a primal is in the user's model."""
        return self.signature.inputs[self._position_of[primal]]

    def gradient_of(self, primal: fx.Node) -> fx.Node | None:
        """The node that holds the gradient of a primal, if there is one."""
        position = self.signature.num_forward_outputs + self._position_of[primal]
        outputs: Any = self.output.args[0]
        gradient = outputs[position] if position < len(outputs) else None
        return gradient if isinstance(gradient, fx.Node) else None

    def is_forward(self, node: object) -> bool:
        """Whether the argument is a node that depends on no tangent."""
        return _has_value(node) and tag(node).side is Side.FORWARD

    def is_backward(self, node: object) -> bool:
        """Whether the argument is a node that depends on a tangent."""
        return _has_value(node) and tag(node).side is Side.BACKWARD

    def calls(self, *targets: Callable[..., Any]) -> list[fx.Node]:
        """The nodes that call one of the given operators, in order."""
        found = [n for t in targets for n in self.graph.find_nodes(op="call_function", target=t)]
        return found if len(targets) == 1 else sorted(found)

    def backward_readers(self, node: fx.Node) -> list[fx.Node]:
        """The backward nodes that read a forward value, directly or through views and getitem."""
        readers: list[fx.Node] = []
        pending = [node]
        while pending:
            for user in pending.pop().users:
                if self.is_backward(user):
                    readers.append(user)
                elif ops.is_view(user) or ops.is_getitem(user):
                    pending.append(user)
        return sorted(dict.fromkeys(readers))

    def regions(self) -> dict[int, Region]:
        """The regions by number; a region without backward nodes has no gradient to compute."""
        sides: dict[int, tuple[list[fx.Node], list[fx.Node]]] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and (number := tag(node).region) is not None:
                forward, backward = sides.setdefault(number, ([], []))
                (forward if self.is_forward(node) else backward).append(node)
        return {n: Region(n, tuple(f), tuple(b)) for n, (f, b) in sides.items()}

    def residual(self, region: Region) -> tuple[fx.Node, ...]:
        """The forward values that a region's backward nodes read, in graph order."""
        read = {
            source
            for node in region.backward
            for source in ops.tensor_inputs(node)
            if self.is_forward(source)
        }
        return tuple(sorted(read))

    def gradient_accumulations(self) -> list[fx.Node]:
        """The backward nodes that add up the cotangents of a value that was used several times."""
        return [n for n in self.graph.nodes if TAG in n.meta and tag(n).accumulates]

    # ------------------------------------------------------------------ editing

    def insert_after(
        self, anchor: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Inserts a call right after a node and fills in its value, tag and source line."""
        if anchor.op == "placeholder":
            anchor = (*self.primals, *self.tangents)[-1]
        with self.graph.inserting_after(anchor):
            return self._call(anchor, target, args, kwargs)

    def insert_before(
        self, anchor: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Inserts a call right before a node and fills in its value, tag and source line."""
        with self.graph.inserting_before(anchor):
            return self._call(anchor, target, args, kwargs)

    def repeat_before(
        self, anchor: fx.Node, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        """Inserts the call of a node once more, on arguments of the same shapes and dtypes."""
        with self.graph.inserting_before(anchor):
            again = self.graph.create_node(node.op, node.target, args, kwargs)
        old = tag(node)
        new = Tag(Side.FORWARD, old.region, made_by=self.author, recovers=old.recovers)
        again.meta = {**node.meta, TAG: new}
        self._retag(again)
        return again

    def splice_before(
        self, anchor: fx.Node, function: Callable[..., Any], *args: Any
    ) -> tuple[fx.Node, ...]:
        """Traces a function of tensors and inserts its operators right before a node.

        Args:
            anchor: where to insert.
            function: plain torch code; returns a tensor or a tuple of tensors.
            args: nodes of this graph, or constants.

        Returns:
            The nodes that hold the results.
        """
        inputs = [a for a in args if isinstance(a, fx.Node)]
        mode = self._fake_mode(inputs)
        graph = traced(function, args, [n.meta["val"] for n in inputs], mode)
        made: dict[fx.Node, Any] = dict(
            zip(graph.find_nodes(op="placeholder"), inputs, strict=True)
        )
        for node in graph.nodes:
            if node.op == "call_function":
                inner = fx.map_arg((node.args, node.kwargs), lambda n: made[n])
                made[node] = self.insert_before(anchor, node.target, *inner[0], **inner[1])
        results: Any = graph.output_node().args[0]
        return tuple(made[r] for r in (results if isinstance(results, tuple) else (results,)))

    def splice_after(
        self, anchor: fx.Node, function: Callable[..., Any], *args: Any
    ) -> tuple[fx.Node, ...]:
        """`splice_before` the node that follows."""
        if anchor.op == "placeholder":
            anchor = (*self.primals, *self.tangents)[-1]
        return self.splice_before(anchor.next, function, *args)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Lets every user of `old` read `new` instead, and erases `old`.

        Raises:
            GraphError: the two values differ in shape or dtype.
        """
        self.replace_uses(old, new, [user for user in old.users if user is not new])
        if not old.users:
            self.erase(old)

    def replace_uses(self, old: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> None:
        """Lets the given users of `old` read `new` instead.

        Raises:
            GraphError: the two values differ in shape or dtype.
        """
        _require_same_value(old, new)
        for user in list(users):
            user.replace_input_with(old, new)
            self._retag(user)

    def move_before(self, node: fx.Node, anchor: fx.Node) -> None:
        """Lets a node run right before another one. What the plan keeps stays as it is.

        Raises:
            GraphError: the node would run before an input of it, or after a reader.
        """
        behind = [n for n in node.all_input_nodes if not n < anchor]
        before = [n for n in node.users if n < anchor]
        if node is anchor or behind or before:
            raise GraphError(
                f"cannot move {node.name} ({location(node)}) before {anchor.name}: it needs or is "
                f"needed by {names([*behind, *before]) or 'itself'} on the way"
            )
        anchor.prepend(node)

    def erase(self, node: fx.Node) -> None:
        """Erases a node that nobody uses, and the offers that involve it."""
        self.graph.erase_node(node)
        self.offers = {
            value: offer
            for value, offer in self.offers.items()
            if value is not node and node not in offer.nodes
        }
        self.cut = None

    def save_for_backward(self, node: fx.Node) -> None:
        """Keeps a forward value for the backward, whatever the planner would choose."""
        self.place(node, Placement.SAVED)

    def rebuild_in_backward(self, node: fx.Node) -> None:
        """Runs a node in the backward from its inputs, whatever the planner would choose."""
        self.place(node, Placement.REBUILT)

    def place(self, node: fx.Node, placement: Placement) -> None:
        """Fixes how a forward value reaches the backward.

        Raises:
            GraphError: the node depends on a tangent, so it is no forward value.
        """
        if not self.is_forward(node):
            raise GraphError(f"{node.name} is a backward node; only forward values can be placed")
        node.meta[TAG] = replace(tag(node), placement=placement)
        self.cut = None

    def offer(
        self,
        value: fx.Node,
        function: Callable[..., torch.Tensor],
        *inputs: Any,
        passes_over_memory: float = 1.0,
    ) -> None:
        """Offers the planner another way to get a forward value in the backward.

        The forward keeps computing the value as it did. Where the planner takes the offer, the
        backward reads `function(*inputs)` instead of a saved copy. The last offer of a value holds.

        Args:
            value: a forward tensor that the backward may need.
            function: plain torch code that computes it.
            inputs: forward values of this graph, and constants.
            passes_over_memory: cost of the function, in writes of the value.

        Raises:
            GraphError: the value or an input depends on a tangent.
        """
        offer = Offer(function, inputs, passes_over_memory, self.author)
        for node in (value, *offer.nodes):
            if not self.is_forward(node):
                raise GraphError(f"{node.name} is a backward node; offers are about forward values")
        self.offers[value] = offer
        self.cut = None

    def eliminate_dead_code(self) -> int:
        """Erases the nodes that nothing reads; returns how many. Effects and offers are kept."""
        before = len(self.graph.nodes)
        wanted = {n for offer in self.offers.values() for n in offer.nodes}
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n in wanted or _must_stay(n))
        remaining = set(self.graph.nodes)
        self.offers = {v: o for v, o in self.offers.items() if v in remaining}
        return before - len(remaining)

    def copy(self) -> "JointGraph":
        """An independent copy of the nodes; values (fake tensors) and constants are shared."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, made))
        graph.output_node().meta = dict(self.output.meta)
        module = fx.GraphModule(self.module, graph)
        twin = JointGraph(module, self.signature)
        twin.surroundings = self.surroundings
        twin.cut = None if self.cut is None else tuple(made[n] for n in self.cut)
        twin.offers = {
            made[value]: replace(offer, inputs=fx.map_arg(offer.inputs, lambda n: made[n]))
            for value, offer in self.offers.items()
        }
        return twin

    # ------------------------------------------------------------------ private

    def _output_arguments(self) -> tuple[Any, ...]:
        return tuple(self.output.args[0])  # type: ignore[arg-type]  # AOT returns one flat list

    def _call(
        self,
        anchor: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> fx.Node:
        node = self.graph.call_function(target, args, dict(kwargs))
        self.cut = None
        for key in ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr"):
            if key in anchor.meta:
                node.meta[key] = anchor.meta[key]
        node.meta["val"] = self._value_of(node)
        region = tag(anchor).region if TAG in anchor.meta else None
        node.meta[TAG] = Tag(Side.FORWARD, region, made_by=self.author)
        self._retag(node)
        return node

    def _value_of(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        with self._fake_mode(node.all_input_nodes) or nullcontext():
            return target(*args, **kwargs)

    def _fake_mode(self, nodes: Iterable[fx.Node]) -> Any:
        for node in (*nodes, *self.primals, *self.tangents):
            val = node.meta.get("val")
            if isinstance(val, torch._subclasses.FakeTensor):
                return val.fake_mode
        return None

    def _retag(self, node: fx.Node) -> None:
        """Derives the side of a node from its inputs, and of its users if it changed."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node.op == "output":
                continue
            backward = any(self.is_backward(n) for n in node.all_input_nodes)
            side = Side.BACKWARD if backward else Side.FORWARD
            changed = tag(node).side is not side
            node.meta[TAG] = replace(tag(node), side=side)
            node.meta["partitioner_tag"] = f"is_{side.value}"
            node.meta["autograd_backward"] = backward
            if changed:
                pending.extend(node.users)
        self.cut = None

    def _tag_new_nodes(self) -> None:
        """Tags what tracing left untagged: sides by dependence on tangents, regions by seq_nr."""
        backward: set[fx.Node] = set(self.tangents)
        for node in self.graph.nodes:
            if node not in backward and any(n in backward for n in node.all_input_nodes):
                backward.add(node)
            if TAG in node.meta or node.op == "output":
                continue
            accumulates = bool(node.meta.get("is_gradient_acc"))
            node.meta[TAG] = Tag(
                Side.BACKWARD if node in backward else Side.FORWARD,
                # An accumulation carries the seq_nr of whichever node was traced last.
                None if accumulates else node.meta.get("seq_nr"),
                accumulates=accumulates,
            )


def tag(node: fx.Node) -> Tag:
    """Our tag of a node.

    Raises:
        GraphError: the node was not inserted through `JointGraph`.
    """
    try:
        found: Tag = node.meta[TAG]
    except KeyError:
        raise GraphError(
            f"node {node.name} ({location(node)}) has no gtrans tag: insert nodes through "
            "JointGraph.insert_before or insert_after, not through the fx graph"
        ) from None
    return found


def assign(node: fx.Node, unit: Unit) -> None:
    """Says which piece of work a node belongs to; nothing else changes."""
    node.meta[TAG] = replace(tag(node), unit=unit)


def runs_in(node: fx.Node) -> Side:
    """The half that runs a node: what a plan rebuilds depends on no tangent, yet runs backward."""
    found = tag(node)
    return Side.BACKWARD if found.placement is Placement.REBUILT else found.side


def _has_value(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op != "output"


def _must_stay(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or (ops.is_effect(node) and not ops.is_random(node))


def _require_same_value(old: fx.Node, new: fx.Node) -> None:
    a, b = old.meta.get("val"), new.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return
    if a.dtype != b.dtype or len(a.shape) != len(b.shape) or list(a.shape) != list(b.shape):
        raise GraphError(
            f"cannot replace {old.name} ({a.dtype}, {tuple(a.shape)}; {location(old)}) by "
            f"{new.name} ({b.dtype}, {tuple(b.shape)})"
        )


def sources(nodes: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The distinct inputs of a set of nodes that lie outside of it."""
    seen: set[fx.Node] = set()
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in nodes and source not in seen:
                seen.add(source)
                yield source


def names(nodes: Sequence[fx.Node]) -> str:
    """Node names for messages: ``mul_1, add_2``."""
    return ", ".join(n.name for n in nodes)
