"""One half of a split joint graph, on its way to a backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import fx

Role = Literal["forward", "backward", "inference"]

Runnable = Callable[[list[Any]], Sequence[Any]]
"""Runs a half. Takes its arguments as one list and empties it, so that they can be freed early."""


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
    """

    module: fx.GraphModule
    inputs: Sequence[Any]
    role: Role
    visible_outputs: Sequence[int] = ()
    static_inputs: Sequence[int] = field(default=())
    graph: int = 0


class Backend(Protocol):
    """A lowering."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine; None if it can."""

    def compile(self, half: Half) -> Runnable:
        """Makes one half runnable."""
