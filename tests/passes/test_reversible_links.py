"""Reversible: what may happen to the streams between two couplings."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.coupled import (
    Attention,
    Branch,
    Dropped,
    NormConv,
    Perceptron,
    Streams,
    require_all_rewritten,
    require_same,
    run,
    step_of,
)

pytestmark = pytest.mark.usefixtures("seeded")


class Copied(Streams):
    """Both streams start as the same value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.stem(x)[..., :4]
        streams = [first, first]
        for i, branch in enumerate(self.branches):
            self.update(streams, i % 2, branch)
        return self.head(torch.cat(streams, -1))


@pytest.mark.parametrize("depth", [1, 3])
def test_streams_that_start_equal(depth: int) -> None:
    plain, found, captured = run(Copied(4, depth, Perceptron), torch.randn(3, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 2 * depth)


@pytest.mark.parametrize(
    ("branch", "shape"), [(Perceptron, (64, 8)), (Attention, (4, 8, 8)), (Dropped, (64, 8))]
)
def test_the_first_branch_of_streams_that_start_equal_is_rebuilt_too(
    branch: Branch, shape: Sequence[int]
) -> None:
    plain, found, captured = run(Copied(4, 2, branch), torch.randn(shape))
    require_same(plain, found)
    inside = [s for s in captured.saved if s.location.module.startswith("branches.")]
    assert all("bernoulli" in s.operator or s.dtype == "bool" for s in inside), inside


LINKS: dict[str, Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]] = {
    "swap": lambda s: [s[1], s[0]],
    "cat and chunk": lambda s: torch.cat(s, -1).chunk(2, -1),
    "cat and slices": lambda s: [torch.cat(s, -1)[..., :4], torch.cat(s, -1)[..., 4:]],
    "other sizes": lambda s: torch.cat([*s[1:], s[0]], -1).flip(-1).split([4, 4], -1),
    "stack and unbind": lambda s: torch.stack(s, 1).flip(1).unbind(1),
    "views": lambda s: [t.view(1, -1, 2, 2).transpose(2, 3).reshape(t.shape) for t in s],
    "roll": lambda s: [t.roll(1, -1) for t in s],
    "shift": lambda s: [t + 0.5 for t in s],
    "negate": lambda s: [-t for t in s],
    "interleave": lambda s: (
        torch.stack(s, -1).transpose(-1, -2).contiguous().view(*s[0].shape[:-1], 8).chunk(2, -1)
    ),
}


class Linked(Streams):
    link = "swap"

    def between(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(LINKS[self.link](streams))


@pytest.mark.parametrize("link", LINKS)
def test_links(link: str) -> None:
    model = Linked(4, 3, Perceptron)
    model.link = link
    plain, found, captured = run(model, torch.randn(3, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 6)


class Shuffled(Streams):
    """Space to depth, depth to space between the rounds."""

    def between(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        return [F.pixel_shuffle(F.pixel_unshuffle(t.transpose(2, 3), 2), 2) for t in streams]


def test_pixel_shuffle_between_blocks() -> None:
    plain, found, captured = run(Shuffled(2, 2, NormConv, dim=1), torch.randn(2, 4, 4, 4))
    require_same(plain, found)
    require_all_rewritten(captured, 4)


class Tapped(Streams):
    """Heads on the streams in the middle of the network."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.side = nn.Linear(4, 3)

    def between(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        self.taps.append(self.side(F.gelu(F.layer_norm(streams[0], [4]))))
        return streams

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.taps: list[torch.Tensor] = []
        return super().forward(x) + sum(self.taps)


def test_taps_read_rebuilt_streams() -> None:
    plain, found, captured = run(Tapped(4, 4, Perceptron), torch.randn(3, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 8)


class Stages(nn.Module):
    """Two runs of couplings with a strided, non-reversible stage in between, as in RevNet."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = Streams(4, depth, NormConv, dim=1)
        self.first.head = nn.Identity()  # type: ignore[assignment]  # declared as a layer
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.second = Streams(6, depth, NormConv, dim=1)
        self.second.stem = nn.Identity()  # type: ignore[assignment]  # declared as a layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.down(torch.relu(x)) + self.shortcut(x)
        return self.second(x)


@pytest.mark.parametrize("depth", [1, 3])
def test_stages_in_between_keep_their_inputs(depth: int) -> None:
    plain, found, captured = run(Stages(depth), torch.randn(2, 8, 6, 6))
    require_same(plain, found)
    require_all_rewritten(captured, 4 * depth)
    (reason,) = step_of(captured).stats.skipped
    assert (
        "no coupling: the stream changes its width or size at test_reversible_links.py:" in reason
    )
