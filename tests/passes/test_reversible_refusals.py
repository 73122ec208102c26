"""Reversible: what is no coupling, and how it says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gtrans.analysis.couplings import ALONE, PLAIN
from gtrans.passes.residual.reversible import UNPROFITABLE
from tests.passes.coupled import Perceptron, Streams, require_same, run, skipped, step_of

pytestmark = pytest.mark.usefixtures("seeded")


class Residual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Perceptron(8) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_refuses_plain_residuals() -> None:
    assert skipped(Residual(3), torch.randn(3, 8)) == {PLAIN: 3}


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(8, 8), Perceptron(8), Perceptron(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.a(x) + self.b(x)


def test_refuses_sums_of_branches() -> None:
    assert skipped(Parallel(), torch.randn(3, 8)) == {ALONE: 1}


class ReadAgain(Streams):
    """The second branch reads the stream it is added to."""

    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        t = branch(streams[0] * streams[1]) if k else branch(streams[1])
        streams[k] = streams[k] + t


def test_refuses_streams_that_are_read_again() -> None:
    reasons = skipped(ReadAgain(4, 1, Perceptron), torch.randn(3, 8))
    assert any(
        "no coupling: the stream is read again by mul (test_reversible_refusals.py:" in r
        for r in reasons
    )


class Jumps(Streams):
    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        streams[k] = streams[k] + branch(F.hardtanh(streams[1 - k]))


def test_refuses_jumps_on_the_stream_itself() -> None:
    model = Jumps(4, 3, Perceptron)
    plain, found, captured = run(model, torch.randn(3, 8))
    require_same(plain, found)
    reasons = step_of(captured).stats.skipped
    assert any(r.startswith("hardtanh compares the stream itself with a number") for r in reasons)


def test_refuses_low_precision() -> None:
    model, x = Streams(4, 2, Perceptron), torch.randn(3, 8)
    _, _, captured = run(model, x, dtype=torch.bfloat16)
    stats = step_of(captured).stats
    assert stats.rewritten == 0
    assert any("precision of the stream (bfloat16) is below float32" in r for r in stats.skipped)


class Mixed(Streams):
    """bfloat16 streams, float32 branches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.stem(x).bfloat16().chunk(2, -1)
        a = a + self.branches[0](b.float())
        b = b + self.branches[1](a.float())
        return self.head(torch.cat([a, b], -1).float())


def test_refuses_streams_less_precise_than_their_branches() -> None:
    _, _, captured = run(Mixed(4, 1, Perceptron), torch.randn(3, 8), dtype=torch.float32)
    reasons = step_of(captured).stats.skipped
    assert "precision of the stream (bfloat16) is below its branches (float32)" in reasons


class Cheap(Streams):
    """Branches that keep nothing but a mask."""

    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        streams[k] = streams[k] + streams[1 - k] * 2


def test_refuses_what_frees_nothing() -> None:
    assert skipped(Cheap(4, 2, Perceptron), torch.randn(3, 8)) == {UNPROFITABLE: 4}


class Ends(nn.Module):
    """A third stream that is updated from the first, then only read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 12)
        self.branches = nn.ModuleList(Perceptron(4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c = self.stem(x).chunk(3, -1)
        c = c + self.branches[0](a)
        a = a + self.branches[1](c)
        a = a + self.branches[2](b)
        b = b + self.branches[3](a)
        return a, b, c


def test_refuses_where_another_stream_ends() -> None:
    plain, found, captured = run(Ends(), torch.randn(3, 8))
    require_same(plain, found)
    reasons = step_of(captured).stats.skipped
    assert any(
        r.startswith("no coupling: another stream ends at test_reversible_refusals.py:")
        for r in reasons
    )


class Buffered(nn.Module):
    """A perceptron behind a running mean that it updates itself."""

    mean: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Perceptron(width)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - self.mean
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.inner(centred)


def test_refuses_branches_that_hang_on_an_overwritten_buffer() -> None:
    reasons = skipped(Streams(4, 2, Buffered), torch.randn(8, 8))
    expected = (
        "no coupling: the branch hangs on sub, which cannot run again (test_reversible_refusals.py:"
    )
    assert any(r.startswith(expected) for r in reasons), reasons
