"""The gradient of a norm from copies of its input, and of a softmax from copies of its output.

    z  = (x - mean) * rstd                     y  = z * weight + bias
    dx = rstd * (g - mean(g) - z * mean(g z'))     g = dy * weight; no mean(g) for an RMS norm
    dw = sum(dy * z),  db = sum(dy)

    p  = softmax(x)                            dx = p * (dy - sum(dy * p'))

`z` and `z'` may come from two copies of x with independent errors of mean zero: the gradient is
affine in each, and the statistics are exact, so its expectation is the true gradient. With one copy
it would be off by the variance of the error over the number of terms; for a softmax, where nothing
divides by that number, by the variance itself.

Source: the identities are those of memory-sharing norms (arXiv:2406.16282); the two copies are
gtrans' own.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormShape:
    """Over which dimensions a norm takes its statistics.

    Attributes:
        channels: over all but dimension 1, as batch norms do; otherwise over the last ones.
        rank: how many last ones.
    """

    channels: bool
    rank: int

    def shared(self, x: torch.Tensor) -> list[int]:
        """The dimensions that share statistics."""
        if self.channels:
            return [d for d in range(x.dim()) if d != 1]
        return list(range(x.dim() - self.rank, x.dim()))

    def along(self, vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A weight or a batch norm's statistic, to multiply x with."""
        return vector.view([1, -1] + [1] * (x.dim() - 2)) if self.channels else vector


def affine(
    shape: NormShape,
    dtype: torch.dtype,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The norm's output from its normalised input.

    Args:
        shape: of the norm.
        dtype: of the output.
        z: the normalised input, of any shape.
        weight, bias: of the normalised dimensions, or None.
    """
    y = z if weight is None else z * shape.along(weight, z)
    y = y if bias is None else y + shape.along(bias, z)
    return y.to(dtype)


def gradients(
    shape: NormShape,
    dtype: torch.dtype,
    dy: torch.Tensor,
    z: torch.Tensor,
    other: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, of the weight and of the bias.

    Args:
        shape: of the norm.
        dtype: of the gradient of x.
        dy: the cotangent, shaped like x.
        z, other: the normalised input, and another copy of it.
        rstd: one over the deviation; broadcasts with z, or [C] for channels.
        weight: as for `affine`.
        centred: whether the norm subtracts its mean.
    """
    dims = shape.shared(z)
    dy = dy.to(z.dtype)
    g = dy if weight is None else dy * shape.along(weight, z)
    inner = g - z * (g * other).mean(dims, keepdim=True)
    if centred:
        inner = inner - g.mean(dims, keepdim=True)
    rest = [d for d in range(z.dim()) if d not in dims] if not shape.channels else dims
    kept = torch.float32 if weight is None else weight.dtype
    dw = (dy * z).sum(rest) if rest else dy * z
    db = dy.sum(rest) if rest else dy
    return (inner * shape.along(rstd, z)).to(dtype), dw.to(kept), db.to(kept)


def normalised(
    shape: NormShape, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor
) -> torch.Tensor:
    """The normalised input, in float32 or wider.

    Args:
        shape: of the norm.
        x: the input, of any shape.
        mean, rstd: statistics that broadcast with x, or [C] for channels; no mean: an RMS norm.
    """
    wide = x if x.dtype is torch.float64 else x.float()
    centred = wide if mean is None else wide - shape.along(mean, x)
    return centred * shape.along(rstd, x)


def denormalised(
    shape: NormShape,
    dtype: torch.dtype,
    z: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
) -> torch.Tensor:
    """The inverse of `normalised`."""
    centred = z / shape.along(rstd, z)
    return (centred if mean is None else centred + shape.along(mean, z)).to(dtype)


def softmax_gradient(
    dim: int, dtype: torch.dtype, dy: torch.Tensor, y: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """The gradient at the input of a softmax.

    Args:
        dim: over which it sums to one.
        dtype: of the gradient.
        dy: the cotangent, shaped like y.
        y, other: the output, and another copy of it.
    """
    return (y * (dy - (dy * other).sum(dim, keepdim=True))).to(dtype)
