"""Reversible: couplings are found in models of many kinds; rebuilt streams give the gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans
from gtrans.analysis.couplings import ALONE, PLAIN
from gtrans.capture import Captured, Compiler, compiled_call
from gtrans.contract import Close, Exact
from gtrans.passes.residual.reversible import UNPROFITABLE, Reversible
from gtrans.pipeline import Gate, Pipeline, Step
from gtrans.testing import Record, Runner

Branch = Callable[[int], nn.Module]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)


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


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_two_streams_at_every_depth(depth: int) -> None:
    plain, found, captured = run(Streams(4, depth, Perceptron), torch.randn(3, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 2 * depth)
    assert step_of(captured).stats.matched == 2 * depth


@pytest.mark.parametrize("splits", [2, 3, 4, 5])
@pytest.mark.parametrize("depth", [1, 3])
def test_more_streams(splits: int, depth: int) -> None:
    model = Streams(4, depth, Perceptron, splits)
    plain, found, captured = run(model, torch.randn(3, 4 * splits))
    require_same(plain, found)
    require_all_rewritten(captured, splits * depth)


@pytest.mark.parametrize(
    ("branch", "shape", "dim"),
    [
        (Attention, (2, 5, 8), -1),
        (Dropped, (3, 8), -1),
        (NormConv, (2, 8, 5, 5), 1),
    ],
)
def test_branches(branch: Branch, shape: Sequence[int], dim: int) -> None:
    model = Streams(4, 3, branch, dim=dim)
    plain, found, captured = run(model, torch.randn(shape))
    require_same(plain, found)
    require_all_rewritten(captured, 6)


def test_attention_with_dropout_keeps_what_was_drawn() -> None:
    model = Streams(4, 2, lambda width: Attention(width, 0.3))
    plain, found, captured = run(model, torch.randn(2, 5, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 4)


def test_running_statistics_move_once_a_step() -> None:
    model = Streams(4, 2, NormConv, dim=1)
    twin = Streams(4, 2, NormConv, dim=1)
    twin.load_state_dict(model.state_dict())
    gtrans.optimize(twin, passes="reversible,plan", backend="eager", on_error="raise")
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for _ in range(10):
        x = torch.randn(4, 8, 5, 5)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    assert gtrans.report(twin).steps()[0][1].stats.rewritten == 4
    for (name, a), (_, b) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)
    assert all(b.item() == 10 for n, b in twin.named_buffers() if n.endswith("num_batches_tracked"))


def test_batch_norm_in_evaluation_mode() -> None:
    plain, found, captured = run(Streams(4, 2, NormConv, dim=1).eval(), torch.randn(2, 8, 5, 5))
    require_same(plain, found)
    require_all_rewritten(captured, 4)


def test_tied_and_frozen_parameters() -> None:
    model = Streams(4, 3, Perceptron, tied=True)
    model.stem.requires_grad_(False)
    plain, found, captured = run(model, torch.randn(3, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 6)


def test_input_gradient() -> None:
    plain, found, _ = run(Streams(4, 2, Perceptron), torch.randn(3, 8, requires_grad=True))
    assert "input 0" in found.gradients
    require_same(plain, found)


class Different(Streams):
    """Differences instead of sums, with factors, the branch written first."""

    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        t = branch(streams[1 - k])
        streams[k] = t - streams[k] if k else torch.sub(streams[k], t, alpha=2)


def test_differences() -> None:
    plain, found, captured = run(Different(4, 3, Perceptron), torch.randn(3, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 6)


class BranchFirst(Streams):
    def update(self, streams: list[torch.Tensor], k: int, branch: nn.Module) -> None:
        streams[k] = branch(streams[1 - k]) + streams[k]


def test_branch_written_first() -> None:
    plain, found, captured = run(BranchFirst(4, 3, Perceptron), torch.randn(3, 8))
    require_same(plain, found)
    require_all_rewritten(captured, 6)


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
        self.first.head = nn.Identity()  # type: ignore[assignment]
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.second = Streams(6, depth, NormConv, dim=1)
        self.second.stem = nn.Identity()  # type: ignore[assignment]

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
    assert "no coupling: the stream changes its width or size at test_reversible.py:" in reason


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


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("branch", "shape", "dim"), [(Perceptron, (64, 16), -1), (Attention, (2, 8, 16), -1)]
)
def test_what_is_kept_does_not_grow_with_depth(
    branch: Branch, shape: Sequence[int], dim: int
) -> None:
    kept = {}
    for depth in (1, 4, 8, 16):
        torch.compiler.reset()
        runner = Runner(Streams(8, depth, branch, dim=dim), (torch.randn(shape),), PIPELINE)
        runner.step()
        (captured,) = runner.captured
        values = [s for s in captured.saved if s.kind not in ("parameter", "buffer")]
        kept[depth] = (captured.saved_bytes, len(values))
        assert captured.saved_bytes_before > depth * captured.saved_bytes / 2
    assert len(set(kept.values())) == 1, kept


PIPELINE = Pipeline.parse("reversible,plan")


def test_batch_norm_keeps_statistics_only() -> None:
    kept = {}
    for depth in (2, 4):
        torch.compiler.reset()
        runner = Runner(Streams(4, depth, NormConv, dim=1), (torch.randn(2, 8, 8, 8),), PIPELINE)
        runner.step()
        kept[depth] = runner.captured[0].saved_bytes
    # Four vectors a norm: torch's backward takes the running statistics too, and ignores them.
    statistics = 4 * 4 * 4 * 2 * 2  # bytes, channels, vectors, norms, branches
    assert kept[4] - kept[2] == 2 * statistics


def peak(model: nn.Module, x: torch.Tensor, passes: str) -> int:
    """Most bytes alive at once during the second step, over what was alive before it."""
    torch.compiler.reset()
    gtrans.optimize(model, passes=passes, backend="eager", on_error="raise")
    model(x).square().mean().backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.zero_()
    with torch.profiler.profile(profile_memory=True) as profile:
        model(x).square().mean().backward()
    alive = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            highest = max(highest, alive)
    return highest


def test_measured_peak_is_flat_in_depth() -> None:
    x = torch.randn(512, 32)
    plain = [peak(Streams(16, depth, Perceptron), x, "plan{recompute=none}") for depth in (4, 12)]
    flat = [peak(Streams(16, depth, Perceptron), x, "reversible,plan") for depth in (4, 12)]
    gradients = 8 * 2 * 2 * 4 * (16 * 32 + 64)  # new gradients of eight more rounds, at most
    assert plain[1] > 2.2 * plain[0]
    assert flat[1] < 1.05 * flat[0] + gradients
    assert flat[1] < plain[1] / 4


# ---------------------------------------------------------------------- together with other passes


@pytest.mark.parametrize(
    "passes",
    [
        "default",
        "relu-mask{min_numel=1},norm-output,dropout-output,reversible,plan",
        "reversible,relu-mask{min_numel=1},norm-output,dropout-output,plan",
        "reversible,bit-masks{min_numel=1},plan{recompute=none}",
        "relu-mask{min_numel=1},reversible,bit-masks{min_numel=1},plan",
        "bit-masks{min_numel=1},reversible,plan",
    ],
)
@pytest.mark.parametrize(
    ("branch", "shape", "dim"), [(Dropped, (8, 16), -1), (NormConv, (2, 16, 4, 4), 1)]
)
def test_with_other_passes(passes: str, branch: Branch, shape: Sequence[int], dim: int) -> None:
    model = Streams(8, 2, branch, dim=dim)
    plain, found, captured = run(model, torch.randn(shape), passes=passes)
    require_same(plain, found)
    if "reversible" in passes:
        require_all_rewritten(captured, 4)
        assert captured.saved_bytes < captured.saved_bytes_before / 2


def test_running_it_twice_changes_nothing() -> None:
    model = Streams(4, 2, Perceptron)
    _, _, once = run(model, torch.randn(3, 8))
    torch.compiler.reset()
    plain, found, twice = run(model, torch.randn(3, 8), passes="reversible,reversible,plan")
    require_same(plain, found)
    assert once.rewritten is not None
    assert twice.rewritten is not None
    assert len(once.rewritten.nodes) == len(twice.rewritten.nodes)


def test_dynamic_batch() -> None:
    model, x = Streams(4, 2, Perceptron), torch.randn(3, 8)
    twin = Streams(4, 2, Perceptron)
    twin.load_state_dict(model.state_dict())
    gtrans.optimize(twin, passes="reversible,plan", backend="eager", dynamic=True, on_error="raise")
    for batch in (3, 6):
        x = torch.randn(batch, 8)
        for m in (model, twin):
            m.zero_grad()
            m(x).square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    assert len(gtrans.report(twin).training) == 1


# ---------------------------------------------------------------------- refusals


def skipped(model: nn.Module, *inputs: Any, dtype: torch.dtype = torch.float64) -> dict[str, int]:
    plain, found, captured = run(model, *inputs, dtype=dtype)
    require_same(plain, found)
    stats = step_of(captured).stats
    assert stats.rewritten == 0
    assert stats.matched == stats.skipped.total()
    return dict(stats.skipped)


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
        "no coupling: the stream is read again by mul (test_reversible.py:" in r for r in reasons
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
        r.startswith("no coupling: another stream ends at test_reversible.py:") for r in reasons
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
    expected = "no coupling: the branch hangs on sub, which cannot run again (test_reversible.py:"
    assert any(r.startswith(expected) for r in reasons), reasons


def test_each_coupling_can_be_held_back() -> None:
    model, x = Streams(4, 2, Perceptron), torch.randn(3, 8)
    plain = Runner(model, (x,), None, torch.float64).step()
    for allowed in ([], [1], [1, 2], [1, 2, 3], [2], [4], [1, 4]):
        torch.compiler.reset()
        twin = Streams(4, 2, Perceptron).double()
        twin.load_state_dict(model.state_dict())
        compiler = Compiler(PIPELINE, "eager", skip_failures=False, gate=Gate(allowed))
        runner = Runner(twin, (x,), None, torch.float64)
        runner._call = compiled_call(runner.model, compiler)
        require_same(plain, runner.step())


def test_a_bad_option_is_refused() -> None:
    with pytest.raises(gtrans.errors.OptionError, match="low_precision"):
        Pipeline.parse("reversible{low_precision=maybe}")
    assert str(Reversible(low_precision=True)) == "reversible{low_precision=true}"


@pytest.mark.inductor
def test_with_inductor() -> None:
    model = Streams(4, 1, Perceptron)
    verification = gtrans.verify(
        model, torch.randn(3, 8), passes="reversible,plan", backend="inductor"
    )
    assert verification.ok, str(verification)
