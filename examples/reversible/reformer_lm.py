"""A Reformer-like language model on Python's own documentation: memory against depth."""

from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

from examples.reversible.depth import against_depth
from examples.reversible.rev_vit import Attention, perceptron

D, HEADS, LENGTH, BATCH, DEPTHS, STEPS = 48, 4, 64, 16, (1, 2, 4, 8), 40


class Reformer(nn.Module):
    """Causal attention writes one stream, a perceptron the other; the embedding is tied."""

    def __init__(self, vocabulary: int, depth: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, D), nn.LayerNorm(D)
        self.position = nn.Parameter(torch.randn(LENGTH, D) / 10)
        self.attention = nn.ModuleList(Attention(D, HEADS, causal=True) for _ in range(depth))
        self.mlp = nn.ModuleList(perceptron(D) for _ in range(depth))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        a = b = self.embed(ids) + self.position
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            a = a + attention(b)
            b = b + mlp(a)
        return F.linear(self.norm(a + b), self.embed.weight / D**0.5)


def main() -> None:
    written = "\n".join(topics.values())
    letters = {c: i for i, c in enumerate(sorted(set(written)))}
    text = torch.tensor([letters[c] for c in written])

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
        window = text[starts + torch.arange(LENGTH + 1)]
        return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    against_depth("reformer_lm", partial(Reformer, len(letters)), loss, DEPTHS, STEPS)


if __name__ == "__main__":
    main()
