"""Cross-entropy of a linear layer, a chunk of tokens at a time.

With logits z = h W^T + b, p = softmax(z), class weights w (1 if there are none), smoothing e and
m_i = 0 for ignored tokens, the losses of torch are (y: the classes of the targets)

    loss_i = m_i [ -(1 - e) w_y log p_iy - e/V sum_c w_c log p_ic ]
    mean   = sum_i loss_i / sum_i m_i w_y

and the gradient of sum_i c_i loss_i is

    G_ic = (1 - e) w_y (p_ic - [c = y]) + e/V (p_ic sum_k w_k - w_c)
    dh = (m c) G W,    dW = G^T (m c h),    db = G^T (m c)

Of logits that are capped, z = k tanh(h W^T + b), G is that times k (1 - tanh^2).

A loss that is a sum or a mean knows c up to one number, its cotangent. So the gradients of a chunk
are computed right behind its logits, which are then dropped, and the backward has nothing left to
do but to multiply. For losses per token the backward computes the logits of each chunk again.

The loop is one operator, so that no compiler reorders it or keeps the logits of two chunks.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F

Reduction = Literal["mean", "sum", "none"]

_HALF = (torch.float16, torch.bfloat16)
_ROW_BLOCKS = 8


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunks: int,
    dtype: torch.dtype,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    smoothing: float = 0.0,
    cap: float = 0.0,
) -> torch.Tensor:
    """cross_entropy(linear(hidden, weight, bias), target) without all logits at once.

    Args:
        hidden: [*s, D].
        weight: [V, D].
        bias: [V] or None.
        target: class numbers, [*s].
        chunks: how many parts the tokens are taken in.
        dtype: of the result.
        class_weight: [V] or None; it gets no gradient.
        ignore_index: the class of tokens that do not count.
        reduction: "mean" is NaN if no token counts, as in torch.
        smoothing: label smoothing.
        cap: k of logits k tanh(linear(..)); 0 for none.

    Returns:
        The loss, a scalar; [*s] without a reduction.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        half = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(half), weight.to(half)
        bias = None if bias is None else bias.to(half)
    rows, labels = hidden.flatten(0, -2), target.reshape(-1)
    options = (chunks, ignore_index, smoothing, cap, torch.is_grad_enabled())
    apply: Any = (_LossPerToken if reduction == "none" else _SummedLoss).apply
    loss: torch.Tensor = apply(rows, weight, bias, labels, class_weight, options)
    if reduction == "none":
        return loss.to(dtype).view(target.shape)
    if reduction == "mean":
        counted = (labels != ignore_index).to(loss.dtype)
        if class_weight is not None:
            counted = counted * class_weight.to(loss.dtype)[labels.where(counted > 0, 0)]
        # Without a token that counts the loss is NaN, and yet its gradient zero.
        total = counted.sum()
        loss = loss / torch.where((labels != ignore_index).any(), total, torch.inf)
        loss = torch.where((labels != ignore_index).any(), loss, torch.nan)
    return loss.to(dtype)


class _SummedLoss(torch.autograd.Function):
    """sum_i loss_i; computes the gradients of what requires one in the forward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        *tensors, (*options, enabled) = arguments
        wanted = [enabled and needed for needed in ctx.needs_input_grad[:3]]
        losses, *slopes = linear_cross_entropy(*tensors, None, *options, wanted)
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        ctx.save_for_backward(
            *[
                g.to(_kept_in(dtype)) if needed else None
                for g, dtype, needed in zip(slopes, ctx.dtypes, wanted, strict=True)
            ]
        )
        total: torch.Tensor = losses.sum()
        return total

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        (dy,) = cotangents
        scaled = [
            None if g is None else (g * dy.to(g.dtype)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


class _LossPerToken(torch.autograd.Function):
    """[loss_i]; computes the logits again in the backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        *tensors, (*ctx.options, _) = arguments
        ctx.save_for_backward(*tensors)
        losses: torch.Tensor
        losses, *_ = linear_cross_entropy(*tensors, None, *ctx.options, [False] * 3)
        return losses

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:3])
        _, *slopes = linear_cross_entropy(*ctx.saved_tensors, *cotangents, *ctx.options, wanted)
        found = [
            g.to(x.dtype) if needed else None
            for g, x, needed in zip(slopes, ctx.saved_tensors, wanted, strict=False)
        ]
        return *found, None, None, None


