"""The six networks that memory figures are about, in sizes for two cores.

GTRANS_BENCH_MODELS=vit,unet and GTRANS_BENCH_BACKENDS=eager leave out the others of a benchmark.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import Built, UNet, huggingface, timm_model

BACKENDS = ("eager", "inductor")


def is_chosen(name: str) -> bool:
    """Whether a model or backend takes part: all do unless the environment names some."""
    variable = "GTRANS_BENCH_BACKENDS" if name in BACKENDS else "GTRANS_BENCH_MODELS"
    chosen = os.environ.get(variable, "")
    return not chosen or name in chosen.split(",")


def networks(quick: bool) -> dict[str, Callable[[], Built]]:
    """GPT-2, Llama, BERT, ViT, ResNet and U-Net with a batch each, all with a loss or an output."""
    layers, width, batch = (3, 32, 4) if quick else (12, 128, 4)
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": 101 if quick else 1000,
    }
    text = {"count": batch, "length": 64 if quick else 256, "vocabulary": shape["vocab_size"]}
    images = torch.randn(batch, 3, 64, 64) if quick else torch.randn(16, 3, 96, 96)
    depth: dict[str, Any] = {"layers": (1, 1, 1, 1)} if quick else {}
    return {
        "gpt2": lambda: _text(
            huggingface(
                "gpt2", n_layer=layers, n_embd=width, n_head=4, vocab_size=shape["vocab_size"]
            ),
            **text,
        ),
        "llama": lambda: _text(
            huggingface("llama", **shape, intermediate_size=width * 43 // 16), **text
        ),
        "bert": lambda: _text(
            huggingface("bert", "AutoModelForMaskedLM", **shape, intermediate_size=4 * width),
            **text,
        ),
        "vit": lambda: _image(
            timm_model(
                "vit_tiny_patch16_224", patch_size=8, embed_dim=48 if quick else 192, num_heads=3,
                depth=layers, img_size=images.shape[-1],
            )[0],
            images,
        ),
        "resnet": lambda: _image(timm_model("resnet50", **depth)[0], images),
        "unet": lambda: _image(_UNets(8 if quick else 32), images),
    }  # fmt: skip


def wide_llama() -> Built:
    """A Llama of 6 layers and width 256, batch 8 x 256."""
    shape: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    built = huggingface("llama", **shape, vocab_size=1000, intermediate_size=688)
    return _text(built, count=8, length=256, vocabulary=1000)


def loss_of(output: Any) -> torch.Tensor:
    """The loss that a model returns, or the mean square of its output."""
    found: torch.Tensor = output.loss if hasattr(output, "loss") else output.square().mean()
    return found


def step_of(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    """A training step without an optimizer, as most loops have it: the output lives to its end."""

    def step() -> None:
        output = model(**batch)
        loss_of(output).backward()
        model.zero_grad(set_to_none=True)

    return step


def resident_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Parameters, buffers and inputs, which are in memory before the step."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *batch.values()))


def _text(built: Built, *, count: int, length: int, vocabulary: int) -> Built:
    ids = torch.randint(3, vocabulary, (count, length))
    model = built[0]
    config: Any = model.config
    config.use_cache = False  # nobody trains with a cache; it would be one more output per layer
    return model, {"input_ids": ids, "labels": ids}


def _image(model: nn.Module, images: torch.Tensor) -> Built:
    return model, {"x": images}


class _UNets(nn.Module):
    """Three U-Nets in a row, each with its skip, so that there is something to choose."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(UNet(width) for _ in range(3))
        self.between = nn.ModuleList(nn.Conv2d(4, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 3, height, width]. Returns: [batch, 4, height, width]."""
        for net, conv in zip(self.nets, self.between, strict=False):
            x = conv(net(x))
        segmented: torch.Tensor = self.nets[-1](x)
        return segmented
