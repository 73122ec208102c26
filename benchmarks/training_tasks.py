"""Four small training tasks on real data that comes with installed packages.

    minilm   contrastive fine-tuning of all-MiniLM-L6-v2 on Python's manual   held-out loss
    vit      a vision transformer on scikit-learn's 8x8 digits                accuracy in %
    resnet   a residual network with batch norms on the same                  accuracy in %
    chars    a character language model on Python's manual                    held-out loss

Nothing is downloaded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.zoo import has_minilm, minilm_folder

Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: in the table.
        build: makes the model of a seed; its forward takes a batch and returns the loss.
        batches: the batches of a seed, in order.
        held_out: the figure of a trained model, on data it has not seen.
        is_loss: whether that figure is a loss; otherwise it is an accuracy in %.
        rate: learning rate of AdamW.
    """

    name: str
    build: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    held_out: Callable[[nn.Module], float]
    is_loss: bool
    rate: float


def tasks(quick: bool) -> list[Task]:
    """All tasks; with `quick`, two of them for a few steps."""

    def steps(full: int) -> int:
        return 12 if quick else full

    found = [
        Task("vit", _vit, lambda s: _digit_batches(s, steps(250)), _accuracy, False, 2e-3),
        Task("resnet", _resnet, lambda s: _digit_batches(s, steps(160)), _accuracy, False, 3e-3),
        Task("chars", _language_model, lambda s: _text_batches(s, steps(200)), _text_loss, True,
             3e-3),
    ]  # fmt: skip
    if quick:
        return found[:2]
    if has_minilm():
        found.append(Task("minilm", _minilm, lambda s: _pair_batches(s, 24), _pair_loss, True,
                          3e-5))  # fmt: skip
    return found


# ---------------------------------------------------------------------- digits


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order] / 8 - 1
    return images.unsqueeze(1), torch.tensor(data.target)[order]


_HELD_OUT = 397


def _digit_batches(seed: int, count: int) -> Iterator[Batch]:
    images, labels = _digits()
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        chosen = torch.randint(_HELD_OUT, len(labels), (64,), generator=draw)
        yield images[chosen], labels[chosen]


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    images, labels = _digits()
    if not isinstance(model, (Vit, ResNet)):
        raise TypeError(f"{type(model).__name__} has no logits of digits")
    model.eval()
    logits = model.logits(images[:_HELD_OUT])
    return 100 * float((logits.argmax(1) == labels[:_HELD_OUT]).float().mean())


class Vit(nn.Module):
    """Sixteen patches of 2x2, two blocks of width 64, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 64, 2, stride=2)
        self.place = nn.Parameter(torch.randn(1, 16, 64) * 0.02)
        self.blocks = nn.Sequential(Block(64, causal=False), Block(64, causal=False))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, 1, 8, 8] to [n, 10]."""
        tokens = self.enter(x).flatten(2).transpose(1, 2) + self.place
        found: torch.Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return found

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(self.logits(x), labels)


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, tokens, width]. Returns: the same shape."""
        n, tokens, width = x.shape
        y = self.first(x)
        q, k, v = (f(y).view(n, tokens, 4, width // 4).transpose(1, 2) for f in self._products())
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(y.transpose(1, 2).reshape(n, tokens, width))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return out

    def _products(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class ResNet(nn.Module):
    """Three residual blocks with batch norms; two of them halve the map."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.blocks = nn.Sequential(Basic(32, 32), Basic(32, 64, 2), Basic(64, 64))
        self.head = nn.Linear(64, 10)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, 1, 8, 8] to [n, 10]."""
        found: torch.Tensor = self.head(self.blocks(F.relu(self.enter(x))).mean((2, 3)))
        return found

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(self.logits(x), labels)


class Basic(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(2))
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, width, h, w]. Returns: [n, out, h / stride, w / stride]."""
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.skip(x))


def _vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Vit()


def _resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet()


# ---------------------------------------------------------------------- characters


@cache
def _characters() -> tuple[torch.Tensor, int]:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    known = sorted(set(text))
    number = {c: i for i, c in enumerate(known)}
    return torch.tensor([number[c] for c in text]), len(known)


class LanguageModel(nn.Module):
    """Two causal blocks of width 96 over characters."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, 96), nn.Embedding(length, 96)
        self.blocks = nn.Sequential(Block(96, causal=True), Block(96, causal=True))
        self.norm, self.head = nn.LayerNorm(96), nn.Linear(96, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Args: ids: [n, length + 1]. Returns: the mean cross-entropy."""
        x = self.embed(ids[:, :-1]) + self.place.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


_LENGTH = 64


def _language_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LanguageModel(_characters()[1], _LENGTH)


def _windows(draw: torch.Generator, start: int, end: int, count: int) -> torch.Tensor:
    text, _ = _characters()
    at = torch.randint(start, end - _LENGTH - 1, (count,), generator=draw)
    return torch.stack([text[i : i + _LENGTH + 1] for i in at.tolist()])


def _text_batches(seed: int, count: int) -> Iterator[Batch]:
    end = len(_characters()[0]) * 9 // 10
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (_windows(draw, 0, end, 16),)


@torch.no_grad()
def _text_loss(model: nn.Module) -> float:
    size = len(_characters()[0])
    windows = _windows(torch.Generator().manual_seed(1), size * 9 // 10, size, 256)
    return float(model.eval()(windows))


# ---------------------------------------------------------------------- sentences


class Contrastive(nn.Module):
    """A sentence encoder whose loss asks every passage to find its partner in the batch."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Args: both [2 * pairs, length]; partners are half a batch apart. Returns: the loss."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        vectors = F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
        first, second = vectors.chunk(2)
        similarity = first @ second.T / 0.05
        partner = torch.arange(len(first))
        return F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.T, partner)


def _minilm(seed: int) -> nn.Module:
    folder = minilm_folder()
    from transformers import AutoModel

    torch.manual_seed(seed)
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, **zero)
    return Contrastive(encoder).train()


@cache
def _pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and masks, [pairs, 2, 32]."""
    folder = minilm_folder()
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    passages: list[str] = []
    for name in sorted(topics):
        words = topics[name].split()
        parts = [" ".join(words[i : i + 24]) for i in range(0, min(len(words), 240) - 24, 24)]
        passages += parts[: len(parts) // 2 * 2]
    tokens = AutoTokenizer.from_pretrained(folder)(
        passages, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    return tokens["input_ids"].view(-1, 2, 32), tokens["attention_mask"].view(-1, 2, 32)


def _chosen(at: torch.Tensor) -> Batch:
    ids, mask = _pairs()
    return tuple(t[at].transpose(0, 1).flatten(0, 1) for t in (ids, mask))


def _pair_batches(seed: int, count: int) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield _chosen(64 + torch.randperm(len(_pairs()[0]) - 64, generator=draw)[:8])


@torch.no_grad()
def _pair_loss(model: nn.Module) -> float:
    return float(model.eval()(*_chosen(torch.arange(64))))
