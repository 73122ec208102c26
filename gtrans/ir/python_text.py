"""Graphs as Python functions that run as they stand, and back.

    def joint(primals_1, tangents_1):
        # model.py:13, in Block.forward: return gelu(x)
        gelu = aten.gelu.default(primals_1)  # f32[4, 8]
        gelu_backward = aten.gelu_backward.default(tangents_1, primals_1)  # f32[4, 8]
        return [gelu, gelu_backward]

Every assignment is one node, and its name is the node's. Nothing is executed to read a function
back: its syntax tree is walked, and each call becomes a node.
"""

import ast
import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name as qualified_name

from gtrans.errors import GraphError
from gtrans.ir import ops
from gtrans.ir.sizes import shape_text
from gtrans.ir.source import location

PREAMBLE = "import operator\n\nimport torch\n\naten = torch.ops.aten\n"

_ATEN = "torch.ops.aten."


def write_function(graph: fx.Graph, name: str) -> str:
    """A graph as the text of a Python function, which needs `PREAMBLE` before it.

    Args:
        graph: calls of functions and methods; constants must be inputs (`constants_as_inputs`).
        name: name of the function.

    Raises:
        GraphError: a node or an argument has no form as text.
    """
    lines = [f"def {name}({', '.join(n.name for n in graph.find_nodes(op='placeholder'))}):"]
    place = ""
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            lines.append(f"    return {_literal(node.args[0], node)}")
            continue
        here = location(node)
        comment = f"    # {here}: {here.code}" if here.file else ""
        if comment and comment != place:
            lines.append(comment)
            place = comment
        shape = shape_text(node.meta.get("val", node.meta.get("example_value")))
        lines.append(f"    {node.name} = {_call(node)}" + (f"  # {shape}" if shape else ""))
    return "\n".join(lines) + "\n"


def read_function(text: str, name: str) -> fx.Graph:
    """The graph of a function that `write_function` wrote; its nodes have no values yet.

    Raises:
        GraphError: there is no such function, or it is not of that form.
    """
    tree = ast.parse(text)
    function = next((f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == name), 0)
    if not isinstance(function, ast.FunctionDef):
        raise GraphError(f"the text defines no function {name!r}")
    graph = fx.Graph()
    known: dict[str, fx.Node] = {a.arg: graph.placeholder(a.arg) for a in function.args.args}
    for statement in function.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                known[target] = _node(graph, target, value, known)
            case ast.Return(value=ast.expr() as value):
                graph.output(_value(value, known))
            case _:
                raise GraphError(f"line {statement.lineno} is neither a call nor a return")
    return graph


def constants_as_inputs(
    module: fx.GraphModule, position: int | None = None
) -> tuple[fx.Graph, dict[str, Any]]:
    """A copy of a graph whose constants and symbols are plain: inputs and numbers.

    Args:
        module: the graph.
        position: how many placeholders stay before those of the constants; by default all.

    Returns:
        The copy, and the constants by the names of their new placeholders.

    Raises:
        GraphError: the graph calls other graphs (control flow).
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Any] = {}
    inputs = module.graph.find_nodes(op="placeholder")
    for node in inputs[:position]:
        made[node] = graph.node_copy(node)
    for node in module.graph.find_nodes(op="get_attr"):
        value = _attribute(module, str(node.target))
        if not isinstance(value, torch.Tensor):
            raise GraphError(
                f"node {node.name} ({location(node)}) is a {type(value).__name__}: a graph that "
                "calls other graphs (control flow) has no form as one function"
            )
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
        constants[made[node].name] = value
    for node in inputs[len(made) - len(constants) :]:
        made[node] = graph.node_copy(node)
    for node in module.graph.nodes:
        if node not in made:
            made[node] = graph.node_copy(node, lambda n: made[n])
            made[node].args = _plain(made[node].args)
            made[node].kwargs = _plain(made[node].kwargs)
    return graph, constants


def _plain(argument: Any) -> Any:
    return fx.node.map_aggregate(argument, lambda a: number(a) if is_symbol(a) else a)


def is_symbol(value: Any) -> bool:
    """Whether a value is a number that torch knows only as a symbol."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def number(value: Any) -> Any:
    """What a symbol stood for when the graph was captured."""
    return value.node.hint if is_symbol(value) else value


