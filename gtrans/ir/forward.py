"""The forward graph as Dynamo captures it: torch functions and methods, before autograd."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gtrans.errors import GraphError

RECURRENT_LAYERS = (torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu)
"""How Dynamo shows `nn.GRU`, `nn.LSTM` and `nn.RNN`: as one call each."""


class ForwardGraph:
    """A typed view of a Dynamo graph, for passes that replace operators (knob F).

    Args:
        module: the captured forward. It is edited in place; use `copy` to keep the original.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.author = ""
        # Dynamo leaves no dead code: what nobody reads is there for its effect, such as the `add_`
        # that counts batches in a batch norm.
        self._effects = {node for node in module.graph.nodes if not node.users}

    @property
    def graph(self) -> fx.Graph:
        """The underlying torch.fx graph."""
        return self.module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in order."""
        return list(self.graph.nodes)

    def calls(self, *targets: Callable[..., Any] | str) -> list[fx.Node]:
        """The nodes that call one of the given functions or (by name) tensor methods, in order."""
        found = []
        for target in targets:
            kind = "call_method" if isinstance(target, str) else "call_function"
            found += self.graph.find_nodes(op=kind, target=target)
        return sorted(found)

    def insert_before(
        self, anchor: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Inserts a call right before a node and fills in its value and source line."""
        with self.graph.inserting_before(anchor):
            node = self.graph.call_function(target, args, dict(kwargs))
        for key in ("stack_trace", "nn_module_stack"):
            if key in anchor.meta:
                node.meta[key] = anchor.meta[key]
        node.meta["example_value"] = self._value_of(node)
        node.meta["made_by"] = self.author
        return node

    def insert_after(
        self, anchor: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Inserts a call right after a node and fills in its value and source line."""
        node = self.insert_before(anchor.next, target, *args, **kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in anchor.meta:
                node.meta[key] = anchor.meta[key]
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Lets every user of `old` read `new` instead, and erases `old`.

        Raises:
            GraphError: the two values differ in shape or dtype.
        """
        a, b = value(old), value(new)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            same = a.dtype == b.dtype and list(a.shape) == list(b.shape)
            if not same:
                raise GraphError(
                    f"cannot replace {old.name} ({a.dtype}, {tuple(a.shape)}) by {new.name} "
                    f"({b.dtype}, {tuple(b.shape)})"
                )
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if not old.users:
            self.graph.erase_node(old)

    def copy(self) -> "ForwardGraph":
        """An independent copy of the nodes; values and constants are shared."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        graph.output_node().meta = dict(self.graph.output_node().meta)
        return ForwardGraph(fx.GraphModule(self.module, graph))

    def eliminate_dead_code(self) -> int:
        """Erases the nodes that nothing reads any more; returns how many. Effects are kept."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code(is_impure_node=self._must_stay)
        return before - len(self.graph.nodes)

    def _must_stay(self, node: fx.Node) -> bool:
        return node in self._effects or is_inplace(node) or node.is_impure()

    def _value_of(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        target: Any = node.target
        mode = next(
            (
                val.fake_mode
                for n in node.all_input_nodes
                if isinstance(val := value(n), torch._subclasses.FakeTensor)
            ),
            None,
        )
        if mode is None:
            return target(*args, **kwargs)
        with mode:
            return target(*args, **kwargs)


def is_inplace(node: fx.Node) -> bool:
    """By torch's naming rule, the only property there is: `add_`, `relu_`, `iadd`, `setitem`."""
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        plain = name[1:]  # iadd, but ior and and_: Python's words take an underscore
        inplace = hasattr(operator, plain) or hasattr(operator, f"{plain}_")
        return name == "setitem" or (name.startswith("i") and inplace)
    return node.op != "placeholder" and name.endswith("_") and not name.endswith("__")


def value(node: fx.Node) -> Any:
    """The fake value Dynamo recorded for a node, None if it recorded none."""
    return node.meta.get("example_value", node.meta.get("val"))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of a Python function by their names, defaults included."""
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments
