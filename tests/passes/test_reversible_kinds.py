"""Reversible: affine couplings, velocities, and steps that only two sums together undo."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gtrans.analysis.couplings import AFFINE
from gtrans.contract import Close, Exact
from tests.passes.coupled import Perceptron, Streams, require_same, run, step_of

pytestmark = pytest.mark.usefixtures("seeded")


FACTORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": lambda s: torch.exp(0.5 * torch.tanh(s)),
    "shifted sigmoid": lambda s: torch.sigmoid(s) + 0.5,
    "scaled sigmoid": lambda s: 2 * torch.sigmoid(s),
}


class Affine(Streams):
    """y = x e(z) + t(z), as in RealNVP."""

    factor = "exp"

    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        scale, shift = branch(streams[1 - k]), branch(2 * streams[1 - k])
        streams[k] = streams[k] * FACTORS[self.factor](scale) + shift


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("depth", [1, 3])
def test_affine_couplings(factor: str, depth: int) -> None:
    model = Affine(4, depth, Perceptron)
    model.factor = factor
    plain, found, captured = run(model, torch.randn(3, 8), passes="reversible{affine=true},plan")
    require_same(plain, found)
    assert isinstance(step_of(captured).contract, Close)
    assert step_of(captured).stats.rewritten == 4 * depth  # sums and products
    assert captured.saved_bytes < captured.saved_bytes_before


def test_affine_couplings_have_to_be_admitted() -> None:
    _, _, captured = run(Affine(4, 2, Perceptron), torch.randn(3, 8))
    assert AFFINE in step_of(captured).stats.skipped
    assert step_of(captured).contract == Exact(bitwise=False)


class Gated(Streams):
    """A factor that may be zero."""

    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        streams[k] = streams[k] * torch.tanh(branch(streams[1 - k])) + branch(streams[1 - k])


def test_factors_that_may_be_zero_are_refused() -> None:
    passes = "reversible{affine=true},plan"
    plain, found, captured = run(Gated(4, 2, Perceptron), torch.randn(3, 8), passes=passes)
    require_same(plain, found)
    reasons = step_of(captured).stats.skipped
    assert any(r.startswith("no coupling: the factor of the stream may be zero") for r in reasons)


class Momentum(nn.Module):
    """v = g v + (1 - g) f(x), x = x + v, written out by hand."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.branches = nn.ModuleList(Perceptron(8) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        v = torch.zeros_like(x)
        for branch in self.branches:
            v = 0.8 * v + 0.2 * branch(x)
            x = x + v
        return self.head(x)


class Leapfrog(Momentum):
    """x' = 2 x - x_before + h^2 f(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x = self.stem(x)
        for branch in self.branches:
            before, x = x, 2 * x - before + 0.01 * branch(x)
        return self.head(x)


class Midpoint(Momentum):
    """x' = x_before + 2 h f(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x = self.stem(x)
        for branch in self.branches:
            before, x = x, before + 0.2 * branch(x)
        return self.head(x)


class Heun(Momentum):
    """Reversible Heun: z is an estimate that only f is taken of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = z = self.stem(x)
        f = self.branches[0](z)
        for branch in self.branches:
            z = 2 * y - z + 0.1 * f
            new = branch(z)
            y, f = y + 0.05 * (f + new), new
        return self.head(y)


@pytest.mark.parametrize("kind", [Momentum, Leapfrog, Midpoint, Heun])
def test_what_is_kept_does_not_grow_with_depth(kind: type[Momentum]) -> None:
    kept = []
    for depth in (4, 6):
        torch.compiler.reset()
        plain, found, captured = run(kind(depth), torch.randn(16, 8))
        require_same(plain, found)
        assert step_of(captured).stats.rewritten >= depth - 1
        kept.append(captured.saved_bytes)
    assert kept[0] == kept[1], kept


class Rescaled(Streams):
    """Elementwise invertible functions between the rounds."""

    def between(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            torch.asinh(1.5 * streams[0]),
            torch.nn.functional.leaky_relu(streams[1] / 2, 0.2),
        ]


def test_elementwise_links() -> None:
    plain, found, captured = run(Rescaled(4, 3, Perceptron), torch.randn(16, 8))
    require_same(plain, found)
    assert step_of(captured).stats.rewritten == 6


class Squashed(Streams):
    def between(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.tanh(s) for s in streams]


def test_functions_that_lose_numbers_end_a_stream() -> None:
    plain, found, captured = run(Squashed(4, 2, Perceptron), torch.randn(16, 8))
    require_same(plain, found)
    assert captured.saved_bytes < captured.saved_bytes_before
