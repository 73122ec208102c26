"""Erasure as a graph rewrite: parameters cut, size arguments recomputed from the axes.

    linear(x, W[o, i], b[o])            linear(x', W'[o', i'], b'[o'])
    view(x, [N, T, H, D])       -->     reshape(x', [N, T, H', D'])
    layer_norm(x, [D], w, b)            layer_norm over D' entries with the divisor D

This works for every program. Where the model's own modules can express the result,
`erase_modules` gives a model of the same class instead.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from gtrans.analysis.axes import Axis, kept_size, mask
from gtrans.analysis.axis_rules.context import Edits, Total, bind
from gtrans.analysis.erasable import Structure
from gtrans.ir import ops
from gtrans.ir.program import Leaf, identity
from gtrans.runtime.norms import layer_norm_of_longer, rms_norm_of_longer

aten = torch.ops.aten

Erased = Mapping[Axis, torch.Tensor]
"""For some atoms a boolean vector, true at the indices to erase."""


def cut(tensor: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """The indices of a tensor that stay, as a new tensor (or parameter) of the same kind."""
    data = tensor.detach()
    for dim, keep in enumerate(masks):
        if not bool(keep.all()):
            data = data.index_select(dim, keep.nonzero().flatten().to(data.device))
    if data is tensor.detach() or data.data_ptr() == tensor.data_ptr():
        data = data.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def cut_tensors(structure: Structure, erased: Erased) -> dict[str, torch.Tensor]:
    """All parameters and buffers by path, cut; tied ones stay one tensor."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for node, tensor in structure.program.tensors.items():
        leaf = structure.program.leaves[node]
        masks = [mask(axis, erased) for axis in structure.analysis.axes(node)]
        key = (*identity(tensor), node if not tensor.numel() else None)
        if key not in made:
            made[key] = cut(tensor, masks)
        found[leaf.name] = made[key]
    return found


def kept_counts(erased: Erased) -> dict[Axis, int]:
    """How many indices of each atom stay."""
    return {atom: int((~gone).sum()) for atom, gone in erased.items()}


