"""Reversible: rounding of the streams, and values on a jump."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gtrans.contract import Close, Exact
from tests.passes.coupled import Perceptron, Streams, require_all_rewritten, require_same, run

pytestmark = pytest.mark.usefixtures("seeded")


class Rectified(Streams):
    """A stream that starts with exact zeros, read by a ReLU at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.relu(self.stem(x)).chunk(2, -1)
        for i, branch in enumerate(self.branches):
            t = F.relu(branch(F.relu(b)))
            a, b = (b, a + t) if i % 2 else (b, a + F.relu(t))
        return self.head(torch.cat([a, b], -1))


@pytest.mark.parametrize("passes", ["reversible,plan", "relu-mask{min_numel=1},reversible,plan"])
def test_exact_zeros_of_a_relu_stay_zeros(passes: str) -> None:
    model = Rectified(4, 3, lambda width: nn.Linear(width, width))
    plain, found, captured = run(model, torch.randn(64, 8), passes=passes)
    require_same(plain, found)
    require_all_rewritten(captured, 6)


class Autocast(nn.Module):
    """float32 streams, bfloat16 branches."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Streams(8, depth, Perceptron)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            a, b = self.inner.stem(x).float().chunk(2, -1)
            for f, g in zip(self.inner.branches[::2], self.inner.branches[1::2], strict=True):
                a = a + f(b)
                b = b + g(a)
            return self.inner.head(torch.cat([a, b], -1)).float()


def test_autocast_branches() -> None:
    plain, found, captured = run(Autocast(3), torch.randn(16, 16), dtype=torch.float32)
    require_all_rewritten(captured, 6)
    require_same(plain, found, 1e-2)


def test_float32_drift_is_that_of_rounding() -> None:
    plain, found, captured = run(
        Streams(8, 12, Perceptron), torch.randn(16, 16), dtype=torch.float32
    )
    require_all_rewritten(captured, 24)
    require_same(plain, found, 2e-6)
    assert captured.contract == Exact(bitwise=False)


def test_low_precision_streams_are_close() -> None:
    model, x = Streams(16, 6, Perceptron), torch.randn(32, 32)
    passes = "reversible{low_precision=true},plan"
    plain, found, captured = run(model, x, passes=passes, dtype=torch.bfloat16)
    require_all_rewritten(captured, 12)
    require_same(plain, found, 0.1)
    assert isinstance(captured.contract, Close)
