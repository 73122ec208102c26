"""to-reversible: residual streams become invertible ones, and compute what is written here."""

import re
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gtrans
from gtrans.contract import Changed, Exact
from gtrans.passes.operator.to_reversible import ALONE, CHANGED, INFERENCE, MADE
from gtrans.pipeline import Pipeline
from gtrans.runtime import streams
from gtrans.testing import Record, Runner

Block = Callable[[torch.Tensor], torch.Tensor]


class Perceptron(nn.Module):
    """Norm, widen, activate, narrow."""

    def __init__(self, width: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), drop
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.down(F.gelu(self.up(self.norm(x)))), self.drop, self.training)


class Residual(nn.Module):
    """Stem, residual blocks, head."""

    def __init__(self, depth: int, width: int = 8, drop: float = 0.0) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Perceptron(width, drop) for _ in range(depth))

    def link(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        return x + block(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.link(x, block)
        return self.head(x)


def two_streams(model: Residual, x: torch.Tensor) -> torch.Tensor:
    a = b = model.stem(x)
    for block in model.blocks:
        a, b = b, a + block(b)
    return model.head((a + b) / 2)


def momentum(model: Residual, x: torch.Tensor) -> torch.Tensor:
    x = model.stem(x)
    v = torch.zeros_like(x)
    for block in model.blocks:
        v = 0.9 * v + 0.1 * block(x)
        x = x + v
    return model.head(x)


def bdia(model: Residual, x: torch.Tensor) -> torch.Tensor:
    before = model.stem(x)
    x = before + model.blocks[0](before)
    for block in model.blocks[1:]:
        g = streams.signs(x) / 2
        before, x = x, g * before + (1 - g) * x + (1 + g) * block(x)
    return model.head(x)


WRITTEN_OUT = {"two-streams": two_streams, "momentum": momentum, "bdia": bdia}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


@pytest.mark.parametrize("kind", ["two-streams", "momentum", "bdia"])
@pytest.mark.parametrize("depth", [2, 5])
def test_it_computes_what_is_written_out(kind: str, depth: int) -> None:
    """In float64; on a grid up to its 40 places."""
    torch.manual_seed(0)
    model, x = Residual(depth).double(), torch.randn(4, 8, dtype=torch.float64)
    bits = 40 if kind == "bdia" else 0
    torch.manual_seed(1)
    expected = WRITTEN_OUT[kind](model, x)
    expected_gradients = gradients(model, expected.square().sum())
    found = Runner(model, (x,), Pipeline.parse(f"to-reversible{{kind={kind},bits={bits}}}"))
    torch.manual_seed(1)
    output = found._call(x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    own = gradients(found.model, output.square().sum())
    for name, value in expected_gradients.items():
        torch.testing.assert_close(own[name], value, rtol=1e-8, atol=1e-8)


def run(
    model: nn.Module, x: torch.Tensor, options: str, dtype: torch.dtype | None = None
) -> tuple[Record, Record, Runner]:
    """One step of the changed forward with everything kept, and one with `reversible`."""
    change = f"to-reversible{{{options}}}"
    kept = Runner(model, (x,), Pipeline.parse(f"{change},plan{{recompute=none}}"), dtype)
    rebuilt = Runner(model, (x,), Pipeline.parse(f"{change},reversible,plan"), dtype)
    return kept.step(), rebuilt.step(), rebuilt


@pytest.mark.parametrize("kind", ["two-streams", "momentum", "bdia"])
@pytest.mark.parametrize("depth", [2, 3, 6])
def test_on_a_grid_the_backward_is_the_same_to_the_bit(kind: str, depth: int) -> None:
    torch.manual_seed(0)
    model, x = Residual(depth, drop=0.2), torch.randn(4, 5, 8)
    kept, rebuilt, runner = run(model, x, f"kind={kind},bits=16")
    for name, value in kept.gradients.items():
        assert value is not None
        found = rebuilt.gradients[name]
        assert found is not None
        assert torch.equal(value, found), name
    (captured,) = runner.captured
    assert captured.contract == Changed(Exact(bitwise=True))
    assert captured.saved_bytes < captured.saved_bytes_before


@pytest.mark.parametrize("kind", ["two-streams", "momentum"])
def test_floating_streams_come_back_up_to_rounding(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Residual(5), torch.randn(4, 5, 8)
    kept, rebuilt, runner = run(model, x, f"kind={kind}", torch.float64)
    for name, value in kept.gradients.items():
        found = rebuilt.gradients[name]
        assert value is not None
        assert found is not None
        assert (found - value).norm() <= 1e-10 * value.norm(), name
    (captured,) = runner.captured
    assert captured.contract == Changed(Exact(bitwise=False))


@pytest.mark.parametrize(
    "options", ["kind=two-streams", "kind=momentum,bits=16", "kind=bdia,bits=9"]
)
def test_what_is_kept_grows_by_remainders_only(options: str) -> None:
    """BDIA leaves a byte an element (`bit-masks` makes it a bit) and a sign a sample."""
    kept = {}
    for depth in (3, 5):
        torch.compiler.reset()
        torch.manual_seed(0)
        _, _, runner = run(Residual(depth), torch.randn(4, 5, 8), options)
        kept[depth] = runner.captured[0].saved_bytes
    assert kept[5] - kept[3] == (2 * (4 * 5 * 8 + 4 * 8) if "bdia" in options else 0)


class Parallel(nn.Module):
    """Attention-like and perceptron branches of one value, both added, and a head in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Perceptron(8) for _ in range(3))
        self.second = nn.ModuleList(Perceptron(8) for _ in range(3))
        self.side = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for i, (f, g) in enumerate(zip(self.first, self.second, strict=True)):
            x = x + f(x) + g(x)
            if i == 1:
                tap = self.side(x)
        return x, tap


def test_parallel_branches_and_taps() -> None:
    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(4, 8)
    kept, rebuilt, runner = run(model, x, "kind=two-streams", torch.float64)
    assert runner.captured[0].forward_steps[0].stats.rewritten == 3
    a = b = x.double()
    double = runner.model
    assert isinstance(double, Parallel)
    for i in range(3):
        a, b = b, a + double.first[i](b) + double.second[i](b)
        if i == 1:
            tap = double.side((a + b) / 2)
    for name, value in (("output 0", (a + b) / 2), ("output 1", tap)):
        found = rebuilt.outputs[name]
        assert found is not None
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    assert kept.gradients.keys() == rebuilt.gradients.keys()


class Coupled(nn.Module):
    """Two streams already."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Perceptron(8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = x, 2 * x
        for block in self.blocks:
            a, b = b, a + block(b)
        return a, b


def test_coupled_streams_are_left_alone() -> None:
    assert stats_of(Coupled(), torch.randn(4, 8), "kind=momentum").rewritten == 0


def stats_of(model: nn.Module, x: torch.Tensor, options: str) -> "gtrans.Stats":
    runner = Runner(model, (x,), Pipeline.parse(f"to-reversible{{{options}}}"))
    runner.step()
    return runner.captured[0].forward_steps[0].stats


class Solver(nn.Module):
    """Midpoint steps: a residual sum within each residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Linear(8, 8)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            middle = y + 0.1 * torch.tanh(self.field(y))
            y = y + 0.2 * torch.tanh(self.field(middle))
        return y


def test_sums_within_streams_that_were_made_are_left_alone() -> None:
    runner = Runner(Solver(), (torch.randn(4, 8),), Pipeline.parse("to-reversible,to-reversible"))
    runner.step()
    first, second = (step.stats for step in runner.captured[0].forward_steps)
    assert first.rewritten == 4
    assert second.rewritten == 0
    assert second.skipped[MADE] > 0


def test_a_single_sum_is_refused() -> None:
    assert stats_of(Residual(1), torch.randn(4, 8), "kind=momentum").skipped == {ALONE: 1}


class PostNorm(Residual):
    """The norm stands behind the sum."""

    def link(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        return F.layer_norm(x + block(x), x.shape[-1:])


@pytest.mark.parametrize("kind", ["two-streams", "momentum", "bdia,bits=16"])
def test_post_norm_has_no_stream(kind: str) -> None:
    stats = stats_of(PostNorm(3), torch.randn(4, 8), f"kind={kind}")
    assert (stats.matched, stats.rewritten) == (3, 0)
    reasons = dict(stats.skipped)
    assert reasons.pop(ALONE) == 1  # the last one: its norm belongs to the head
    assert all(r.startswith(CHANGED) and "(layer_norm at test_to_rev" in r for r in reasons)
    assert sum(reasons.values()) == 2


def test_remainders_that_do_not_fit_are_refused() -> None:
    most = streams.most_links(Fraction(1, 16))
    stats = stats_of(Residual(most + 1, 2), torch.randn(2, 2), "kind=momentum,bits=8,gamma=0.0625")
    (reason,) = stats.skipped
    assert reason.startswith(f"more than {most} links: their remainders do not fit")


def test_bdia_leaves_inference_alone() -> None:
    torch.manual_seed(0)
    model, x = Residual(3), torch.randn(4, 8)
    expected = model(x)
    gtrans.to_reversible(model, "bdia", backend="eager", on_error="raise")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    (skipped,) = gtrans.report(model).captured[0].forward_steps[0].stats.skipped
    assert skipped == INFERENCE
    assert not torch.allclose(model(x), expected)


def test_to_reversible_says_so_and_can_be_undone() -> None:
    torch.manual_seed(0)
    model, x = Residual(3), torch.randn(4, 8)
    expected, keys = model(x), list(model.state_dict())
    assert gtrans.to_reversible(model, backend="eager", on_error="raise") is model
    changed = model(x)
    changed.sum().backward()
    torch.testing.assert_close(changed, two_streams(model, x), rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == keys
    assert "changed forward" in str(gtrans.report(model))
    with pytest.raises(gtrans.errors.ContractError, match="weaker than the admitted 'exact'"):
        gtrans.to_reversible(model, backend="eager", allow="exact")
    torch.testing.assert_close(gtrans.restore(model)(x), expected)


def test_verify_compares_with_the_changed_function() -> None:
    torch.manual_seed(0)
    passes = "to-reversible{kind=momentum},reversible,plan"
    result = gtrans.verify(Residual(4, drop=0.1), torch.randn(4, 8), passes=passes)
    assert result.ok, str(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bits=41", "bits must be between 0 and 40, got 41"),
        ("gamma=1.5", "gamma must be in (0, 1), got 1.5"),
        ("kind=bdia", "bdia halves the stream, which takes a grid to undo; bits=16, say"),
        ("kind=leapfrog", "'leapfrog'; known: bdia, momentum, two-streams"),
    ],
)
def test_bad_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(gtrans.errors.OptionError, match=re.escape(message)):
        Pipeline.parse(f"to-reversible{{{options}}}")


# ---------------------------------------------------------------------- arithmetic

whole_numbers = st.lists(st.integers(-(2**30), 2**30), min_size=1, max_size=6)


@settings(max_examples=50)
@given(whole_numbers, st.integers(1, 30), st.integers(2, 40), st.integers(0, 8))
def test_products_come_back_to_the_bit(
    numbers: list[int], numerator: int, denominator: int, bits: int
) -> None:
    factor = Fraction(min(numerator, denominator - 1), denominator)
    v = torch.tensor(numbers, dtype=torch.float64) * 2.0**-bits
    store = torch.zeros(len(numbers), dtype=torch.int64)
    start, links = v, min(40, streams.most_links(factor))
    given = (factor.numerator, factor.denominator, bits)
    for _ in range(links):
        v, store = streams.scale(v, store, *given)
    assert int(store.min()) >= 0
    for _ in range(links):
        v, store = streams.unscale(v, store, *given)
    assert torch.equal(v, start)
    assert not store.any()


@settings(max_examples=50)
@given(whole_numbers, st.integers(0, 8), st.sampled_from([-1.0, 1.0]))
def test_halves_come_back_to_the_bit(numbers: list[int], bits: int, sign: float) -> None:
    x = torch.tensor(numbers, dtype=torch.float64) * 2.0**-bits
    half, odd = streams.halve(x, torch.tensor(sign, dtype=torch.float64), bits)
    assert torch.equal(half * 2.0**bits, torch.round(half * 2.0**bits))
    assert (half - sign * x / 2).abs().max() <= 0.5 * 2.0**-bits
    assert torch.equal(streams.unhalve(half, odd, torch.tensor(sign), bits), x)


def test_rounding_passes_the_gradient() -> None:
    x = torch.randn(5, requires_grad=True)
    streams.on_grid(x, 4).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(5))
