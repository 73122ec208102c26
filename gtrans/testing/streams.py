"""Small models with a residual stream, for tests of what looks for one."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

Flavour = Literal["pre-norm", "transformer", "parallel", "relu-after-add", "post-norm", "taps"]

Layer = Callable[[torch.Tensor], torch.Tensor]

FLAVOURS: tuple[Flavour, ...] = (
    "pre-norm",
    "transformer",
    "parallel",
    "relu-after-add",
    "post-norm",
    "taps",
)


class Stream(nn.Module):
    """A stack of residual blocks on `[batch, positions, width]`.

    Args:
        flavour: how a block reads and writes the stream. "transformer" has two links a block, an
            attention and an MLP; "parallel" adds both in one; "taps" returns means of the stream
            after each block besides the output.
        depth: number of blocks.
        width: channels of the stream, an even number.
        scalar: return the sum of the stream rather than the output of a last linear layer.
    """

    def __init__(
        self, flavour: Flavour, depth: int, width: int = 6, *, scalar: bool = False
    ) -> None:
        super().__init__()
        self.flavour = flavour
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width + 3), nn.GELU(), nn.Linear(width + 3, width))
            for _ in range(depth)
        )
        if flavour in ("transformer", "parallel"):
            self.attentions = nn.ModuleList(_Attention(width) for _ in range(depth))
        self.last = nn.Identity() if scalar else nn.Linear(width, 3)
        self.scalar = scalar

    @property
    def links(self) -> int:
        """Links of the chain that the gradient of the stream is."""
        return len(self.branches) * (2 if self.flavour == "transformer" else 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output, and with "taps" the means."""
        taps = []
        for index in range(len(self.branches)):
            x = self._block(index, x)
            taps.append(x.mean())
        y = x.sum() if self.scalar else self.last(x)
        return (y, torch.stack(taps)) if self.flavour == "taps" else (y,)

    def _block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        norm: Layer = self.norms[index]
        branch: Layer = self.branches[index]
        match self.flavour:
            case "pre-norm" | "taps":
                return x + branch(norm(x))
            case "relu-after-add":
                return torch.relu(x + branch(x))
            case "post-norm":
                return norm(x + branch(x))
            case "parallel":
                y = norm(x)
                return torch.add(x + self.attentions[index](y), branch(y))
            case "transformer":
                x = x + self.attentions[index](norm(x))
                return x + branch(F.rms_norm(x, x.shape[-1:]))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(project: Layer) -> torch.Tensor:
            positions: torch.Tensor = project(x)
            return positions.view(*positions.shape[:2], 2, -1).transpose(1, 2)

        y = F.scaled_dot_product_attention(heads(self.q), heads(self.k), heads(self.v))
        joined: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return joined
