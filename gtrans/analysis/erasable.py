"""Erasable classes: what of a model must go together, and whether its removal is exact.

A class is an atom together with every dimension of every parameter and buffer that it stands in.
Erasing an index of the class cuts all of them. `producer` members are those that must be zero for
the removal to leave the function as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import Axis, atoms, find, kept_size, labels, mask
from gtrans.analysis.axis_analysis import AxisAnalysis, analyse_axes
from gtrans.analysis.axis_rules.context import Need, bind, packet_of
from gtrans.analysis.axis_rules.recurrent import GATES, arguments
from gtrans.analysis.zeros import Producer, producers, unmet, zeros
from gtrans.ir import ops
from gtrans.ir.program import Program, identity
from gtrans.ir.source import location

aten = torch.ops.aten


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer.

    Attributes:
        name: path of the tensor in the model.
        dim: which of its dimensions.
        producer: whether the slices must be zero for an exact removal.
        labels: to which index of the class each index of the dimension belongs, -1 to none.
    """

    name: str
    dim: int
    producer: bool
    labels: torch.Tensor

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]" + ("" if self.producer else " (cut only)")


@dataclass(frozen=True)
class ErasableClass:
    """What must be erased together, index by index.

    Attributes:
        name: its first producer, as "path.weight[0]".
        atom: the axis.
        size: how many indices it has.
        members: parameter and buffer dimensions.
        exact: whether erasing zeros provably leaves the function and the other gradients alone.
        reason: where the proof fails; empty if exact.
        parameters: parameter elements that one index holds (of the model as it is).
    """

    name: str
    atom: Axis
    size: int
    members: tuple[Member, ...]
    exact: bool
    reason: str
    parameters: int

    @property
    def producers(self) -> list[Member]:
        """The members that must be zero."""
        return [m for m in self.members if m.producer]

    def zeros(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Which indices are zero in all producers; one always stays, as an axis cannot vanish.

        Args:
            tensors: parameters by path.

        Returns:
            Booleans [size].
        """
        alive = torch.zeros(self.size, dtype=torch.bool)
        for m in self.producers:
            x = tensors[m.name].detach()
            others = [d for d in range(x.ndim) if d != m.dim]
            used = ((x != 0).any(dim=others) if others else x != 0).cpu()
            alive[m.labels[used & (m.labels >= 0)]] = True
        if not bool(alive.any()):
            alive[0] = True
        return ~alive


@dataclass(frozen=True)
class Frozen:
    """Dimensions of parameters that keep their size, and why."""

    reason: str
    size: int
    members: tuple[str, ...]


@dataclass
class Structure:
    """What can be erased of a program.

    Attributes:
        analysis: its axes.
        classes: the erasable classes, in the order of their first parameter.
        frozen: the rest.
    """

    analysis: AxisAnalysis
    classes: list[ErasableClass] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)

    @property
    def program(self) -> Program:
        """The captured forward."""
        return self.analysis.program

    def masks(self, erased: Mapping[Axis, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """For each parameter and buffer by path, which indices of each dimension stay."""
        return {
            leaf.name: [mask(axis, erased) for axis in self.analysis.axes(node)]
            for node, leaf in self.program.leaves.items()
            if node in self.program.tensors and leaf.kind != "constant"
        }

    def parameters(self, kept: Mapping[Axis, int]) -> int:
        """How many parameter elements are left when atoms keep so many indices."""
        return sum(
            prod(kept_size(axis, kept) for axis in self.analysis.axes(node))
            for node in self._distinct_parameters()
        )

    def flops(self, kept: Mapping[Axis, int]) -> int:
        """Floating-point operations of the products of one forward, two per multiply-add."""
        return sum(flops_of(self.analysis, n, kept) for n in self.program.graph.nodes)

    def parameter_bytes(self, kept: Mapping[Axis, int]) -> int:
        """Bytes of the parameters that are left."""
        return sum(
            prod(kept_size(axis, kept) for axis in self.analysis.axes(node))
            * self.program.tensors[node].element_size()
            for node in self._distinct_parameters()
        )

    def _distinct_parameters(self) -> list[fx.Node]:
        seen: dict[Any, fx.Node] = {}
        for node in self.program.parameters().values():
            tensor = self.program.tensors[node]
            seen.setdefault(identity(tensor) if tensor.numel() else node, node)
        return list(seen.values())


def find_structure(program: Program) -> Structure:
    """Analyses axes and zeros of a program and collects its classes."""
    analysis = analyse_axes(program)
    made = producers(analysis)
    failing = unmet(analysis, zeros(analysis, made))
    structure = Structure(analysis)
    places: dict[Axis, list[tuple[fx.Node, int]]] = {}
    for node in program.tensors:
        for dim, axis in enumerate(analysis.axes(node)):
            for atom in dict.fromkeys(atoms(axis)):
                places.setdefault(find(atom), []).append((node, dim))
    frozen: dict[tuple[str, int], list[str]] = {}
    for atom, where in places.items():
        names = [f"{program.leaves[n].name}[{d}]" for n, d in where if _is_parameter(program, n)]
        made_here = [(n, d) for n, d in where if (n, d, atom) in made and _is_parameter(program, n)]
        reason = atom.frozen or ("" if made_here else "no parameter produces it")
        if reason and names and atom.size > 1:
            frozen.setdefault((reason, atom.size), []).extend(names)
        elif not reason:
            structure.classes.append(
                _class_of(analysis, atom, where, made, made_here[0], failing.get(atom))
            )
    structure.frozen = [Frozen(r, size, tuple(names)) for (r, size), names in frozen.items()]
    return structure


def _class_of(
    analysis: AxisAnalysis,
    atom: Axis,
    where: list[tuple[fx.Node, int]],
    made: set[Producer],
    first: tuple[fx.Node, int],
    failing: Need | None,
) -> ErasableClass:
    program = analysis.program
    members = tuple(
        Member(
            program.leaves[node].name,
            dim,
            (node, dim, atom) in made and _is_parameter(program, node),
            labels(analysis.axes(node)[dim], atom),
        )
        for node, dim in where
    )
    first_axis = analysis.axes(first[0])[first[1]]
    inside = list(dict.fromkeys(atoms(first_axis)))
    suffix = f".{inside.index(atom)}" if len(inside) > 1 else ""
    reason = "" if failing is None else f"{_describe(failing)} sums values that are not zero"
    return ErasableClass(
        name=f"{program.leaves[first[0]].name}[{first[1]}]{suffix}",
        atom=atom,
        size=atom.size,
        members=members,
        exact=failing is None,
        reason=reason,
        parameters=_per_index(analysis, where, atom),
    )


def _describe(need: Need) -> str:
    name = need.node.target
    text = name._opname if isinstance(name, torch._ops.OpOverload) else str(name)
    return f"{text} ({location(need.node)})"


def _per_index(analysis: AxisAnalysis, where: list[tuple[fx.Node, int]], atom: Axis) -> int:
    counted: dict[Any, int] = {}
    for node, _ in where:
        if _is_parameter(analysis.program, node):
            axes = analysis.axes(node)
            whole = prod(a.size for a in axes)
            rest = prod(kept_size(a, {atom: atom.size - 1}) for a in axes)
            counted[identity(analysis.program.tensors[node])] = whole - rest
    return sum(counted.values())


def _is_parameter(program: Program, node: fx.Node) -> bool:
    return program.leaves[node].kind == "parameter"


def flops_of(analysis: AxisAnalysis, node: fx.Node, kept: Mapping[Axis, int]) -> int:
    """Floating-point operations of one product when atoms keep so many indices; else 0."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    packet = packet_of(node)
    axes = analysis.context.axes

    def size(axis: Axis) -> int:
        return kept_size(axis, kept)

    tensors = [n for n in ops.tensor_inputs(node) if n in axes]
    if packet is aten.scaled_dot_product_attention:
        q, k, v = (axes[n] for n in tensors[:3])
        rows = prod(map(size, q[:-1]))
        return 2 * rows * size(k[-2]) * (size(q[-1]) + size(v[-1]))
    if "conv" in node.target._opname and node in axes and len(tensors) > 1:
        weight = axes[tensors[1]]
        # A transposed convolution spends its kernel on every input position, others on outputs.
        positions = tensors[0] if "transpose" in node.target._opname else node
        return 2 * prod(map(size, axes[positions])) * prod(map(size, weight[1:]))
    if packet in (aten.linear, aten.mm, aten.bmm, aten.matmul, aten._grouped_mm):
        return 2 * prod(map(size, axes[node])) * size(axes[tensors[0]][-1])
    if packet in (aten.addmm, aten.baddbmm):
        return 2 * prod(map(size, axes[node])) * size(axes[tensors[1]][-1])
    if packet is aten.einsum and node in axes:
        summed = {find(n.axis): n.axis for n in analysis.context.needs if n.node is node}
        return 2 * prod(map(size, axes[node])) * prod(size(a) for a in summed.values())
    if packet in GATES and node in axes:
        r = arguments(bind(node))
        steps = prod(map(size, axes[r.x][:-1]))
        return sum(2 * steps * prod(map(size, axes[w])) for ws in r.layers for w in ws[:2])
    return 0
