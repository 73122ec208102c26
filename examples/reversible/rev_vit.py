"""A small Rev-ViT on handwritten digits: memory against depth, with and without `reversible`."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from examples.reversible.depth import against_depth

D, HEADS, BATCH, DEPTHS, STEPS = 32, 4, 256, (1, 2, 4, 8), 40


class Attention(nn.Module):
    """Pre-norm attention over [B, T, D]."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.heads, self.causal = nn.Linear(width, width), heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, x.shape[-1] // self.heads))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed: torch.Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


def perceptron(width: int) -> nn.Module:
    """Norm, widen, activate, narrow."""
    wide = 4 * width
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width)
    )


class RevViT(nn.Module):
    """Both streams start as the patches; attention writes one, a perceptron the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches, self.position = nn.Linear(4, D), nn.Parameter(torch.randn(16, D) / 10)
        self.attention = nn.ModuleList(Attention(D, HEADS) for _ in range(depth))
        self.mlp = nn.ModuleList(perceptron(D) for _ in range(depth))
        self.head = nn.Linear(2 * D, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tiles = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        a = b = self.patches(tiles) + self.position
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            a = a + attention(b)
            b = b + mlp(a)
        return self.head(torch.cat([a, b], -1).mean(1))


def main() -> None:
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        now = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        return F.cross_entropy(model(x[now]), y[now])

    against_depth("rev_vit", RevViT, loss, DEPTHS, STEPS)


if __name__ == "__main__":
    main()
