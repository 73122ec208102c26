"""A conv net in the manner of i-RevNet on handwritten digits: memory against depth."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from examples.reversible.depth import against_depth

WIDTH, BATCH, DEPTHS, STEPS = 8, 128, (1, 2, 4, 8), 30


class Branch(nn.Module):
    """Batch norm, ReLU, convolution, twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(F.relu(norm(x)))
        return x


class IRevNet(nn.Module):
    """Couplings at 8 x 8, space to depth, couplings at 4 x 4: nothing is ever thrown away."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2 * WIDTH, 3, padding=1)
        self.fine = nn.ModuleList(Branch(WIDTH) for _ in range(depth))
        self.coarse = nn.ModuleList(Branch(4 * WIDTH) for _ in range(depth))
        self.head = nn.Linear(8 * WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        a, b = self.stem(images).chunk(2, 1)
        for branch in self.fine:
            a, b = b, a + branch(b)
        a, b = F.pixel_unshuffle(a, 2), F.pixel_unshuffle(b, 2)
        for branch in self.coarse:
            a, b = b, a + branch(b)
        return self.head(F.relu(torch.cat([a, b], 1)).mean((2, 3)))


def main() -> None:
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        now = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        return F.cross_entropy(model(x[now]), y[now])

    against_depth("irevnet", IRevNet, loss, DEPTHS, STEPS)


if __name__ == "__main__":
    main()
