"""The reference allocator: run both halves of a graph on real tensors and count what is alive.

It knows nothing of views, tuples or in-place operators: it looks at the storages of the tensors
that the interpreter holds, after every node. Slow, and what the simulation is held to.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


def replayed_peak(
    forward: fx.GraphModule, backward: fx.GraphModule, inputs: Sequence[Any], num_outputs: int
) -> int:
    """The most bytes in distinct storages that the values of a step hold at once.

    Args:
        forward: forward half; returns its outputs, then the values that the backward reads.
        backward: backward half; its placeholders are saved values and tangents, by name.
        inputs: values of the forward's placeholders.
        num_outputs: how many results of the forward go to the caller, who keeps them.

    Returns:
        Bytes, inputs included. Kernels' own workspace is not seen.
    """
    first = _Counting(forward, list(inputs))
    results = first.run(*inputs)
    nodes: Any = forward.graph.output_node().args[0]
    saved = {n.name: r for n, r in zip(nodes, results, strict=True) if isinstance(n, fx.Node)}
    by_name = {n.target: v for n, v in zip(_placeholders(forward), inputs, strict=True)}
    arguments = []
    seeds = []
    for node in _placeholders(backward):
        if node.name in saved or node.target in by_name:
            arguments.append(saved.get(node.name, by_name.get(node.target)))
        else:
            zeros = zeros_like(node.meta["val"])
            arguments.append(zeros)
            if isinstance(zeros, torch.Tensor) and zeros.numel() == 1:
                seeds.append(zeros)
    second = _Counting(backward, [*inputs, *results[:num_outputs], *seeds])
    del results, saved, first.env
    second.run(*arguments)
    return max(first.most, second.most)


def zeros_like(val: Any) -> Any:
    """A tensor of zeros with the sizes and strides of a fake one; anything else as it is."""
    if not isinstance(val, torch.Tensor):
        return val
    shape, stride = [int(s) for s in val.shape], [int(s) for s in val.stride()]
    return torch.empty_strided(shape, stride, dtype=val.dtype).zero_()


class _Counting(fx.Interpreter):
    """Counts the storages of everything that is held, while each node runs."""

    def __init__(self, module: fx.GraphModule, held: Iterable[Any]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.held = list(held)
        self.most = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            alive = [*self.held, *self.env.values(), result]
            tensors = [t for t in pytree.tree_leaves(alive) if isinstance(t, torch.Tensor)]
            storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            self.most = max(self.most, sum(storages.values()))
        return result


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return module.graph.find_nodes(op="placeholder")
