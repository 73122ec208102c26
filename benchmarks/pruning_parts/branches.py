"""Networks of many branches, for erasing whole operators: stacked U-Nets and a supernet."""

import torch
from torch import nn
from torch.nn import functional as F


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, inner, height, width]. Returns: the same with outer channels."""
        return F.relu(self.norm(self.conv(x)))


class UNet(nn.Module):
    """A U-Net of some depth, whose levels are U-Nets themselves."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.enter, self.down = Unit(width, width), Unit(width, width)
        self.inner: nn.Module = UNet(width, depth - 1) if depth > 1 else Unit(width, width)
        self.up, self.leave = nn.ConvTranspose2d(width, width, 2, 2), Unit(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, width, size, size]. Returns: the same shape."""
        skip = self.enter(x)
        low = self.inner(self.down(F.max_pool2d(skip, 2)))
        result: torch.Tensor = self.leave(torch.cat([skip, self.up(low)], 1))
        return result


class StackedUNets(nn.Module):
    """U-Nets one after the other, each added to its input."""

    def __init__(self, width: int = 6, depth: int = 2, count: int = 3) -> None:
        super().__init__()
        self.enter, self.head = Unit(3, width), nn.Conv2d(width, 2, 1)
        self.nets = nn.ModuleList(UNet(width, depth) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 3, size, size]. Returns: [batch, 2, size, size]."""
        x = self.enter(x)
        for net in self.nets:
            x = x + net(x)
        result: torch.Tensor = self.head(x)
        return result


class Candidates(nn.Module):
    """Several operators side by side, as on one edge of a supernet's cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        separable = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(width, width, 1))
        self.operators = nn.ModuleList([Unit(width, width), separable, pooled])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, width, size, size]. Returns: the same shape."""
        first, *others = (operator(x) for operator in self.operators)
        return sum(others, first)


class Cell(nn.Module):
    """Two inputs, two nodes, candidates on every edge; the nodes are concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(Candidates(width) for _ in range(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Args: x, y: [batch, width, size, size]. Returns: twice the channels."""
        first = self.edges[0](x) + self.edges[1](y)
        second = self.edges[2](x) + self.edges[3](y) + self.edges[4](first)
        return torch.cat([first, second], 1)


class Supernet(nn.Module):
    """Two cells of candidates; every choice of operators is a network of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.first, self.second = Unit(3, width), Cell(width), Cell(width)
        self.reduce = nn.Conv2d(2 * width, width, 1, bias=False)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 3, size, size]. Returns: [batch, 3]."""
        x = self.stem(x)
        y = self.reduce(self.first(x, x))
        result: torch.Tensor = self.head(self.second(x, y).mean((2, 3)))
        return result
