"""A whole model's forward as one ATen graph whose parameters are inputs.

Unlike `ForwardGraph` (what Dynamo hands over: torch functions, one graph per graph break) a
program is the complete forward with every parameter and buffer by name, which is what a rewrite
of the parameters themselves needs (knob P). Composite operators (`linear`, `layer_norm`,
`scaled_dot_product_attention`) stay whole.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from gtrans.errors import CaptureError, GraphError, ModelError
from gtrans.ir import ops
from gtrans.ir.calling import captured_call
from gtrans.ir.regions import inline_regions, under_autocast
from gtrans.ir.source import location

aten = torch.ops.aten

LeafKind = Literal["parameter", "buffer", "constant", "input"]

_CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range_for_size.default,
    }
)


@dataclass(frozen=True)
class Leaf:
    """A placeholder of a program: the path of a parameter, or the name of an argument."""

    name: str
    kind: LeafKind


@dataclass
class Program:
    """A captured forward.

    Attributes:
        module: the graph; parameters, buffers, constants and arguments are placeholders.
        leaves: what each placeholder is.
        tensors: the parameter, buffer or constant of each such placeholder.
        in_spec: how (args, kwargs) flatten into the arguments (a pytree specification).
        out_spec: how the output is put together from the graph's flat outputs.
        training: the mode the model was in.
        saved: the keys of the model's state_dict; other buffers are not persistent.
        left_out: results of the model that are no tensors, such as caches; None in their place.
        author: the pass at work on it.
    """

    module: fx.GraphModule
    leaves: dict[fx.Node, Leaf]
    tensors: dict[fx.Node, torch.Tensor]
    in_spec: Any
    out_spec: Any
    training: bool
    saved: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()
    author: str = ""

    @property
    def graph(self) -> fx.Graph:
        """The underlying torch.fx graph."""
        return self.module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in order."""
        return list(self.graph.nodes)

    def parameters(self) -> dict[str, fx.Node]:
        """The placeholders of parameters, by their path in the model."""
        return {leaf.name: n for n, leaf in self.leaves.items() if leaf.kind == "parameter"}

    def ties(self) -> list[list[fx.Node]]:
        """The placeholders of parameters and buffers that are one tensor in memory."""
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node, tensor in self.tensors.items():
            if tensor.numel() and self.leaves[node].kind != "constant":
                groups.setdefault(identity(tensor), []).append(node)
        return [group for group in groups.values() if len(group) > 1]

    def copy(self) -> "Program":
        """An independent copy of the nodes; tensors and recorded values are shared."""
        twins: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, twins))
        graph.output_node().meta = dict(self.graph.output_node().meta)
        return replace(
            self,
            module=fx.GraphModule(self.module, graph),
            leaves={twins[n]: leaf for n, leaf in self.leaves.items()},
            tensors={twins[n]: t for n, t in self.tensors.items()},
        )

    def eliminate_dead_code(self) -> int:
        """Erases the operations that nothing reads any more; returns how many."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code()
        return before - len(self.graph.nodes)

    def refresh(self) -> None:
        """Works the recorded values out anew, after tensors have changed their sizes.

        Raises:
            GraphError: an operation does not accept the sizes it is given.
        """
        mode = _fake_mode(self.graph)
        for node in self.graph.nodes:
            if node in self.tensors:
                node.meta["val"] = mode.from_tensor(self.tensors[node], static_shapes=True)
            elif node.op == "get_attr":
                node.meta.setdefault("val", getattr(self.module, str(node.target)))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                try:
                    with mode, under_autocast(node):
                        node.meta["val"] = node.target(*args, **kwargs)
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    raise GraphError(
                        f"{node.name} ({location(node)}) does not accept the sizes it is given "
                        f"after a rewrite: {error}"
                    ) from error


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly when they view the same memory in the same way."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def export_program(model: nn.Module, inputs: Sequence[Any], keywords: dict[str, Any]) -> Program:
    """Captures the forward of a model in the mode it is in; the model stays as it is.

    Raises:
        CaptureError: the forward cannot be captured as one graph.
    """
    errors: list[Exception] = []
    for strict in (False, True):
        try:
            with torch.enable_grad(), captured_call(model, inputs, keywords) as left_out:
                exported = torch.export.export(model, tuple(inputs), keywords, strict=strict)
            break
        except CaptureError:
            raise
        except Exception as error:
            errors.append(error)
    else:
        reasons = "\n  ".join(f"{type(e).__name__}: {_first_line(e)}" for e in errors)
        raise CaptureError(
            f"the forward of {type(model).__name__} cannot be captured as one graph:\n  {reasons}\n"
            "  Remove what depends on the values of tensors (`.item()`, `if tensor:`), or prune "
            "the submodules on their own"
        ) from errors[0]
    exported = _without_assignments(exported)
    module = exported.graph_module
    leaves: dict[fx.Node, Leaf] = {}
    tensors: dict[fx.Node, torch.Tensor] = {}
    specs = exported.graph_signature.input_specs
    nodes = module.graph.find_nodes(op="placeholder")
    for node, spec in zip(nodes, specs, strict=True):
        kind = spec.kind.name.lower()
        if kind == "parameter":
            leaves[node], tensors[node] = Leaf(spec.target, "parameter"), _at(model, spec.target)
        elif kind == "buffer":
            leaves[node], tensors[node] = Leaf(spec.target, "buffer"), _at(model, spec.target)
        elif kind == "constant_tensor":
            leaves[node] = Leaf(spec.target, "constant")
            tensors[node] = exported.constants[spec.target]
        else:
            leaves[node] = Leaf(node.name, "input")
    inline_regions(module)
    _without_checks(module)
    _without_identities(module.graph)
    _without_writes(module.graph, leaves)
    spec = exported.call_spec
    return Program(
        module,
        leaves,
        tensors,
        spec.in_spec,
        spec.out_spec,
        model.training,
        saved=frozenset(model.state_dict()),
        left_out=tuple(left_out),
    )


def _fake_mode(graph: fx.Graph) -> Any:
    values = (n.meta.get("val") for n in graph.nodes)
    fakes = (v for v in values if isinstance(v, torch._subclasses.FakeTensor))
    first = next(fakes, None)
    return torch._subclasses.FakeTensorMode() if first is None else first.fake_mode


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]


def _at(model: nn.Module, path: str | None) -> torch.Tensor:
    owner, _, name = (path or "").rpartition(".")
    found = getattr(model.get_submodule(owner), name, None)
    if not isinstance(found, torch.Tensor):
        raise ModelError(f"{type(model).__name__} has no tensor {path!r}")
    return found


def _without_assignments(exported: Any) -> Any:
    """Makes `y[:, i] = x` a value of its own, a `select_scatter`, instead of a write into a view.

    Where the model also writes buffers (batch norm in training) it stays as it is: those writes
    would become further outputs.
    """
    own = {n for n in exported.graph.nodes if n.op == "call_function" and not ops.is_view(n)}
    if not any(
        ops.mutates(n) and n.args[0] not in own and ops.storage_of(n.args[0]) in own
        for n in exported.graph.nodes
        if n.op == "call_function"
    ):
        return exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies a class it has deprecated
        functional = exported.run_decompositions({})
    outputs = functional.graph_signature.output_specs
    return functional if all(o.kind.name == "USER_OUTPUT" for o in outputs) else exported


def _without_checks(module: fx.GraphModule) -> None:
    """Drops the checks that capture added about its own tensors, and what only they read."""
    for node in list(module.graph.nodes):
        if node.target in _CHECKS and not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _without_identities(graph: fx.Graph) -> None:
    """Drops casts to the dtype a value has already: the module that casts returns its input."""
    for node in list(graph.nodes):
        op = ops.overload(node)
        if op is None or op.overloadpacket not in (aten.to, aten.alias):
            continue
        source, value = node.args[0], node.meta.get("val")
        given = source.meta.get("val") if isinstance(source, fx.Node) else None
        if isinstance(value, torch.Tensor) and isinstance(given, torch.Tensor):
            same = value.dtype == given.dtype and value.device == given.device
            if same and value.stride() == given.stride() and value.shape == given.shape:
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _without_writes(graph: fx.Graph, leaves: dict[fx.Node, Leaf]) -> None:
    """Replaces `relu_(x)` by `relu(x)` where nothing else sees the memory of `x`."""
    for node in list(graph.nodes):
        pure = _pure_form(node)
        written = node.args[0] if node.args else None
        if pure is None or not isinstance(written, fx.Node) or written in leaves:
            continue
        if ops.is_view(written) or any(ops.is_view(u) for u in written.users):
            continue
        node.target = pure
        for user in [u for u in written.users if u > node]:
            user.replace_input_with(written, node)


def _pure_form(node: fx.Node) -> torch._ops.OpOverload | None:
    op = ops.overload(node)
    if op is None or not op._schema.is_mutable or not op._opname.endswith("_"):
        return None
    packet = getattr(aten, op._opname[:-1], None)
    pure = getattr(packet, op._overloadname or "default", None)
    return pure if isinstance(pure, torch._ops.OpOverload) else None
