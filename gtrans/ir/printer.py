"""Graphs as readable code, and as dot for pictures."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import TAG, JointGraph, Side, runs_in, tag
from gtrans.ir.sizes import shape_text
from gtrans.ir.source import location


def to_code(graph: fx.Graph, *, lines: bool = True, fold_getitem: bool = True) -> str:
    """Prints a graph as code: one assignment a node, with its shape, side and source line.

    Args:
        graph: any graph whose nodes carry recorded values.
        lines: add the line of the user's model to each group of nodes it made.
        fold_getitem: print `layer_norm[0]` where it is used rather than as a node of its own.
    """
    printed: list[str] = []
    last_line = ""
    for node in graph.nodes:
        if node.op == "output":
            printed.append(f"return {_text(node.args[0])}")
            continue
        if fold_getitem and ops.is_getitem(node):
            continue
        here = location(node)
        line = f"# {here}: {here.code}" if here.file else ""
        if lines and line and line != last_line:
            printed += ["", line]
            last_line = line
        printed.append(f"{_mark(node)} {node_to_code(node)}")
    return "\n".join(printed).lstrip("\n") + "\n"


def node_to_code(node: fx.Node) -> str:
    """Prints one node: ``mul = aten.mul.Tensor(x, 2)  # f32[4, 8]``."""
    shape = shape_text(node.meta.get("val", node.meta.get("example_value")))
    comment = f"  # {shape}" if shape else ""
    if (author := _author(node)) and node.op != "placeholder":
        comment += f"  <- {author}" if comment else f"  # <- {author}"
    if node.op == "placeholder":
        return f"{node.name} = input(){comment}"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}{comment}"
    arguments = [_text(a) for a in node.args]
    arguments += [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {target_name(node)}({', '.join(arguments)}){comment}"


def target_name(node: fx.Node) -> str:
    """The name of what a node calls: ``aten.mul.Tensor``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def short_operator(name: str) -> str:
    """An operator without its namespace and overload: ``aten.addmm.default`` is ``addmm``."""
    return name.split(".")[-2] if name.count(".") > 1 else name


def to_dot(joint: JointGraph, *, title: str = "joint graph") -> str:
    """Prints a joint graph in the dot language: forward left, backward right, residuals between."""
    out = [
        "digraph joint {",
        f'  label="{title}"; rankdir=TB; node [shape=box, fontname="monospace", fontsize=10];',
    ]
    for side, color in ((Side.FORWARD, "#dbeafe"), (Side.BACKWARD, "#fee2e2")):
        out.append(f"  subgraph cluster_{side.value} {{ label={side.value}; color=gray;")
        for node in joint.graph.nodes:
            if node.op == "output" or ops.is_getitem(node) or runs_in(node) is not side:
                continue
            shape = shape_text(node.meta.get("val"))
            label = f"{node.name}\\n{target_name(node)}\\n{shape}"
            out.append(f'    "{node.name}" [label="{label}", style=filled, fillcolor="{color}"];')
        out.append("  }")
    for node in joint.graph.nodes:
        if node.op == "output" or ops.is_getitem(node):
            continue
        for source in _through_getitem(node.all_input_nodes):
            residual = runs_in(source) is Side.FORWARD and runs_in(node) is Side.BACKWARD
            style = ' [color="#b45309", penwidth=2, constraint=false]' if residual else ""
            out.append(f'  "{source.name}" -> "{node.name}"{style};')
    return "\n".join([*out, "}"]) + "\n"


def _through_getitem(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    found = []
    for node in nodes:
        source = node.args[0] if ops.is_getitem(node) else node
        assert isinstance(source, fx.Node)
        found.append(source)
    return found


def _text(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        if ops.is_getitem(argument):
            return f"{_text(argument.args[0])}[{argument.args[1]}]"
        return argument.name
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(_text(a) for a in argument)
        if isinstance(argument, list):
            return f"[{inner}]"
        return f"({inner},)" if len(argument) == 1 else f"({inner})"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{k!r}: {_text(v)}" for k, v in argument.items()) + "}"
    if isinstance(argument, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(argument)
    return repr(argument)


def _mark(node: fx.Node) -> str:
    """``|`` for forward, ``<`` for backward, ``~`` for forward work that the backward repeats."""
    if TAG not in node.meta:
        return " "
    if runs_in(node) is Side.FORWARD:
        return "|"
    return "<" if tag(node).side is Side.BACKWARD else "~"


def _author(node: fx.Node) -> str:
    if TAG in node.meta:
        return tag(node).made_by
    return str(node.meta.get("made_by", ""))