@torch.library.custom_op("gtrans::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    cotangent: torch.Tensor | None,
    chunks: int,
    ignore_index: int,
    smoothing: float,
    cap: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of [n, D] rows, and gradients of their sum weighted by a cotangent [n] (1 if None).

    Gradients are in float32 where they are sums of halves over chunks or would underflow before
    the loss scale, which comes with the cotangent, is multiplied in. What is not wanted (of rows,
    weight, bias) is an empty tensor.
    """
    losses, found = _empty(rows, weight, wanted)
    for gradient in found[1:]:
        gradient.zero_()
    step = max(1, -(-rows.shape[0] // chunks))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        h, y = rows[part], target[part]
        counts = (y != ignore_index).to(losses.dtype)
        y = y.where(counts > 0, 0)
        logits = _wide(F.linear(h, weight, bias))
        bent = None
        if cap:
            logits.tanh_()
            bent = cap * (1 - logits.square()) if any(wanted) else None
            logits.mul_(cap)
        logp = _log_softmax_in_place(logits)
        losses[part] = _losses(logp, y, class_weight, smoothing) * counts
        if any(wanted):
            scale = counts if cotangent is None else counts * cotangent[part].to(counts.dtype)
            slope = _slope_in_place(logp, y, class_weight, smoothing)
            slope = (slope if bent is None else slope.mul_(bent)).to(weight.dtype)
            _add_gradients(slope, scale.unsqueeze(-1), h, weight, part, found)
            del slope
        del logits, logp, bent  # or it would be in memory beside the next chunk's logits
    return losses, *found


def _add_gradients(
    slope: torch.Tensor,
    scale: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    part: slice,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """What a chunk adds to the gradients of rows, weight and bias; empty ones are not wanted."""
    rows, total, offset = found
    if rows.numel():
        rows[part] = (slope @ weight).to(rows.dtype).mul_(scale)
    scaled = h * scale.to(h.dtype)
    if total.numel() and total.dtype == slope.dtype:
        total.addmm_(slope.t(), scaled)
    elif total.numel():
        total.add_(slope.t() @ scaled)
    if offset.numel():
        offset.add_((slope.t() @ scale.to(slope.dtype)).squeeze(-1))


@linear_cross_entropy.register_fake
def _(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    cotangent: torch.Tensor | None,
    chunks: int,
    ignore_index: int,
    smoothing: float,
    cap: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, found = _empty(rows, weight, wanted)
    return losses, *found


def _empty(
    rows: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Room for the losses, and for the gradients of rows, weight and bias."""
    total = torch.float32 if rows.dtype in _HALF else rows.dtype
    sizes = [rows.shape, weight.shape, weight.shape[:1]]
    found = [
        rows.new_empty(size if asked else (0,), dtype=dtype)
        for size, asked, dtype in zip(
            sizes, wanted, (_kept_in(rows.dtype), total, total), strict=True
        )
    ]
    return rows.new_empty(rows.shape[:1], dtype=total), (found[0], found[1], found[2])


def _log_softmax_in_place(logits: torch.Tensor) -> torch.Tensor:
    """A few rows after another, so that a chunk of logits is in memory once."""
    for rows in logits.chunk(_ROW_BLOCKS):
        rows.copy_(rows.log_softmax(-1))
    return logits


def _losses(
    logp: torch.Tensor, y: torch.Tensor, class_weight: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    w = None if class_weight is None else class_weight.to(logp.dtype)
    each = -logp.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    if w is not None:
        each = each * w[y]
    if smoothing > 0:
        spread = logp.mean(-1) if w is None else logp @ w / logp.shape[-1]
        each = (1 - smoothing) * each - smoothing * spread
    return each


def _slope_in_place(
    logp: torch.Tensor, y: torch.Tensor, class_weight: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """G, in the place of log p."""
    slope, one = logp.exp_(), torch.ones_like(y, dtype=logp.dtype)
    w = None if class_weight is None else class_weight.to(logp.dtype)
    certain = (1 - smoothing) * (one if w is None else w[y])
    if w is not None:
        slope.mul_((certain + smoothing * w.mean()).unsqueeze(-1))
    slope.scatter_add_(-1, y.unsqueeze(-1), -certain.unsqueeze(-1))
    if smoothing > 0:
        slope.sub_((1 if w is None else w) * (smoothing / slope.shape[-1]))
    return slope


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Softmax and sums over chunks are taken in float32: a half has too few digits for them."""
    return x.float() if x.dtype in _HALF else x


def _kept_in(dtype: torch.dtype) -> torch.dtype:
    """float16 would lose gradients that the loss scale, which comes with dy, is there to keep."""
    return torch.float32 if dtype is torch.float16 else dtype
