"""From a program back to a module: parameters become attributes again, under their old paths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from gtrans.analysis.axis_rules.context import bind
from gtrans.ir.program import Program, identity
from gtrans.ir.regions import Autocast, autocasts


def as_module(program: Program, name: str) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A module that computes what a program does; it shares no memory with it.

    Operators that were under autocast are again. Dropout and batch norm of torch's own layers
    follow the module's mode, as they did before capture. Parameters that nothing reads are left
    out.

    Args:
        program: the program; it stays as it is.
        name: name of the module's class.

    Returns:
        The module, and its node for each node of the program.
    """
    graph = fx.Graph()
    roots: dict[str, Any] = {}
    twins: dict[fx.Node, fx.Node] = {}
    inputs = [n for n, leaf in program.leaves.items() if leaf.kind == "input"]
    for node in inputs:
        twins[node] = graph.placeholder(node.name)
    fresh: dict[tuple[Any, ...], torch.Tensor] = {}
    for node, tensor in program.tensors.items():
        if node.users:
            key = identity(tensor) if tensor.numel() else (node,)
            roots[program.leaves[node].name] = fresh.setdefault(key, _copy(tensor))
            twins[node] = graph.get_attr(program.leaves[node].name)
    flag, regions = _Flag(graph, roots, program.training), _Regions(graph)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            roots[str(node.target)] = getattr(program.module, str(node.target))
        if node.op in ("call_function", "output"):
            regions.enter(autocasts(node))
        if node.op != "placeholder":
            twins[node] = graph.node_copy(node, twins.__getitem__)
            flag.follow_mode(node, twins[node])
    graph.eliminate_dead_code()
    if program.in_spec is not None:
        names = [n.name for n in inputs]
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, program.in_spec, program.out_spec)))
    module = fx.GraphModule(roots, graph, name)
    module.train(program.training)
    for path in roots.keys() - program.saved:
        owner, _, last = path.rpartition(".")
        holder = module.get_submodule(owner)
        if last in holder._buffers:
            holder._non_persistent_buffers_set.add(last)
    _order(module, [leaf.name for leaf in program.leaves.values()])
    return module, twins


class _Regions:
    """Nodes that enter and leave autocast, so that each operator runs under what it ran under."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.entered: list[tuple[Autocast, fx.Node]] = []

    def enter(self, wanted: tuple[Autocast, ...]) -> None:
        """Leaves and enters regions, so that what comes next is under the wanted ones."""
        while self.entered and tuple(r for r, _ in self.entered) != wanted[: len(self.entered)]:
            self.graph.call_function(_exit_autocast, (self.entered.pop()[1],))
        for region in wanted[len(self.entered) :]:
            options = (region.device, region.dtype, region.enabled, region.cache)
            self.entered.append((region, self.graph.call_function(_enter_autocast, options)))


class _Flag:
    """The attribute `training` of the module, read by the operators that depend on it."""

    def __init__(self, graph: fx.Graph, roots: dict[str, Any], training: bool) -> None:
        self.graph, self.roots, self.training = graph, roots, training
        self.node: fx.Node | None = None

    def follow_mode(self, node: fx.Node, twin: fx.Node) -> None:
        """Lets a copied dropout or batch norm read the mode, if a stock layer called it."""
        stack = node.meta.get("nn_module_stack") or {}
        owner = str(list(stack.values())[-1][1]) if stack else ""
        if not (".dropout." in owner or ".batchnorm." in owner):
            return
        bound = bind(node)
        key = next((k for k in ("train", "training", "use_input_stats") if k in bound), None)
        if key is None or bound[key] != self.training:
            return
        if self.node is None:
            self.roots["training"] = self.training
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self.node = self.graph.get_attr("training")
        position = list(bound).index(key)
        if position < len(twin.args):
            twin.update_arg(position, self.node)
        else:
            twin.update_kwarg(key, self.node)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _order(module: nn.Module, names: Sequence[str]) -> None:
    """Puts parameters into the order of the model's own; a GraphModule sorts them by depth."""
    place: dict[str, int] = {}
    for i, name in enumerate(names):
        for end in range(len(name) + 1):
            if end == len(name) or name[end] == ".":
                place.setdefault(name[:end], i)
    for path, owner in module.named_modules():
        start = f"{path}." if path else ""
        for table in (owner._parameters, owner._buffers, owner._modules):
            keys = sorted(table, key=lambda k: place.get(start + k, len(names)))
            items = [(k, table[k]) for k in keys]
            table.clear()
            table.update(items)
