"""What `gtrans.analysis.measure` reports is what the allocator did."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional

import gtrans
from gtrans.analysis import measure
from gtrans.errors import OptionError

KIB = 1024


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.norm(functional.gelu(self.up(x))))
        return y


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def storages_seen_by_hooks(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd saves, by torch's own hooks, without parameters and input."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).sum()
    assert loss.requires_grad  # the graph, and with it every storage, lives until here
    return sum(seen.values())


def test_peak_and_timeline_of_known_allocations() -> None:
    def step() -> None:
        with measure.phase("forward"):
            a = torch.empty(100 * KIB, dtype=torch.uint8)
            b = torch.empty(50 * KIB, dtype=torch.uint8)
        with measure.phase("backward"):
            del a
            c = torch.empty(80 * KIB, dtype=torch.uint8)
        del b, c

    peak = measure.measured_peak(step)
    assert peak.bytes == 150 * KIB
    assert [m.bytes // KIB for m in peak.timeline] == [100, 150, 50, 130, 80, 0]
    forward, backward = peak.phases
    assert (forward.name, backward.name) == ("forward", "backward")
    assert 0 <= forward.start_s < forward.end_s <= backward.start_s < backward.end_s
    in_forward = [m for m in peak.timeline if forward.start_s <= m.seconds <= forward.end_s]
    assert len(in_forward) == 2


def test_what_was_there_before_does_not_count() -> None:
    held = [torch.empty(100 * KIB, dtype=torch.uint8)]

    def step() -> None:
        held.clear()
        held.append(torch.empty(10 * KIB, dtype=torch.uint8))

    assert measure.measured_peak(step, warm_up=0).bytes == 10 * KIB


def test_a_step_without_allocations_peaks_at_nothing() -> None:
    assert measure.measured_peak(lambda: None) == measure.Peak(0, (), ())


def test_saved_bytes_of_eager_are_what_hooks_see() -> None:
    model, x = net(), torch.randn(32, 16)
    held = measure.saved_for_backward(lambda: model(x).sum())
    assert held == storages_seen_by_hooks(model, x) + 4  # the loss


def test_saved_bytes_of_gtrans_are_what_it_reports() -> None:
    model, x = net(), torch.randn(32, 16)
    gtrans.optimize(model, backend="eager")
    held = measure.saved_for_backward(lambda: model(x).sum())
    reported = [r for r in gtrans.report(model).saved if r.example.kind == "activation"]
    assert reported
    assert held == sum(r.bytes for r in reported) + 4
    assert held == storages_seen_by_hooks(model, x) + 4


@pytest.mark.inductor
def test_saved_bytes_of_torch_compile_are_what_hooks_see() -> None:
    model, x = net(), torch.randn(32, 16)
    model.compile()
    held = measure.saved_for_backward(lambda: model(x).sum())
    assert held == storages_seen_by_hooks(model, x) + 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_counts_the_same_allocations() -> None:
    def step() -> None:
        a = torch.empty(100 * KIB, dtype=torch.uint8, device="cuda")
        del a

    assert measure.measured_peak(step, device="cuda") == measure.Peak(100 * KIB)
    model, x = net().cuda(), torch.randn(32, 16, device="cuda")
    held = measure.saved_for_backward(lambda: model(x).sum(), device="cuda")
    assert held >= storages_seen_by_hooks(model, x)


def test_other_devices_are_refused() -> None:
    with pytest.raises(OptionError, match="'cpu' and 'cuda', not on 'meta'"):
        measure.measured_peak(lambda: None, device="meta")


def test_rounds_alternate_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = measure.interleaved_seconds(steps, rounds=2, warm_up=1)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_in_pairs() -> None:
    assert measure.paired_ratio([1.0, 20.0, 3.0], [2.0, 10.0, 6.0]) == 0.5
    with pytest.raises(OptionError, match="cannot pair 1 times with 2"):
        measure.paired_ratio([1.0], [1.0, 2.0])


def test_the_profilers_own_lines_are_dropped_and_others_kept(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with measure._without_kineto_chatter():
        os.write(2, b"USDT:profiler_start\nsomething else\n")
    assert capfd.readouterr().err == "something else\n"
    measure.measured_peak(lambda: torch.ones(3))
    assert "USDT" not in capfd.readouterr().err
