"""Values of the forward computed again from what it kept: nothing is drawn or updated twice."""

import torch

_HALF = (torch.float16, torch.bfloat16)


def drop(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Dropout's output from its input and mask, in the kernel's own order of products.

    Args:
        x: the input, of any shape.
        mask: of the same shape, bool: what stays.
        scale: 1 / (1 - p).
    """
    if x.dtype in _HALF and x.device.type == "cpu":
        # There, and only there, the kernel rounds the scale to the type of the values first.
        return x * mask * torch.full((), scale, dtype=x.dtype)
    return x * mask * scale


def normalise(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A batch norm's output from its input and the statistics that the forward found.

    Args:
        x: the input, [N, C, *s].
        mean: [C].
        rstd: one over the standard deviation, [C].
        weight: [C] or None.
        bias: [C] or None.
    """
    along = [1, -1] + [1] * (x.dim() - 2)
    y = (x - mean.view(along)) * rstd.view(along)
    if weight is not None:
        y = y * weight.view(along)
    if bias is not None:
        y = y + bias.view(along)
    return y.to(x.dtype)
