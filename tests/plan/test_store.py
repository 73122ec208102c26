"""Plans and machines that are kept on disk: found again, never trusted blindly."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.analysis import cost, kept
from gtrans.analysis.cost import (
    DEVICES,
    Measured,
    calibrated_cpu,
    device_named,
    measured_cpu,
)
from gtrans.ir.joint import JointGraph
from gtrans.plan.front import Front

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]
CPU = device_named("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTRANS_CACHE", str(tmp_path))
    return tmp_path


def _joint(build: Build) -> JointGraph:
    model, inputs = build("mlp")
    original = gtrans.explain(model, *inputs, passes="none").captured[0].original
    assert original is not None
    return original.copy()


def test_a_front_is_found_again(build: Build, folder: Path) -> None:
    first = Front(_joint(build), CPU, stored=True)
    (file,) = (folder / "plans").glob("*.json")
    second = Front(_joint(build), CPU, stored=True)
    assert first.left < second.left  # nothing was simulated
    rows = [(c.label, c.peak, c.seconds, c.choice.window) for c in first.best()]
    assert rows == [(c.label, c.peak, c.seconds, c.choice.window) for c in second.best()]
    for a, b in zip(first.best(), second.best(), strict=True):
        assert {n.name for n in a.choice.save} == {n.name for n in b.choice.save}
        assert second.simulate(second.schedule(b)).peak == a.peak
    Front(_joint(build), device_named("h100"), stored=True)
    assert len(list((folder / "plans").iterdir())) == 2
    file.write_text("[{]")
    assert Front(_joint(build), CPU, stored=True).best() != []
    file.write_text(json.dumps([{"label": "", "save": [10**6], "hold": None, "window": 0}]))
    assert len(Front(_joint(build), CPU, stored=True).best()) == len(rows)
    assert len(json.loads(file.read_text())) == len(rows)


def test_another_graph_has_another_key(build: Build, folder: Path) -> None:
    joint = _joint(build)
    Front(joint, CPU, stored=True)
    joint.save_for_backward(joint.calls(torch.ops.aten.addmm.default)[0])
    Front(joint, CPU, stored=True)
    assert len(list((folder / "plans").iterdir())) == 2


def test_nothing_is_kept_where_that_is_not_wanted_or_possible(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GTRANS_CACHE", "off")
    assert kept.folder() is None
    Front(_joint(build), CPU, stored=True)
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("GTRANS_CACHE", str(file))
    kept.save("plans", "a", [])
    assert kept.load("plans", "a") is None
    monkeypatch.delenv("GTRANS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.folder() == tmp_path / "gtrans"


def test_this_machine_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = Measured(measured_cpu().device, True)
    monkeypatch.setattr(cost, "measured_cpu", lambda: steady)
    first = calibrated_cpu()
    assert first.flops_per_s > 1e8
    monkeypatch.setattr(cost, "measured_cpu", lambda: pytest.fail("measured again"))
    assert calibrated_cpu() == first
    monkeypatch.setenv("GTRANS_CACHE", "off")
    assert calibrated_cpu() is DEVICES["cpu"]


def test_a_busy_machine_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Measured(measured_cpu().device, False)
    monkeypatch.setattr(cost, "measured_cpu", lambda: busy)
    assert calibrated_cpu() == busy.device
    assert not (folder / "devices").exists()


class Clock:
    """A second per measurement, and the share of it that this thread gets."""

    def __init__(self, share: float) -> None:
        self.share, self.now = share, 0.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.share * self.now


@pytest.mark.parametrize(("busy", "rounds"), [((), 3), ((1, 2), 4), (range(1, 9), 8)])
def test_rounds_of_a_busy_machine_are_repeated(
    busy: Collection[int], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is busy a kernel takes longer; of all rounds the fastest counts."""
    clock = Clock(1.0)

    def typical(run: Callable[[], object]) -> float:
        clock.now += 1.0
        return 1.0 + 0.5 * clock.now * (clock.now in busy)

    monkeypatch.setattr(cost, "_typical", typical)
    monkeypatch.setattr(cost, "time", clock)
    seconds, steady = cost._fastest(kernel=lambda: None)
    assert clock.now == rounds
    assert steady == (rounds < 8)
    assert seconds == {"kernel": 1.0 if steady else 1.5}


def test_a_thread_that_had_to_wait_was_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.5)

    def typical(run: Callable[[], object]) -> float:
        clock.now += 1.0
        return 1.0

    monkeypatch.setattr(cost, "_typical", typical)
    monkeypatch.setattr(cost, "time", clock)
    assert cost._fastest(kernel=lambda: None) == ({"kernel": 1.0}, False)
