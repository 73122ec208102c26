"""Small models that the tests of the planner share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[Any, ...]]


class Block(nn.Module):
    """A pre-norm transformer block with dropout."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        heads = (z.view(b, t, 2, d // 2).transpose(1, 2) for z in self.qkv(self.norm(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.drop(self.out(a))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Gpt(nn.Module):
    """Embedding, blocks, tied head, loss."""

    def __init__(self, layers: int, d: int = 16, vocabulary: int = 31) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(layers))
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU, a skip, pooling, loss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.head(x.mean((2, 3))).square().mean()


class Mlp(nn.Module):
    """Linear layers and activations with a loss."""

    def __init__(self, layers: int = 4, d: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.silu(layer(x))
        return x.square().mean()


def _gpt(layers: int = 3) -> Built:
    return Gpt(layers), (torch.randint(31, (4, 32)),)


MODELS: dict[str, Callable[[], Built]] = {
    "mlp": lambda: (Mlp(), (torch.randn(256, 16),)),
    "conv": lambda: (ConvNet(), (torch.randn(4, 3, 16, 16),)),
    "gpt": _gpt,
}


@pytest.fixture
def build() -> Callable[[str], Built]:
    """Makes one of the models by name, always with the same weights."""

    def make(name: str) -> Built:
        torch.manual_seed(0)
        return MODELS[name]()

    return make
