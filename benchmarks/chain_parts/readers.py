"""Recurrent models on real data: digits pixel by pixel, and the characters of Python's source."""

import argparse as text_source
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gtrans.runtime.recurrence import recurrent_network

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Reader(nn.Module):
    """A GRU over a sequence of numbers, and a class from its last state or the mean of all."""

    def __init__(self, width: int, classes: int = 10, *, mean: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.mean = nn.GRU(1, width), nn.Linear(width, classes), mean
        with torch.no_grad():  # remember by default: z near one
            self.layer.get_parameter("bias_ih_l0")[width : 2 * width] += 2

    def loss(self, x: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """Cross-entropy of [B, T] numbers; options are those of `recurrent_network`."""
        states = _states(self.layer, x.t().unsqueeze(-1), batch_first=False, **options)
        read = states.mean(0) if self.mean else states[-1]
        return F.cross_entropy(self.head(read), labels)


class Language(nn.Module):
    """A GRU over characters that says which comes next."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(letters, width), nn.GRU(width, width)
        self.head = nn.Linear(width, letters)

    def loss(self, x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
        """Cross-entropy of [B, T] characters against those that follow."""
        states = _states(self.layer, self.embed(x), batch_first=True, **options)
        return F.cross_entropy(self.head(states).flatten(0, 1), y.flatten())


def _states(layer: nn.GRU, x: torch.Tensor, *, batch_first: bool, **options: Any) -> torch.Tensor:
    batch = x.shape[0 if batch_first else 1]
    start = x.new_zeros(1, batch, layer.hidden_size)
    weights: list[torch.Tensor] = list(layer.parameters())
    return recurrent_network("gru", x, start, weights, True, 1, False, batch_first, **options)[0]


def digits(side: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits of scikit-learn as sequences of side * side numbers, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    larger = F.interpolate(images, size=(side, side))
    return larger.flatten(1).to(device), torch.tensor(data.target).to(device)


def text(device: str) -> tuple[torch.Tensor, int]:
    """The characters of a module of Python's library as numbers, and how many there are."""
    source = inspect.getsource(text_source)
    letters = sorted(set(source))
    return torch.tensor([letters.index(c) for c in source], device=device), len(letters)


def windows(letters: torch.Tensor, length: int, size: int, seed: int = 1) -> Batches:
    """Endless batches of passages and the same one character on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(letters) - length - 1, (size,), generator=generator)
        rows = torch.stack([letters[s : s + length + 1] for s in starts.tolist()])
        yield rows[:, :-1], rows[:, 1:]


def batches(x: torch.Tensor, y: torch.Tensor, size: int, seed: int = 1) -> Batches:
    """Endless batches drawn from examples."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(x), (size,), generator=generator)
        yield x[chosen], y[chosen]
