"""Stacks, dense blocks and samples by sweeps: what layer by layer, token by token, gives."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtrans.errors import ModelError, OptionError
from gtrans.runtime.sampling import gumbel_noise, parallel_generate
from gtrans.runtime.stacks import parallel_dense, parallel_stack

METHODS = ("picard", "jacobi", "jacobi-gs", "gs-jacobi", "gauss-seidel")


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.inner(torch.tanh(self.norm(x)))
        return out


def _gradients(out: torch.Tensor, x: torch.Tensor, modules: Any) -> list[torch.Tensor]:
    weights = list(nn.ModuleList(modules).parameters())
    return list(torch.autograd.grad(out.square().sum(), [x, *weights]))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from(METHODS),
    st.integers(1, 7),
    st.sampled_from(("tied", "alike", "different")),
    st.booleans(),
)
def test_a_stack_is_its_blocks_one_after_another(
    method: str, depth: int, kind: str, frozen: bool
) -> None:
    torch.manual_seed(depth)
    blocks: list[nn.Module] = [Block(4).double() for _ in range(depth)]
    if kind == "tied":
        blocks = [blocks[0]] * depth
    if kind == "different":
        blocks[depth // 2] = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected = x
    for block in blocks:
        expected = block(expected)
    found, solution = parallel_stack(blocks, x, method=method, tolerance=0.0, block=3)
    assert solution.sweeps <= depth or method == "jacobi-gs"  # three in a row count as three
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    exact = _gradients(expected, x, blocks)
    if frozen:
        blocks[0].requires_grad_(False)
        found, _ = parallel_stack(blocks, x, method=method, tolerance=0.0, block=3)
        (only,) = torch.autograd.grad(found.square().sum(), [x])
        torch.testing.assert_close(only, exact[0], rtol=1e-10, atol=1e-10)
    else:
        for a, b in zip(_gradients(found, x, blocks), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_sum_over_branches_settles_long_before_the_depth() -> None:
    torch.manual_seed(0)
    blocks = [Block(8) for _ in range(32)]
    for block in blocks:
        block.inner.weight.data.mul_(0.3)
    x = torch.randn(2, 8)
    _, picard = parallel_stack(blocks, x, method="picard", tolerance=1e-4)
    _, jacobi = parallel_stack(blocks, x, method="jacobi", tolerance=1e-4)
    assert picard.sweeps < 12
    assert jacobi.sweeps == 32


def test_a_dense_block_is_its_layers_one_after_another() -> None:
    torch.manual_seed(0)
    growth, first = 2, 3
    layers = [
        nn.Sequential(nn.ReLU(), nn.Conv2d(first + i * growth, growth, 3, padding=1)).double()
        for i in range(7)
    ]
    x = torch.randn(2, first, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = x
    for layer in layers:
        expected = torch.cat([expected, layer(expected)], 1)
    exact = _gradients(expected, x, layers)
    for method in METHODS:
        found, solution = parallel_dense(layers, x, method=method, tolerance=0.0, block=3)
        assert solution.sweeps <= 7 or method == "jacobi-gs"
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for a, b in zip(_gradients(found, x, layers), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_blocks_that_draw_are_refused() -> None:
    drawing = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)]
    with pytest.raises(ModelError, match="the blocks cannot run side by side"):
        parallel_stack(drawing, torch.randn(2, 4))
    with pytest.raises(OptionError, match="unknown method 'jacoby'; did you mean 'jacobi'"):
        parallel_stack([Block(4)], torch.randn(2, 4), method="jacoby")


class Masked(nn.Module):
    """A MADE: logits of each place from the places before it."""

    def __init__(self, places: int, classes: int) -> None:
        super().__init__()
        self.classes, self.places = classes, places
        self.first = nn.Parameter(torch.randn(places, classes, 24) / 2)
        self.second = nn.Parameter(torch.randn(places, 24, classes))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n = tokens.shape[1]
        hot = nn.functional.one_hot(tokens, self.classes).double()
        x = torch.einsum("bnc,ncw->bnw", hot, self.first.double()[:n])
        before = torch.tanh(torch.cumsum(x, 1) - x)
        return torch.einsum("bnw,nwc->bnc", before, self.second.double()[:n])


class Tiny(nn.Module):
    """A small GPT."""

    def __init__(self, classes: int = 11, width: int = 16) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(classes, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n, dtype=torch.float64)
        x = self.embed(tokens) + self.place(torch.arange(n))
        for layer in self.layers:
            x = layer(x, mask)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("window", [None, 1, 8])
def test_samples_are_those_of_token_by_token(greedy: bool, window: int | None) -> None:
    torch.manual_seed(0)
    noise = None if greedy else gumbel_noise(20, 2, 11)
    cases: list[tuple[nn.Module, bool, torch.Tensor]] = [
        (Tiny().double().eval(), True, torch.randint(11, (2, 3))),
        (Masked(20, 11), False, torch.zeros(2, 0, dtype=torch.long)),
    ]
    for model, shifted, prompt in cases:
        tokens = prompt
        with torch.no_grad():
            for i in range(20):
                full = tokens if shifted else torch.cat([tokens, tokens.new_zeros(2, 1)], 1)
                logits = model(full)[:, -1]
                scores = logits if noise is None else logits + noise[i]
                tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
        found, solution = parallel_generate(
            model, prompt, 20, noise=noise, window=window, shifted=shifted
        )
        assert torch.equal(found, tokens)
        assert solution.sweeps <= 20
        assert (solution.sweeps == 20) == (window == 1)


def test_what_cannot_be_sampled_is_refused() -> None:
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(OptionError, match="the logits of the first token are those of the prompt"):
        parallel_generate(Tiny(), empty, 3)
    with pytest.raises(OptionError, match=r"temperature must be positive, got 0\.0"):
        parallel_generate(Masked(3, 4), empty, 3, shifted=False, temperature=0.0)
