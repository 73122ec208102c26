"""Erasure as a graph rewrite: parameters cut, size arguments recomputed from the axes.

    linear(x, W[o, i], b[o])            linear(x', W'[o', i'], b'[o'])
    view(x, [N, T, H, D])       -->     reshape(x', [N, T, H', D'])
    layer_norm(x, [D], w, b)            layer_norm over D' entries with the divisor D

This works for every program. Where the model's own modules can express the result,
`erase_modules` gives a model of the same class instead.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from gtrans.analysis.axes import Axis, kept_size, mask
from gtrans.analysis.axis_rules.context import Edits, Total, bind, packet_of
from gtrans.analysis.erasable import Structure
from gtrans.ir import ops
from gtrans.ir.program import Leaf, Program, identity
from gtrans.rewrite.program_module import as_module
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
        return self._finish(self._erased(self.structure.program.graph.nodes), name)

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
        order = {n: i for i, n in enumerate(program.graph.nodes)}
        part = self._erased(
            [*sorted(leaves, key=order.__getitem__), *inside],
            argument=free[0],
            result=results[0],
            within=f"{path}.",
        )
        return self._finish(part, "Erased")

    def apply(self) -> None:
        """Erases within the analysed program itself.

        Raises:
            GraphError: an operation does not accept the sizes that are left.
        """
        program, smaller = self.structure.program, self._erased(self.structure.program.graph.nodes)
        program.module, program.leaves = smaller.module, smaller.leaves
        program.tensors = smaller.tensors
        program.refresh()

    # ------------------------------------------------------------------ private

    def _erased(
        self,
        nodes: Iterable[fx.Node],
        *,
        argument: fx.Node | None = None,
        result: fx.Node | None = None,
        within: str = "",
    ) -> Program:
        """A program of the given nodes, erased; its recorded values are the old ones.

        A part of the program has an `argument` and a `result`, and names without their path.
        """
        program = self.structure.program
        tensors = cut_tensors(self.structure, self.erased)
        erased = replace(program, leaves={}, tensors={})
        self._graph, self.made = fx.Graph(), {}
        if argument is not None:
            self.made[argument] = twin = self._graph.placeholder("x")
            erased.leaves[twin] = Leaf("x", "input")
            erased.in_spec = erased.out_spec = None
        for node in nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                self.made[node] = twin = self._graph.node_copy(node, self.made.__getitem__)
            else:
                self.made[node] = self._call(node)
            if node.op == "placeholder":
                leaf = program.leaves[node]
                erased.leaves[twin] = replace(leaf, name=leaf.name.removeprefix(within))
                if node in program.tensors:
                    erased.tensors[twin] = tensors[leaf.name]
        if result is not None:
            self._graph.output(self.made[result])
        erased.module = fx.GraphModule(program.module, self._graph)
        erased.saved = frozenset(name.removeprefix(within) for name in program.saved)
        return erased

    def _finish(self, program: Program, name: str) -> fx.GraphModule:
        module, twins = as_module(program, name)
        self.made = {n: twins[made] for n, made in self.made.items() if made in twins}
        return module

    def _call(self, node: fx.Node) -> Any:
        edits = self.structure.analysis.context.edits.get(node, Edits())
        target: Any = node.target
        bound = bind(node)
        if packet_of(node) in (aten.cat, aten.concat):
            left = self._left_of(bound)
            if left is not None:
                return self.made[left[0]] if len(left) == 1 else self._joined(node, left)
        changed = {k: self.argument(v) for k, v in edits.arguments.items()}
        if not edits.arguments and not edits.pieces and not edits.divisor:
            return self._graph.node_copy(node, self.made.__getitem__)
        if edits.pieces:
            sizes = [self.size(p) for p in edits.pieces]
            pieces = self.made[bound["self"]]
            return self._insert(node, aten.split_with_sizes.default, pieces, sizes, edits.dim)
        old, new = self.divisors(edits)
        if old != new and self.keep_divisor:
            return self._divide_by(node, bound, old, new)
        if target in (aten.view.default, aten._unsafe_view.default):
            sizes = changed["size"]
            return self._insert(node, aten.reshape.default, self.made[bound["self"]], sizes)
        args = [changed.pop(k, v) for k, v in zip(bound, node.args, strict=False)]
        kwargs = {**node.kwargs, **{k: v for k, v in changed.items() if k in node.kwargs}}
        # A size left at its default (groups=1, end=None) only has to be said once it differs.
        for key, value in changed.items():
            if key not in node.kwargs and bound[key] != value and value is not None:
                kwargs[key] = value
        args, kwargs = fx.map_arg((args, kwargs), self.made.__getitem__)
        return self._insert(node, target, *args, **kwargs)

    def _left_of(self, bound: dict[str, Any]) -> list[fx.Node] | None:
        """The operands of a concatenation that have indices left; None if all have."""
        axes = self.structure.analysis.axes
        tensors = list(bound["tensors"])
        rank = max(len(axes(t)) for t in tensors)
        whole = [t for t in tensors if len(axes(t)) < rank or self.size(axes(t)[bound["dim"]])]
        return whole if len(whole) < len(tensors) else None

    def _joined(self, node: fx.Node, left: list[fx.Node]) -> fx.Node:
        return self._insert(node, node.target, [self.made[t] for t in left], bind(node)["dim"])

    def _divide_by(self, node: fx.Node, bound: dict[str, Any], old: int, new: int) -> fx.Node:
        name = ops.overload(node)
        packet = None if name is None else name.overloadpacket
        given = fx.map_arg(bound, self.made.__getitem__)
        if packet is aten.mean:
            twin = self._graph.node_copy(node, self.made.__getitem__)
            return self._insert(node, aten.mul.Tensor, twin, new / old)
        rank = len(bound["normalized_shape"])
        x, weight, eps = given["input"], given["weight"], given["eps"]
        if packet is aten.rms_norm:
            return self._insert(node, rms_norm_of_longer, x, rank, old, weight, eps)
        bias = given["bias"]
        return self._insert(node, layer_norm_of_longer, x, rank, old, weight, bias, eps)

    def _insert(self, old: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        twin = self._graph.call_function(target, args, kwargs)
        twin.meta = dict(old.meta)
        return twin


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
