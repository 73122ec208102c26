"""Saved values on the host: the rewrite, the pool, and the choice of the plan."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gtrans
from gtrans.analysis.cost import DEVICES, Device, node_seconds
from gtrans.analysis.liveness import simulate
from gtrans.analysis.measure import measured_peak
from gtrans.analysis.schedule import schedule_of
from gtrans.errors import BudgetError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan import offloaded
from gtrans.plan.cut import read_directly
from gtrans.plan.offloaded import hidden_trips
from gtrans.plan.realise import realise
from gtrans.rewrite.to_host import send_to_host
from gtrans.runtime.host_memory import ARRIVED, POOL, SENT, TO_DEVICE, TO_HOST

# Slow enough at computing that its host is near.
NEAR = Device("near", 1e9, 1e9, 1e9, 0.0, host_bytes_per_s=1e9)
FAR = replace(NEAR, name="far", host_bytes_per_s=1e6)


class Deep(nn.Module):
    """Tanh after linear layers: each keeps one value of [batch, width]."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, width]. Returns: a scalar."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def _planned(model: nn.Module, *inputs: Any) -> JointGraph:
    original = gtrans.explain(model, *inputs, passes="none").captured[0].original
    assert original is not None
    joint = original.copy()
    realise(joint, read_directly(joint))
    return joint


@pytest.fixture
def deep() -> JointGraph:
    return _planned(Deep(6, 32), torch.randn(64, 32))


def _order(joint: JointGraph, value: Any) -> list[Any]:
    """The four operators of a value's trip, in the order of the graph."""
    calls = {n.target: n for n in joint.nodes if n.target in (TO_HOST, SENT, TO_DEVICE, ARRIVED)}
    (host,) = [u for u in value.users if u.target is TO_HOST]
    (sent,) = [u for u in host.users if u.target is SENT]
    (back,) = [u for u in sent.users if u.target is TO_DEVICE]
    (arrived,) = [u for u in back.users if u.target is ARRIVED]
    assert calls.keys() == {TO_HOST, SENT, TO_DEVICE, ARRIVED}
    return [host, sent, back, arrived]


def test_a_value_leaves_after_its_last_use_and_is_there_before_its_first(deep: JointGraph) -> None:
    before = simulate(schedule_of(deep))
    trips = hidden_trips(deep, NEAR, 1)
    values = [t.value for t in trips]
    assert len(values) >= 3
    used = {v: [u for u in v.users if deep.is_backward(u)] for v in values}
    send_to_host(deep, trips)
    assert deep.cut is not None
    for value in values:
        host, sent, back, arrived = _order(deep, value)
        assert value < host < sent < back < arrived
        assert sent in deep.cut
        assert value not in deep.cut
        early = [u for u in value.users if u.target not in (TO_HOST, SENT)]
        assert all(u < sent for u in early if not ops.is_view(u))
        assert set(arrived.users) == set(used[value])
    after = simulate(schedule_of(deep))
    assert after.peak < before.peak
    moved = sum(tensor_bytes(v.meta["val"]) for v in values)
    assert before.at_boundary - after.at_boundary == moved


def test_copies_have_as_much_time_as_they_take(deep: JointGraph) -> None:
    """Between the start of a copy and the node that needs it, others compute that long."""
    trips = hidden_trips(deep, NEAR, 1)
    values = [t.value for t in trips]
    send_to_host(deep, trips)
    tasks = [t.node for t in schedule_of(deep).tasks]
    place = {n: i for i, n in enumerate(tasks)}

    def computed(start: Any, end: Any) -> float:
        return sum(node_seconds(n, NEAR) for n in tasks[place[start] : place[end]])

    for value in values:
        host, sent, back, arrived = _order(deep, value)
        copy_s = tensor_bytes(value.meta["val"]) / NEAR.host_bytes_per_s
        assert computed(host, sent) >= copy_s * 0.999
        assert computed(back, arrived) >= copy_s * 0.999
        assert computed(sent, back) >= 0


