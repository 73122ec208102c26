"""One half of a split joint graph, on its way to a backend."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import fx

Role = Literal["forward", "backward", "inference"]

Runnable = Callable[[list[Any]], Sequence[Any]]
"""Runs a half. Takes its arguments as one list and empties it, so that they can be freed early."""


def boxed(run: Callable[[list[Any]], Any]) -> Runnable:
    """Marks a function as a `Runnable`, so that AOTAutograd hands it its arguments as one list.

    Args:
        run: it gets a function of its own around it, because not every callable can be marked.
    """

    def marked(arguments: list[Any]) -> Any:
        return run(arguments)

    marked._boxed_call = True  # type: ignore[attr-defined]  # the mark that AOTAutograd reads
    return marked


@dataclass(frozen=True)
class Half:
    """A forward, backward or inference graph with what a lowering needs to know about it.

    Attributes:
        module: the graph, in ATen without decompositions, with `val` on every node.
        inputs: example inputs, fake tensors and symbolic or plain numbers.
        role: which half it is.
        visible_outputs: positions of outputs that the user's program sees: their strides must be
            kept. Other outputs are saved values, laid out as the backend likes.
        static_inputs: positions of inputs whose storage stays put from step to step (parameters).
        graph: number of the captured graph that it is a half of.
        pipeline: text of the pipeline that made it; lowerings put it into the keys of their caches.
        frugal: whether a memory budget is to be kept: then no memory may be held for a later use.
        shared: one dictionary for all halves of a graph, in which a lowering leaves what compiling
            one half tells about another.
    """

    module: fx.GraphModule
    inputs: Sequence[Any]
    role: Role
    visible_outputs: Sequence[int] = ()
    static_inputs: Sequence[int] = field(default=())
    graph: int = 0
    pipeline: str = ""
    frugal: bool = False
    shared: dict[str, Any] = field(default_factory=dict)

    def with_tolerant_views(self) -> fx.GraphModule:
        """A copy of the graph in which `view` copies where strides demand it.

        Fake kernels, real ones and decompositions do not always agree on strides (in torch 2.13:
        batch norm of a transposed input, concatenation with an empty tensor), so a view that was
        legal when traced may be illegal when run. On a functional graph `reshape` is the same.
        """
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        graph.output_node().meta = dict(self.module.graph.output_node().meta)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        return fx.GraphModule(self.module, graph)


class Backend(Protocol):
    """A lowering.

    Attributes:
        name: as given to `optimize`.
        overwrites_saved: whether its backward reuses the memory of saved values, as long as it runs
            once: `backward(retain_graph=True)` is then refused by torch.
        slack: share of a memory budget that plans leave free for it, because its kernels hold a
            little more than the operators they are made of.
    """

    name: str
    overwrites_saved: bool
    slack: float

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine; None if it can."""

    def prepare(self, half: Half) -> Half:
        """What gtrans does to a half before the compiler behind the backend sees it."""

    def compile(self, half: Half) -> Runnable:
        """Makes a prepared half runnable."""


@runtime_checkable
class Configurable(Protocol):
    """A lowering that has modes or options of its own. Those without need not say so."""

    def configured(self, mode: str | None, options: Mapping[str, Any] | None) -> Backend:
        """The same lowering with these settings, which hold only while it compiles.

        Raises:
            OptionError: a mode, option or value is unknown, or both a mode and options are given.
        """
