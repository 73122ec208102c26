"""The dynamic program over segments, against every assignment; mixtures against the simulation."""

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import gtrans
from gtrans.analysis.cost import device_named
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan.chain import Chain, Numbers, Option
from gtrans.plan.cut import read_directly
from gtrans.plan.front import Front
from gtrans.plan.rebuild import Choice
from gtrans.plan.waists import Waists

ROOM = 1 << 20


class Stack(nn.Module):
    """Four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 16]. Returns: a scalar."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.sum()


def _joint() -> JointGraph:
    original = gtrans.explain(Stack(), torch.randn(64, 16), passes="none").captured[0].original
    assert original is not None
    return original


@pytest.fixture(scope="module")
def chain() -> Chain:
    joint = _joint()
    waists = Waists(joint, read_directly(joint))
    found = Chain(joint, waists, waists.boundaries(4))
    assert found.length == 4
    return found


def _fits(options: list[Option], assignment: tuple[int, ...], extra: list[list[int]]) -> bool:
    held = 0.0
    for i, c in enumerate(assignment):
        if i and assignment[i - 1] != c:
            held += extra[i - 1][assignment[i - 1]]
        held += options[c].kept[i]
        if held + options[c].needed[i] > ROOM:
            return False
    return True


def _seconds(options: list[Option], assignment: Sequence[int], clock: int) -> float:
    return float(sum(options[c].seconds[clock, i] for i, c in enumerate(assignment)))


@settings(max_examples=25)
@given(data=st.data())
def test_no_assignment_is_faster(chain: Chain, data: st.DataObject) -> None:
    sizes = st.integers(0, 16).map(lambda n: n * ROOM / 32.0)  # whole levels: nothing to round
    seconds = st.integers(0, 20).map(float)

    def row(of: st.SearchStrategy[float]) -> Numbers:
        return np.array(data.draw(st.lists(of, min_size=4, max_size=4)))

    saves: list[frozenset[fx.Node]] = [frozenset(), frozenset().union(*chain.crossing)]
    choices = [Choice(data.draw(st.sampled_from(saves))) for _ in range(3)]
    options = [
        Option(
            c, row(sizes), row(sizes), np.array([row(seconds), row(seconds)]),
            chain.crossing_bytes(c),
        )
        for c in choices
    ]  # fmt: skip
    # What crosses a boundary is kept where the option changes: 4 KiB each, four levels of 1 KiB.
    extra = [
        [sum(tensor_bytes(n.meta["val"]) for n in at - o.choice.save) for o in options]
        for at in chain.crossing
    ]
    feasible = [a for a in product(range(3), repeat=4) if _fits(options, a, extra)]
    for clock in (0, 1):
        found = chain.solve(options, ROOM, clock)
        assert (found is not None) == bool(feasible)
        if found is not None:
            assert _fits(options, tuple(found), extra)
            best = min(_seconds(options, a, clock) for a in feasible)
            assert _seconds(options, found, clock) == best


def test_no_room_no_plan(chain: Chain) -> None:
    nothing = Choice(frozenset())
    ones = np.ones(4)
    option = Option(nothing, ones, ones, ones[None], chain.crossing_bytes(nothing))
    assert chain.solve([option], -1.0) is None
    assert chain.solve([option], 2.0) is None


def test_an_option_adds_up_to_its_plan(build: Callable[[str], tuple[nn.Module, Any]]) -> None:
    """Kept bytes, seconds and the peak of a uniform assignment are those of the plan itself."""
    model, inputs = build("gpt")
    joint = gtrans.explain(model, *inputs, passes="none").captured[0].original
    assert joint is not None
    front = Front(joint.copy(), device_named("cpu"))
    chain = Chain(front.joint, front.waists, front.waists.boundaries(6))
    plain, *_, smallest = front.best()
    options = []
    for candidate in (plain, smallest):
        schedule = front.schedule(candidate)
        liveness = front.simulate(schedule)
        option = chain.option(
            candidate.choice, schedule, liveness, [lambda t: float(t.node.target is not None)]
        )
        assert option.kept.sum() == sum(size for _, size in liveness.saved())
        assert option.seconds.sum() == len(schedule.again)
        peak = (np.cumsum(option.kept) + option.needed).max() + liveness.constant_bytes
        assert peak == candidate.peak
        assert front.rebuilder.schedule(chain.mixed([option], [0] * chain.length)) == schedule
        options.append(option)
    half = chain.length // 2
    mixed = chain.mixed(options, [1] * half + [0] * (chain.length - half))
    between = front.rebuilder.schedule(mixed)
    assert between is not None
    assert smallest.peak < front.simulate(between).peak < plain.peak
    assert all(a.seconds < b.seconds for a, b in pairwise(front.best()))
