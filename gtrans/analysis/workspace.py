"""Memory that an operator's kernel allocates for itself while it runs.

Torch states it nowhere, and it depends on the library behind the kernel and on the machine: oneDNN
copies the operands of some convolutions into another layout, of others not. So kernels that are
known to need some are run once per shape, on tensors of zeros, and watched; one run of the profiler
serves all of a graph.

    workspace = most bytes in memory while the kernel runs - its inputs - its outputs

A loss that is computed outside of the graph needs room too, between the halves: `allow_for_loss`.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from gtrans.analysis.measure import measured_peak, phase
from gtrans.ir import ops
from gtrans.ir.sizes import hint, tensor_bytes
from gtrans.runtime import fused_lstm  # noqa: F401  # declares the operators that are watched here

aten = torch.ops.aten

# Kernels seen to allocate more than their outputs; found by watching the operators of a zoo of
# models on the CPU. There is no property to ask for.
_WATCHED = ops.CONTRACTIONS - {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
} | {
    aten.native_batch_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten._fused_rms_norm.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.grid_sampler_2d.default,
    aten.index_put.default,
    aten.cumsum.default,
    aten.native_layer_norm_backward.default,
    aten.native_dropout_backward.default,
    torch.ops.gtrans.fused_lstm.default,
    torch.ops.gtrans.fused_lstm_backward.default,
}  # fmt: skip

_known: dict[Hashable, int] = {}
_LOSS = "gtrans loss"


def workspaces(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Bytes that the kernels of some nodes allocate and free again; nodes without any are left out.

    The first time it sees a kernel with its shapes it runs it once.
    """
    nodes = list(nodes)
    keys = {n: _key(n) for n in nodes if n.target in _WATCHED}
    unknown = {key: n for n, key in keys.items() if key not in _known}
    if unknown and not torch._C._autograd._profiler_enabled():
        _watch(unknown)
    found = {n: bytes for n, key in keys.items() if (bytes := _known.get(key, 0))}
    return found | {n: n.meta[_LOSS] for n in nodes if _LOSS in n.meta}


def allow_for_loss(tangents: Sequence[fx.Node]) -> None:
    """Leaves room for a loss of the outputs that some tangents belong to, when those are made.

    Measured beside the output and its tangent, in tensors of the output's size: two for
    cross-entropy and `mse_loss`, three for the mean of a square. Of an output in 16 bits nine,
    since losses compute in 32 and hold copies.
    """
    values = [t.meta["val"] for t in tangents]
    wide = [v for v in values if isinstance(v, torch.Tensor) and hint(v.numel()) > 1]
    allowed = sum(tensor_bytes(v) * (3 if v.dtype.itemsize >= 4 else 9) for v in wide)
    if allowed:
        tangents[-1].meta[_LOSS] = allowed


def is_for_loss(node: fx.Node) -> bool:
    """Whether what a node needs besides is that of a loss outside of the graph."""
    return _LOSS in node.meta


def _watch(nodes: dict[Hashable, fx.Node]) -> None:
    outputs: dict[Hashable, int] = {}

    def run_all() -> None:
        for number, (key, node) in enumerate(nodes.items()):
            try:
                args, kwargs = pytree.tree_map(_real, _arguments(node))
                target: Any = node.target
                with phase(f"workspace {number}"):
                    result = target(*args, **kwargs)
            except (RuntimeError, NotImplementedError):
                continue  # a kernel that refuses zeros of this layout is taken to need nothing
            outputs[key] = sum(map(_storage_bytes, pytree.tree_leaves(result)))

    device = next(iter(nodes.values())).meta["val"]
    device = pytree.tree_leaves(device)[0].device if device is not None else torch.device("cpu")
    _known.update(dict.fromkeys(nodes, 0))
    if device.type != "cpu":
        return
    with _disable_current_modes(), torch.no_grad():
        run_all()  # what libraries allocate once and keep is no workspace
        peak = measured_peak(run_all, warm_up=0)
    for part in peak.phases:
        key = list(nodes)[int(part.name.split()[-1])]
        before = max(
            (m for m in peak.timeline if m.seconds <= part.start_s),
            default=None,
            key=lambda m: m.seconds,
        )
        inside = [m.bytes for m in peak.timeline if part.start_s < m.seconds <= part.end_s]
        level = before.bytes if before is not None else 0
        _known[key] = max(0, max(inside, default=level) - level - outputs[key])


def _arguments(node: fx.Node) -> tuple[Any, Any]:
    arguments: tuple[Any, Any] = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return arguments


def _key(node: fx.Node) -> Hashable:
    leaves, spec = pytree.tree_flatten(_arguments(node))
    return node.target, str(spec), tuple(_describe(leaf) for leaf in leaves)


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        shape = tuple(hint(s) for s in leaf.shape)
        return shape, tuple(hint(s) for s in leaf.stride()), leaf.dtype, leaf.device
    return hint(leaf) if isinstance(leaf, torch.SymInt) else str(leaf)


def _real(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        shape, stride = [hint(s) for s in leaf.shape], [hint(s) for s in leaf.stride()]
        return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device).zero_()
    return hint(leaf) if isinstance(leaf, torch.SymInt) else leaf


def _storage_bytes(leaf: Any) -> int:
    return tensor_bytes(leaf) if isinstance(leaf, torch.Tensor) else 0
