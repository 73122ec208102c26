"""Norms over a vector some of whose entries, all zero, were erased: the old length stays divisor.

With D the length before and D' the length after erasure, and sums over the D' entries left:

    mean = sum(x) / D
    var  = (sum((x - mean)²) + (D - D') · mean²) / D        the erased entries are 0 - mean
    y    = (x - mean) / sqrt(var + eps) · weight + bias

so the result equals that of the longer vector at the entries that are left.

Both norms are operators (`torch.ops.gtrans`), so that a graph says what they are and a shortened
model can be shortened again; compilers see through them.
"""

from collections.abc import Sequence

import torch
from torch import nn


def _layer_norm(
    x: torch.Tensor,
    rank: int,
    divisor: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    dims = list(range(-rank, 0))
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    left = 1
    for d in dims:
        left *= x.shape[d]
    mean = wide.sum(dims, keepdim=True) / divisor
    centred = wide - mean
    square = (centred * centred).sum(dims, keepdim=True)
    variance = (square + (divisor - left) * mean * mean) / divisor
    y = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _rms_norm(
    x: torch.Tensor, rank: int, divisor: int, weight: torch.Tensor | None, eps: float | None
) -> torch.Tensor:
    dims = list(range(-rank, 0))
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = wide * torch.rsqrt((wide * wide).sum(dims, keepdim=True) / divisor + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)


LIBRARY = torch.library.Library("gtrans", "FRAGMENT")
LIBRARY.define(
    "layer_norm_of_longer(Tensor input, int rank, int divisor, Tensor? weight, Tensor? bias, "
    "float eps) -> Tensor"
)
LIBRARY.define(
    "rms_norm_of_longer(Tensor input, int rank, int divisor, Tensor? weight, float? eps) -> Tensor"
)
LIBRARY.impl("layer_norm_of_longer", _layer_norm, "CompositeImplicitAutograd")
LIBRARY.impl("rms_norm_of_longer", _rms_norm, "CompositeImplicitAutograd")


def layer_norm_of_longer(
    x: torch.Tensor,
    rank: int,
    divisor: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Layer norm over the last `rank` dimensions, as if they had `divisor` elements.

    Args:
        x: [*, *normalised]; computed in at least float32.
        rank: how many dimensions are normalised.
        divisor: number of elements before the erasure.
        weight: [*normalised] or None.
        bias: [*normalised] or None.
        eps: added to the variance.
    """
    made: torch.Tensor = torch.ops.gtrans.layer_norm_of_longer(x, rank, divisor, weight, bias, eps)
    return made


def rms_norm_of_longer(
    x: torch.Tensor, rank: int, divisor: int, weight: torch.Tensor | None, eps: float | None
) -> torch.Tensor:
    """RMS norm over the last `rank` dimensions, as if they had `divisor` elements.

    Args: as for `layer_norm_of_longer`; `eps` None takes the smallest step of the dtype.
    """
    made: torch.Tensor = torch.ops.gtrans.rms_norm_of_longer(x, rank, divisor, weight, eps)
    return made


class LongerLayerNorm(nn.LayerNorm):
    """A layer norm that keeps the divisor it had before its vector was shortened.

    Args:
        normalized_shape: the shape that is left.
        divisor: number of normalised elements before.
        eps: added to the variance.
        affine: whether there is a weight.
        bias: whether there is a bias.
    """

    def __init__(
        self,
        normalized_shape: Sequence[int],
        divisor: int,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(list(normalized_shape), eps, affine, bias)
        self.divisor = divisor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimensions."""
        rank = len(self.normalized_shape)
        return layer_norm_of_longer(input, rank, self.divisor, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """The stock text and the divisor."""
        return f"{super().extra_repr()}, divisor={self.divisor}"


class LongerRMSNorm(nn.RMSNorm):
    """An RMS norm that keeps the divisor it had before its vector was shortened."""

    def __init__(
        self,
        normalized_shape: Sequence[int],
        divisor: int,
        eps: float | None = None,
        affine: bool = True,
    ) -> None:
        super().__init__(list(normalized_shape), eps, affine)
        self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimensions."""
        rank = len(self.normalized_shape)
        return rms_norm_of_longer(x, rank, self.divisor, self.weight, self.eps)

    def extra_repr(self) -> str:
        """The stock text and the divisor."""
        return f"{super().extra_repr()}, divisor={self.divisor}"
