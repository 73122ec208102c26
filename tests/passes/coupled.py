"""Models with coupled streams, and what the tests of `reversible` require of a step."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gtrans.captured import Captured
from gtrans.pipeline import Pipeline, Step
from gtrans.testing import Record, Runner

Branch = Callable[[int], nn.Module]


class Perceptron(nn.Module):
    """Norm, widen, activate, narrow; keeps [*, D]."""

    def __init__(self, width: int, activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(self.norm(x))))


class Attention(nn.Module):
    """Pre-norm attention over [B, T, D] with two heads."""

    def __init__(self, width: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop)
        return self.out(mixed.transpose(1, 2).reshape(b, t, d))


class Dropped(nn.Module):
    """A perceptron with dropout inside and outside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Perceptron(width, lambda x: F.dropout(F.relu(x), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.inner(x), 0.2)


class BatchNormed(nn.Module):
    """A perceptron behind batch norm over the features of [B, T, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(width), Perceptron(width, F.relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))


def in_turn() -> Branch:
    """Makes attention, a perceptron with dropout, one with batch norm, attention, ..."""
    kinds = cycle((Attention, Dropped, BatchNormed))
    return lambda width: next(kinds)(width)


class NormConv(nn.Module):
    """Batch norm, ReLU, convolution, as in RevNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(F.relu(self.first(x)))
        return self.conv2(F.relu(self.second(x)))


class Streams(nn.Module):
    """Stem, couplings over `splits` streams, head.

    Args:
        width: of one stream.
        depth: how often every stream is updated.
        branch: makes a branch.
        splits: number of streams.
        dim: along which the streams lie.
        tied: use one branch for all updates.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        branch: Branch,
        splits: int = 2,
        dim: int = -1,
        tied: bool = False,
    ) -> None:
        super().__init__()
        total = splits * width
        image = dim == 1
        self.stem = nn.Conv2d(total, total, 1) if image else nn.Linear(total, total)
        made = [branch(width) for _ in range(1 if tied else depth * splits)]
        self.branches = nn.ModuleList(made * (depth * splits if tied else 1))
        self.head = nn.Conv2d(total, 3, 1) if image else nn.Linear(total, 3)
        self.splits, self.dim = splits, dim

    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        """Updates stream k from the sum of the others."""
        others = [s for j, s in enumerate(streams) if j != k]
        streams[k] = streams[k] + branch(sum(others[1:], others[0]))

    def between(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """What happens to the streams between two rounds of updates."""
        return streams

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        streams = list(self.stem(x).chunk(self.splits, self.dim))
        for i, branch in enumerate(self.branches):
            self.update(streams, i % self.splits, branch)
            if i % self.splits == self.splits - 1:
                streams = self.between(streams)
        return self.head(torch.cat(streams, self.dim))


PIPELINE = Pipeline.parse("reversible,plan")


def run(
    model: nn.Module,
    *inputs: Any,
    passes: str = "reversible,plan",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Record, Record, Captured]:
    """One step by plain autograd, one through the passes."""
    plain = Runner(model, inputs, None, dtype).step(seed)
    runner = Runner(model, inputs, Pipeline.parse(passes), dtype)
    record = runner.step(seed)
    (captured,) = runner.captured
    return plain, record, captured


def require_same(plain: Record, found: Record, tolerance: float = 1e-10) -> None:
    """Outputs and buffers are equal, gradients up to a relative error."""
    for name, value in (*plain.outputs.items(), *plain.buffers.items()):
        other = {**found.outputs, **found.buffers}[name]
        assert value is not None
        assert other is not None
        torch.testing.assert_close(other, value, rtol=0, atol=0)
    for name, value in plain.gradients.items():
        other = found.gradients[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert (other - value).norm() <= tolerance * value.norm(), name


def step_of(captured: Captured, name: str = "reversible") -> Step:
    return next(s for s in captured.steps if s.name == name)


def require_all_rewritten(captured: Captured, couplings: int) -> None:
    stats = step_of(captured).stats
    assert stats.rewritten == couplings, str(stats)


def skipped(model: nn.Module, *inputs: Any, dtype: torch.dtype = torch.float64) -> dict[str, int]:
    plain, found, captured = run(model, *inputs, dtype=dtype)
    require_same(plain, found)
    stats = step_of(captured).stats
    assert stats.rewritten == 0
    assert stats.matched == stats.skipped.total()
    return dict(stats.skipped)