def _attribute(module: fx.GraphModule, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


# ---------------------------------------------------------------------- writing


def _call(node: fx.Node) -> str:
    if ops.is_getitem(node):
        return f"{_literal(node.args[0], node)}[{_literal(node.args[1], node)}]"
    arguments = [_literal(a, node) for a in node.args]
    keywords = [f"{k}={_literal(v, node)}" for k, v in node.kwargs.items()]
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join([*arguments[1:], *keywords])})"
    if node.op != "call_function":
        raise GraphError(f"node {node.name} ({location(node)}) is a {node.op}, no call")
    return f"{_target(node)}({', '.join([*arguments, *keywords])})"


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        text = f"torch.ops.{target}"
    else:
        text = qualified_name(target).replace("_operator.", "operator.")
    try:
        found = resolve(text)
    except GraphError:
        found = None
    if found is not target:
        raise GraphError(
            f"node {node.name} ({location(node)}) calls {target!r}, which cannot be imported by a "
            "name"
        )
    return f"aten.{text.removeprefix(_ATEN)}" if text.startswith(_ATEN) else text


def _literal(value: Any, node: fx.Node) -> str:
    match value:
        case fx.Node():
            return value.name
        case list():
            return f"[{', '.join(_literal(v, node) for v in value)}]"
        case tuple():
            inner = ", ".join(_literal(v, node) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        case dict():
            return "{" + ", ".join(f"{k!r}: {_literal(v, node)}" for k, v in value.items()) + "}"
        case slice():
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(_literal(p, node) for p in parts)})"
        case float() if not math.isfinite(value):
            return f"float('{value}')"
        case torch.device():
            return f"torch.device('{value}')"
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(value)
        case None | bool() | int() | float() | complex() | str():
            return repr(value)
        case _ if value is Ellipsis:
            return "..."
    raise GraphError(
        f"node {node.name} ({location(node)}) has an argument of type {type(value).__name__}, "
        "which has no form as text"
    )


# ---------------------------------------------------------------------- reading


def _node(graph: fx.Graph, name: str, value: ast.expr, known: Mapping[str, fx.Node]) -> fx.Node:
    call: tuple[Any, list[ast.expr], list[ast.keyword]]
    match value:
        case ast.Subscript(value=source, slice=index):
            call = (resolve("operator.getitem"), [source, index], [])
            kind = "call_function"
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=method)) if owner in known:
            call = (method, [value.func.value, *value.args], value.keywords)  # type: ignore[attr-defined]
            kind = "call_method"
        case ast.Call(func=function):
            call = (resolve(_dotted(function)), value.args, value.keywords)
            kind = "call_function"
        case _:
            raise GraphError(f"{name!r} is assigned something that is no call")
    target, arguments, keywords = call
    node = graph.create_node(
        kind,
        target,
        tuple(_value(a, known) for a in arguments),
        {str(k.arg): _value(k.value, known) for k in keywords},
        name=name,
    )
    if node.name != name:
        raise GraphError(f"{name!r} is assigned twice, or is no name for a node")
    return node


def _value(expression: ast.expr, known: Mapping[str, fx.Node]) -> Any:
    match expression:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.List(elts=parts):
            return [_value(p, known) for p in parts]
        case ast.Tuple(elts=parts):
            return tuple(_value(p, known) for p in parts)
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {_value(k, known): _value(v, known) for k, v in pairs if k is not None}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):  # complex numbers
            a, b = _value(left, known), _value(right, known)
            return a + b if isinstance(op, ast.Add) else a - b
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str(text))]):
            return float(text)
        case ast.Call(func=ast.Name(id="slice"), args=parts):
            return slice(*(_value(p, known) for p in parts))
        case ast.Call(func=ast.Attribute(attr="device"), args=[ast.Constant(value=str(text))]):
            return torch.device(text)
        case ast.Attribute():
            return resolve(_dotted(expression))
    raise GraphError(f"cannot read {ast.unparse(expression)!r}")


def _dotted(expression: ast.expr) -> str:
    text = ast.unparse(expression)
    return f"torch.ops.{text}" if text.startswith("aten.") else text


def resolve(dotted: str) -> Any:
    """What a dotted name stands for: ``torch.ops.aten.mul.Tensor``.

    Raises:
        GraphError: there is no such thing.
    """
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        if parts[:2] == ["torch", "ops"] and count > 1:
            continue  # operators are no modules, and asking for one makes a namespace
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ImportError:
            continue
        try:
            for part in parts[count:]:
                found = getattr(found, part)
        except AttributeError:
            break
        return found
    raise GraphError(f"there is no {dotted!r} here: another version of torch or of a plug-in?")