@dataclass
class GraphErasure:
    """Builds the erased graph of a program.

    Args:
        structure: the analysed program.
        erased: what to erase.
        keep_divisor: average over the old sizes, which is exact; else over the new ones.

    Attributes:
        made: after `build`, the node of the erased graph for each node of the program.
    """

    structure: Structure
    erased: Erased
    keep_divisor: bool = True
    made: dict[fx.Node, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._kept = kept_counts(self.erased)

    def size(self, axis: Axis) -> int:
        """How many indices of an axis stay."""
        return kept_size(axis, self._kept)

    def argument(self, value: Any) -> Any:
        """The new value of a size argument."""
        if isinstance(value, Axis):
            return self.size(value)
        if isinstance(value, Total):
            return sum(self.size(a) for a in value.axes)
        if isinstance(value, list):
            return [self.argument(v) for v in value]
        return value

    def divisors(self, edits: Edits) -> tuple[int, int]:
        """How many elements a node averages over, before and after."""
        return (
            prod(axis.size for axis in edits.divisor),
            prod(self.size(axis) for axis in edits.divisor),
        )

    def build(self, name: str) -> fx.GraphModule:
        """The erased model as a GraphModule that takes and returns what the model does."""
        program = self.structure.program
        self._start()
        inputs = [n for n, leaf in program.leaves.items() if leaf.kind == "input"]
        for node in inputs:
            self.made[node] = self._graph.placeholder(node.name)
        self._copy(n for n in program.graph.nodes if n not in self.made)
        self._graph.eliminate_dead_code()
        names = [n.name for n in inputs]
        self._graph.set_codegen(
            _PyTreeCodeGen(_PyTreeInfo(names, program.in_spec, program.out_spec))
        )
        return self._finish(name, "")

    def build_part(self, path: str) -> fx.GraphModule | None:
        """The erased form of one submodule, if it maps one tensor to one tensor in one call."""
        program = self.structure.program
        inside = [n for n in program.graph.nodes if n.op == "call_function" and _within(n, path)]
        members = set(inside)
        given = {s for n in inside for s in n.all_input_nodes} - members
        free = [n for n in given if program.leaves.get(n, _INNER).kind in ("input", "inner")]
        results = [n for n in inside if any(u not in members for u in n.users)]
        leaves = [n for n in given if n not in free]
        own = all(program.leaves[n].name.startswith(f"{path}.") for n in leaves)
        if len(free) != 1 or len(results) != 1 or not own:
            return None
        self._start()
        self.made[free[0]] = self._graph.placeholder("x")
        self._copy([*leaves, *inside])
        self._graph.output(self.made[results[0]])
        return self._finish("Erased", f"{path}.")

    # ------------------------------------------------------------------ private

    def _start(self) -> None:
        self._graph = fx.Graph()
        self._roots: dict[str, Any] = {}
        self.made = {}
        self._flag: fx.Node | None = None
        self._tensors = cut_tensors(self.structure, self.erased)

    def _copy(self, nodes: Iterable[fx.Node]) -> None:
        program = self.structure.program
        for node in nodes:
            if node.op == "placeholder":
                if node.users:
                    self.made[node] = self._leaf(program.leaves[node])
            elif node.op == "get_attr":
                self._roots[str(node.target)] = getattr(program.module, str(node.target))
                self.made[node] = self._graph.get_attr(str(node.target))
            elif node.op == "output":
                self._graph.output(fx.map_arg(node.args[0], self.made.__getitem__))
            else:
                self.made[node] = self._call(node)

    def _finish(self, name: str, prefix: str) -> fx.GraphModule:
        roots = {k.removeprefix(prefix): v for k, v in self._roots.items()}
        for node in self._graph.find_nodes(op="get_attr"):
            node.target = str(node.target).removeprefix(prefix)
        module = fx.GraphModule(roots, self._graph, name)
        module.train(self.structure.program.training)
        for path in roots.keys() & self._tensors.keys():
            owner, _, last = path.rpartition(".")
            if path not in self.structure.program.saved:
                holder = module.get_submodule(owner)
                if last in holder._buffers:
                    holder._non_persistent_buffers_set.add(last)
        _order(module, [leaf.name.removeprefix(prefix) for leaf in self._leaves()])
        return module

    def _leaves(self) -> Iterable[Leaf]:
        return self.structure.program.leaves.values()

    def _leaf(self, leaf: Leaf) -> fx.Node:
        self._roots[leaf.name] = self._tensors[leaf.name]
        return self._graph.get_attr(leaf.name)

    def _call(self, node: fx.Node) -> Any:
        edits = self.structure.analysis.context.edits.get(node, Edits())
        target: Any = node.target
        bound = bind(node)
        changed = {k: self.argument(v) for k, v in edits.arguments.items()}
        if not edits.arguments and not edits.pieces and not edits.divisor:
            twin = self._graph.node_copy(node, self.made.__getitem__)
            self._follow_mode(node, twin, bound)
            return twin
        if edits.pieces:
            sizes = [self.size(p) for p in edits.pieces]
            return self._insert(
                aten.split_with_sizes.default, self.made[bound["self"]], sizes, edits.dim
            )
        old, new = self.divisors(edits)
        if old != new and self.keep_divisor:
            return self._divide_by(node, bound, old, new)
        if target in (aten.view.default, aten._unsafe_view.default):
            return self._insert(aten.reshape.default, self.made[bound["self"]], changed["size"])
        args = [changed.pop(k, v) for k, v in zip(bound, node.args, strict=False)]
        kwargs = {**node.kwargs, **{k: v for k, v in changed.items() if k in node.kwargs}}
        # A size left at its default (groups=1, end=None) only has to be said once it differs.
        for key, value in changed.items():
            if key not in node.kwargs and bound[key] != value and value is not None:
                kwargs[key] = value
        args, kwargs = fx.map_arg((args, kwargs), self.made.__getitem__)
        return self._graph.call_function(target, tuple(args), kwargs)

    def _divide_by(self, node: fx.Node, bound: dict[str, Any], old: int, new: int) -> fx.Node:
        name = ops.overload(node)
        packet = None if name is None else name.overloadpacket
        given = fx.map_arg(bound, self.made.__getitem__)
        if packet is aten.mean:
            twin = self._graph.node_copy(node, self.made.__getitem__)
            return self._insert(aten.mul.Tensor, twin, new / old)
        rank = len(bound["normalized_shape"])
        x, weight, eps = given["input"], given["weight"], given["eps"]
        if packet is aten.rms_norm:
            return self._insert(rms_norm_of_longer, x, rank, old, weight, eps)
        return self._insert(layer_norm_of_longer, x, rank, old, weight, given["bias"], eps)

    def _insert(self, target: Any, *args: Any) -> fx.Node:
        return self._graph.call_function(target, args)

    def _follow_mode(self, node: fx.Node, twin: fx.Node, bound: dict[str, Any]) -> None:
        """Lets dropout and batch norm follow the mode of the erased model, as modules do."""
        key = next((k for k in ("train", "training", "use_input_stats") if k in bound), None)
        stack = node.meta.get("nn_module_stack") or {}
        owner = str(list(stack.values())[-1][1]) if stack else ""
        stock = ".dropout." in owner or ".batchnorm." in owner
        if key is None or not stock or bound[key] != self.structure.program.training:
            return
        if self._flag is None:
            self._roots["training"] = self.structure.program.training
            first = next(iter(self._graph.nodes))
            with self._graph.inserting_before(first):
                self._flag = self._graph.get_attr("training")
        position = list(bound).index(key)
        if position < len(twin.args):
            twin.update_arg(position, self._flag)
        else:
            twin.update_kwarg(key, self._flag)


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


def owner_path(node: fx.Node) -> str:
    """The path of the innermost module that ran a node; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def paths_of(node: fx.Node) -> set[str]:
    """The paths of all modules around a node; empty if capture recorded none."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return {str(path).partition("@")[0] for path, _ in stack}


def _within(node: fx.Node, path: str) -> bool:
    return path in paths_of(node)


_INNER: Any = SimpleNamespace(kind="inner")