def test_copies_of_one_direction_do_not_overlap(deep: JointGraph) -> None:
    trips = hidden_trips(deep, NEAR, 1)
    total = sum(tensor_bytes(t.value.meta["val"]) for t in trips) / NEAR.host_bytes_per_s
    send_to_host(deep, trips)
    tasks = [t.node for t in schedule_of(deep).tasks]
    first = next(i for i, n in enumerate(tasks) if n.target is TO_DEVICE)
    last = max(i for i, n in enumerate(tasks) if n.target is ARRIVED)
    assert sum(node_seconds(n, NEAR) for n in tasks[first:last]) >= total * 0.999


def test_nothing_goes_where_the_way_is_too_long(deep: JointGraph) -> None:
    assert hidden_trips(deep, FAR, 1) == []
    assert hidden_trips(deep, NEAR, offloaded.LEAST_BYTES) == []  # values of less than a MiB stay
    many = hidden_trips(deep, NEAR, 1)
    assert 0 < len(hidden_trips(deep, NEAR, 1, 0.4)) < len(many)


def _grads(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets small values travel, to a host that is near."""
    monkeypatch.setitem(DEVICES, "near", NEAR)
    monkeypatch.setitem(DEVICES, "far", FAR)
    monkeypatch.setattr(offloaded, "LEAST_BYTES", 1)


def _within_reach(model: nn.Module, x: torch.Tensor) -> int:
    """A budget that copies to the host keep without running anything again."""
    joint = _planned(model, x)
    send_to_host(joint, hidden_trips(joint, NEAR, 1))
    return simulate(schedule_of(joint)).peak + 64


@settings(max_examples=6)
@given(st.integers(3, 7), st.sampled_from([16, 32]), st.integers(32, 96), st.integers(0, 99))
def test_gradients_are_the_same_to_the_bit(depth: int, width: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Deep(depth, width).double(), torch.randn(rows, width, dtype=torch.float64)
    expected = _grads(model, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEVICES, "near", NEAR)
        patch.setattr(offloaded, "LEAST_BYTES", 1)
        budget = _within_reach(model, x)
        gtrans.optimize(model, passes=f"plan{{memory={budget}B,target=near}}", backend="eager")
        found = _grads(model, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.usefixtures("small")
def test_the_plan_sends_what_hides_and_says_so() -> None:
    model, x = Deep(6, 32), torch.randn(64, 32)
    budget = _within_reach(model, x)
    near = gtrans.explain(model, x, passes=f"plan{{memory={budget}B,target=near}}")
    far = gtrans.explain(model, x, passes="plan{memory=0.9,target=far}")
    (_, step), (_, other) = near.steps()[-1], far.steps()[-1]
    notes = " ".join(step.stats.notes)
    assert "wait on the host; their copies hide behind what near computes" in notes
    assert "predicted time x1.00 on near" in notes
    assert "host" not in " ".join(other.stats.notes)
    assert near.peak <= budget
    assert near.saved_bytes < far.saved_bytes_before
    assert any(v.kind == "host" for v in near.values)
    fits = gtrans.explain(model, x, passes="plan{memory=1.0,target=near}")
    assert "wait on the host" not in str(fits)  # nothing is copied that need not be
    with pytest.raises(BudgetError) as refused:
        gtrans.explain(model, x, passes="plan{memory=0.2,target=near}")
    least = int(re.findall(r"\((\d+) bytes", str(refused.value))[0])
    assert least <= budget
    gtrans.explain(model, x, passes=f"plan{{memory={least}B,target=near}}")
    with pytest.raises(BudgetError):  # by running things again alone
        gtrans.explain(model, x, passes=f"plan{{memory={budget}B,target=far}}")


@pytest.mark.usefixtures("small")
def test_the_measured_peak_is_the_simulated_one_and_the_pool_is_filled_once() -> None:
    model, x = Deep(6, 32), torch.randn(256, 32)
    budget = _within_reach(model, x)
    gtrans.optimize(model, passes=f"plan{{memory={budget}B,target=near}}", backend="eager")

    def step() -> None:
        model(x).backward()
        model.zero_grad(set_to_none=True)

    step()
    POOL.release()
    held = POOL.allocated_bytes
    measured = measured_peak(step).bytes
    resident = sum(t.nbytes for t in (*model.parameters(), x))
    assert measured + resident == pytest.approx(gtrans.report(model).peak, rel=0.01)
    assert measured + resident <= budget
    after = POOL.allocated_bytes
    for _ in range(3):
        step()
    assert POOL.allocated_bytes == after
    assert after > 0 or held > 0


@pytest.mark.usefixtures("small")
def test_two_forwards_before_their_backwards_keep_their_own_values() -> None:
    torch.manual_seed(0)
    model, x, y = Deep(5, 16), torch.randn(64, 16), torch.randn(64, 16)
    expected = [_grads(model, v) for v in (x, y)]
    twin = copy.deepcopy(model)
    budget = _within_reach(twin, x)
    gtrans.optimize(twin, passes=f"plan{{memory={budget}B,target=near}}", backend="eager")
    parameters = list(twin.parameters())
    first, second = twin(x), twin(y)
    again = torch.autograd.grad(first, parameters, retain_graph=True)
    found = [torch.autograd.grad(v, parameters) for v in (second, first)]
    assert "wait on the host" in str(gtrans.report(twin))
    for a, b in ((expected[1], found[0]), (expected[0], found[1]), (expected[0], again)):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_piece_is_taken_again_once_nobody_refers_to_it() -> None:
    POOL.release()
    before = POOL.allocated_bytes
    x = torch.randn(7, 5).t()
    host = torch.ops.gtrans.to_host(x)
    assert torch.equal(host, x)
    assert host.stride() == x.stride()
    view = host[1:]
    del host
    other = torch.ops.gtrans.to_host(2 * x)
    assert torch.equal(view, x[1:])  # the view keeps its piece
    assert POOL.allocated_bytes == before + 2 * x.nbytes
    del view, other
    assert torch.equal(torch.ops.gtrans.to_host(x), x)
    assert POOL.allocated_bytes == before + 2 * x.nbytes
    POOL.release()
    assert POOL.allocated_bytes == before


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (2, 1, 5), ()])
def test_operators_by_torchs_own_checks(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(TO_HOST, (x,), test_utils=checks)
    torch.library.opcheck(TO_DEVICE, (x, torch.device("cpu")), test_utils=checks)
    assert torch.equal(torch.ops.gtrans.arrived(torch.ops.gtrans.sent(x, x)), x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_on_cuda(backend: str) -> None:
    """Values, and the allocator's peak, with copies on streams of their own."""
    torch.manual_seed(0)
    model, x = Deep(8, 2048).cuda(), torch.randn(4096, 2048, device="cuda")
    expected = _grads(model, x)

    def step() -> None:
        model(x).backward()
        model.zero_grad(set_to_none=True)

    plain = gtrans.explain(model, x, passes="plan{recompute=none}").peak
    gtrans.optimize(model, passes=f"plan{{memory={int(0.85 * plain)}B}}", backend=backend)
    for _ in range(5):
        found = _grads(model, x)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert "wait on the host" in str(gtrans.report(model))
    before = POOL.allocated_bytes
    peak = measured_peak(step, device="cuda").bytes
    resident = sum(t.nbytes for t in (*model.parameters(), x))
    assert peak + resident <= 0.88 * plain
    assert POOL.allocated_bytes == before


Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]


@pytest.mark.usefixtures("small")
def test_a_transformer(build: Build) -> None:
    model, inputs = build("gpt")
    near = "plan{memory=0.8,target=near}"
    assert gtrans.verify(model, *inputs, passes=near).ok
    assert "wait on the host" in str(gtrans.explain(model, *inputs, passes=near))
