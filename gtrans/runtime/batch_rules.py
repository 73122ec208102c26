"""Batches of operators that `torch.vmap` has no rule for.

Without a rule, torch calls an operator once for each element of a batch, and warns of it:

    a view     of what is stacked may need a copy: a reshape
    attention  treats its sequences one by one, so the batch is as good as more of them
    RMS norm   its gradient is made of operators that have rules
    a size     of one element, where sizes change from call to call
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from gtrans.runtime.norm_gradient import NormShape, gradients

aten = torch.ops.aten

_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def batched_form(target: Any) -> Any:
    """What computes the same as an operator, and runs as one batch; most operators do themselves.

    Args:
        target: of a node.
    """
    return _FORMS.get(target, target)


def with_rules(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a module of operators that is to be called by `torch.vmap`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = batched_form(node.target)
    return fx.GraphModule(module, graph)


@contextmanager
def quiet_loops() -> Iterator[None]:
    """Lets torch loop over a batch where no rule is known, without a warning for each operator."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    return _folded(_ATTENTION, (dropout_p, is_causal), scale, attn_mask, query, key, value)


def _attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    tensors, options = (grad_out, query, key, value, out, logsumexp), (dropout_p, is_causal)
    return _folded(_ATTENTION_BACKWARD, options, scale, attn_mask, *tensors)


def _folded(
    op: Any,
    options: tuple[Any, ...],
    scale: float | None,
    mask: torch.Tensor | None,
    *tensors: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """An operator on tensors with sequences in dimension 0."""
    given = tensors if mask is None else (mask, *tensors)
    if any(map(torch._C._functorch.is_batchedtensor, given)):
        apply: Callable[..., tuple[torch.Tensor, ...]] = _Folded.apply
        return apply(op, options, scale, mask, *tensors)
    found: tuple[torch.Tensor, ...] = op(*tensors, *options, attn_mask=mask, scale=scale)
    return found


class _Folded(torch.autograd.Function):
    """The batch becomes a part of dimension 0; called for batches only."""

    @staticmethod
    def forward(*args: Any) -> Any:
        raise AssertionError("called for batches only")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: what is called instead has a gradient."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        op: Any,
        options: tuple[Any, ...],
        scale: float | None,
        mask: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> tuple[Any, ...]:
        """One call for all elements of the batch."""
        count, (mask_dim, *dims) = info.batch_size, in_dims[3:]
        stacked = [_in_front(t, d, count) for t, d in zip(tensors, dims, strict=True)]
        if mask is not None:
            mask = _folded_mask(mask, mask_dim, count, stacked[0].shape[1])
        flat = [t.flatten(0, 1) for t in stacked]
        # The kernel takes it for granted that the last dimension of a sequence is dense.
        dense = [t if t.dim() < 4 or t.stride(-1) == 1 else t.contiguous() for t in flat]
        found = _folded(op, options, scale, mask, *dense)
        return tuple(f.unflatten(0, (count, -1)) for f in found), (0,) * len(found)


def _in_front(tensor: torch.Tensor, dim: int | None, count: int) -> torch.Tensor:
    """A tensor with the batch as its first dimension."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _folded_mask(mask: torch.Tensor, dim: int | None, count: int, sequences: int) -> torch.Tensor:
    """A mask of [S, S] or [sequences or 1, heads or 1, S, S], for all elements of the batch."""
    if dim is None and (mask.dim() == 2 or mask.shape[0] == 1):
        return mask
    mask = _in_front(mask, dim, count)
    mask = mask[:, None, None] if mask.dim() == 3 else mask
    return mask.expand(count, sequences, *mask.shape[2:]).flatten(0, 1)


def _rms_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    shape = NormShape(channels=False, rank=len(normalized_shape))
    z = x.to(rstd.dtype) * rstd
    dx, dw, _ = gradients(shape, x.dtype, grad_out, z, z, rstd, weight, centred=False)
    return dx if output_mask[0] else None, dw if output_mask[1] else None


def _size(x: torch.Tensor, dim: int) -> int:
    return x.shape[dim]


_FORMS: dict[Any, Any] = {
    aten.sym_size.int: _size,
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    _ATTENTION: _attention,
    _ATTENTION_BACKWARD: _attention_backward,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
}
