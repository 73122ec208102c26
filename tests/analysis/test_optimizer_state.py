"""The optimizer's state: told before its first step, and part of the peak."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn, optim

import gtrans
from gtrans.analysis.optimizer_state import state_bytes
from gtrans.errors import BudgetError, OptionError
from gtrans.memory import Budget
from gtrans.plan.planner import Plan
from gtrans.why_peak import why_peak

Make = Callable[[Iterable[nn.Parameter]], optim.Optimizer]

MAKERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
}


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def _step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    model(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_told_is_what_there_is_after_a_step(name: str) -> None:
    model = _model()
    optimizer = MAKERS[name](model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    told = state_bytes(optimizer)
    assert not any(
        torch.is_tensor(v) and v.device.type == "meta"
        for state in optimizer.state.values()
        for v in state.values()
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    _step(model, optimizer)
    tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert told == sum(t.nbytes for t in tensors)
    assert state_bytes(optimizer) == told


def test_state_of_parameters_that_come_later_or_are_frozen() -> None:
    model = _model()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    _step(model, optimizer)
    before = state_bytes(optimizer)
    frozen = nn.Parameter(torch.zeros(128), requires_grad=False)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(64)), frozen]})
    assert state_bytes(optimizer) == before + 2 * 64 * 4 + 4  # two moments and a count


def test_an_optimizer_that_cannot_tell() -> None:
    optimizer = optim.LBFGS(_model().parameters())
    with pytest.raises(OptionError, match=r"how much memory LBFGS keeps .*plan\{reserve=1GiB\}"):
        state_bytes(optimizer)


def test_the_state_is_part_of_the_peak_and_of_the_budget() -> None:
    model, x = _model(), torch.randn(256, 32)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    state = state_bytes(optimizer)
    without = gtrans.explain(model, x, memory=0.9)
    limit = without.peak + 1024
    found = gtrans.explain(model, x, memory=limit + state, optimizer=optimizer)
    assert found.peak == without.peak + state
    assert found.plain_peak == without.plain_peak + state
    assert found.reserved_bytes == found.to_dict()["reserved_bytes"] == state
    assert "reserved   32.8 KiB of these, as for the optimizer's state" in str(found)
    assert "32.8 KiB" in str(why_peak(found))
    assert why_peak(found).held_bytes == why_peak(without).held_bytes
    assert why_peak(found).reserved_bytes == state
    lowest = gtrans.explain(model, x, passes=f"plan{{reserve={state}B}}", memory=limit + state)
    assert lowest.reserved_bytes == state
    with pytest.raises(BudgetError, match=r"32\.8 KiB reserved, as for the optimizer's state"):
        gtrans.explain(model, x, memory=int(0.6 * without.peak) + state, optimizer=optimizer)


def test_options() -> None:
    with pytest.raises(OptionError, match=r"reserve must be a number of bytes \('1GiB'\), got 0.5"):
        Plan(reserve=Budget(fraction=0.5))
    model: Any = _model()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(OptionError, match="memory is reserved twice, by optimizer= and by plan"):
        gtrans.optimize(model, passes="plan{reserve=1GiB}", optimizer=optimizer)
    gtrans.optimize(model, optimizer=optimizer, backend="eager")
    model(torch.randn(4, 32)).sum().backward()
    assert gtrans.report(model).reserved_bytes == state_bytes(optimizer)
