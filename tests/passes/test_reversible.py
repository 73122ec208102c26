"""Reversible: gradients, memory, and other passes beside it."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import gtrans
from gtrans.capture import Compiler, compiled_call
from gtrans.passes.residual.reversible import Reversible
from gtrans.pipeline import Gate, Pipeline
from gtrans.testing import Runner
from tests.passes.coupled import (
    PIPELINE,
    Attention,
    Branch,
    Dropped,
    NormConv,
    Perceptron,
    Streams,
    in_turn,
    require_all_rewritten,
    require_same,
    run,
)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("splits", [2, 3, 4, 5])
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_every_depth_and_number_of_streams(depth: int, splits: int) -> None:
    model = Streams(4, depth, in_turn(), splits)
    plain, found, captured = run(model, torch.randn(2, 3, 4 * splits))
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


def test_a_budget_is_kept_with_what_is_rebuilt() -> None:
    model, x = Streams(16, 6, Perceptron), torch.randn(256, 32)
    plain = gtrans.explain(model, x, passes="plan{recompute=none}").peak
    rebuilt = gtrans.explain(model, x, passes="reversible,plan").peak
    assert rebuilt < plain / 2
    budget = int(1.05 * rebuilt)
    gtrans.optimize(model, passes="reversible", memory=budget, backend="eager", on_error="raise")
    model(x).square().mean().backward()
    assert gtrans.report(model).peak <= budget
    steps = gtrans.report(model).captured[0].steps
    assert next(s for s in steps if s.name == "reversible").stats.rewritten == 12


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
