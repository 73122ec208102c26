"""Cross-entropy of a linear layer, a chunk of tokens at a time.

The gradients of a chunk are computed right behind its logits, which are then dropped. With
p = softmax(h W^T + b) and the target distribution q (one-hot, smoothed by e: (1 - e) [c = y] + e/V)

    loss = 1/n sum_i sum_c -q_ic log p_ic          (n: tokens that are not ignored; 1 for a sum)
    G    = p - q, zero for ignored tokens
    dh = dy/n G W,    dW = dy/n G^T h,    db = dy/n sum_i G_i

so the backward has nothing left to do but to multiply by its incoming cotangent dy.
"""

from typing import Any

import torch
import torch.nn.functional as F

_HALF = (torch.float16, torch.bfloat16)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    dtype: torch.dtype,
    ignore_index: int = -100,
    mean: bool = True,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """cross_entropy(linear(hidden, weight, bias), target) without all logits at once.

    Args:
        hidden: [*s, D].
        weight: [V, D].
        bias: [V] or None.
        target: class numbers, [n] with n the product of s.
        chunks: how many parts the tokens are taken in.
        dtype: of the result.
        ignore_index: the class of tokens that do not count.
        mean: divide by the number of tokens that count; NaN if there are none, as in torch.
        smoothing: label smoothing.

    Returns:
        The loss, a scalar.
    """
    rows = hidden.flatten(0, -2)
    options = (chunks, dtype, ignore_index, mean, smoothing, torch.is_grad_enabled())
    loss: torch.Tensor = _ChunkedLoss.apply(rows, weight, bias, target, options)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """The loss of [n, D] rows; computes gradients in the forward, of what requires one."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        options: tuple[int, torch.dtype, int, bool, float, bool],
    ) -> torch.Tensor:
        chunks, dtype, ignore_index, mean, smoothing, enabled = options
        wanted = [enabled and needs for needs in ctx.needs_input_grad[:3]]
        count = (target != ignore_index).sum()
        parts: list[torch.Tensor] = []
        sums: list[torch.Tensor | None] = [None, None]
        total: torch.Tensor | None = None
        # Equal steps and a longer last one: all lie within the rows, so that a symbolic number of
        # tokens asks no more than whether a step has two of them.
        step = rows.shape[0] // chunks
        for k in range(chunks):
            length = step if k < chunks - 1 else rows.shape[0] - k * step
            h, y = rows.narrow(0, k * step, length), target.narrow(0, k * step, length)
            logits = F.linear(h, weight, bias)
            loss, slope = _loss_and_slope(logits, y, ignore_index, smoothing, any(wanted))
            total = loss if total is None else total + loss
            if wanted[0]:
                parts.append(_wide(slope @ weight.to(slope.dtype)))
            if wanted[1]:
                sums[0] = _plus(sums[0], _wide(slope.t() @ h.to(slope.dtype)))
            if wanted[2]:
                sums[1] = _plus(sums[1], _wide(slope).sum(0))
        assert total is not None
        scale = 1 / count.clamp(min=1).to(total.dtype) if mean else torch.ones_like(total)
        found = [torch.cat(parts) if parts else None, *sums]
        inputs = (rows, weight, bias)
        ctx.save_for_backward(
            *[
                None if g is None or x is None else (g * scale.to(g.dtype)).to(_kept_in(x.dtype))
                for g, x in zip(found, inputs, strict=True)
            ]
        )
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return (total / count if mean else total).to(dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        (dy,) = cotangents
        scaled = [
            None if g is None else (g * dy.to(g.dtype)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _loss_and_slope(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, smoothing: float, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a chunk, and p - q in the type of the logits."""
    counts = (target != ignore_index).unsqueeze(-1)
    labels = torch.where(counts, target.unsqueeze(-1), 0)
    logp = F.log_softmax(_wide(logits), -1)
    each = -logp.gather(-1, labels)
    if smoothing > 0:
        each = (1 - smoothing) * each - smoothing * logp.mean(-1, keepdim=True)
    loss = torch.where(counts, each, 0).sum()
    if not wanted:
        return loss, logits
    slope = logp.exp() - smoothing / logits.shape[-1]
    certain = torch.full_like(labels, smoothing - 1, dtype=slope.dtype)
    slope = torch.where(counts, slope.scatter_add(-1, labels, certain), 0)
    return loss, slope.to(logits.dtype)


def _plus(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total + term


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Sums over chunks are taken in float32: a half has too few digits for them."""
    return x.float() if x.dtype in _HALF else x


def _kept_in(dtype: torch.dtype) -> torch.dtype:
    """float16 would lose gradients that the loss scale, which comes with dy, is there to keep."""
    return torch.float32 if dtype is torch.float16 else dtype
