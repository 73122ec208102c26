"""Shared by all tests."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch import nn
from torch.nn import functional as F

os.environ["GTRANS_CACHE"] = "off"  # tests that are about what is kept on disk say where
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, print_blob=True
)
hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _without_torchvision_kernels() -> torch.library.Library:
    """Declares the two operators that torchvision looks up when it is imported.

    The wheel of torchvision on the package index has kernels for another build of torch, and
    transformers and timm import it; its kernels are not needed for the models here.
    """
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_torchvision = _without_torchvision_kernels()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo reuses what it compiled for another test with the same code; not here."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


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
        heads = self.qkv(self.norm(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        a = a.transpose(1, 2).reshape(b, t, d)
        x = x + self.drop(self.out(a))
        y: torch.Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return y


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
        logits: torch.Tensor = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


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
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores.square().mean()


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
