"""Any loop as one operator: its results are those of the steps, and every exact rule is exact."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import gtrans
from gtrans.runtime import loop
from gtrans.runtime.loop import LOOP_RULES, rolled_loop

Tensors = list[torch.Tensor]


class _Step(nn.Module):
    """(h, c), (u, weight, index) to (h, c, a further result); c runs past by a gate.

    `gate` detaches what the product reads.
    """

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.gate = gate

    def forward(
        self, h: torch.Tensor, c: torch.Tensor, u: torch.Tensor, weight: torch.Tensor,
        index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        read = h.detach() if self.gate else h
        q = read @ weight + u[index]
        z = q.sigmoid()
        kept = z * c + (1 - z) * q.tanh()
        return kept.tanh() * z, kept, q * 2


def _problem(steps: int, width: int, batch: int) -> tuple[Tensors, Tensors, torch.Tensor]:
    """Starts, the inputs of the steps and the weight."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    starts = [random(batch, width), random(batch, width)]
    return starts, [random(2, batch, width) for _ in range(steps)], random(width, width)


def _by_hand(
    starts: Tensors, inputs: Tensors, weight: torch.Tensor, index: torch.Tensor, every: int = 0
) -> Tensors:
    h, c = starts
    results: Tensors = []
    for t, u in enumerate(inputs):
        if every and t and t % every == 0:
            h, c = h.detach(), c.detach()
        h, c, y = _Step(False)(h, c, u, weight, index)
        results += [h, c, y]
    return results


def _rolled(
    starts: Tensors, inputs: Tensors, weight: torch.Tensor, index: torch.Tensor, **options: object
) -> Sequence[torch.Tensor]:
    call, gate = (fx.symbolic_trace(_Step(g)) for g in (False, True))
    given = [inputs, weight, index]
    return rolled_loop(call, starts, given, len(inputs), gate, **options)  # type: ignore[arg-type]


def _gradients(results: Sequence[torch.Tensor], read: Tensors) -> Sequence[torch.Tensor]:
    loss = sum(((r.sin() * (i + 1)).sum() for i, r in enumerate(results)), torch.zeros(()))
    return torch.autograd.grad(loss, read)


def _compare(options: dict[str, object], steps: int, width: int, batch: int, every: int) -> None:
    starts, inputs, weight = _problem(steps, width, batch)
    read, index = [*starts, *inputs, weight], torch.tensor(1)
    expected = _by_hand(starts, inputs, weight, index, every)
    found = _rolled(starts, inputs, weight, index, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(_gradients(found, read), _gradients(expected, read), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


_SIZES = {
    "steps": st.integers(2, 7),
    "width": st.integers(1, 3),
    "batch": st.integers(1, 2),
}


def test_step_by_step_is_exact() -> None:
    _compare({"rule": "loop"}, 5, 3, 2, 0)


@settings(max_examples=15)
@given(extra=st.integers(0, 2), **_SIZES)
def test_as_many_sweeps_as_steps_are_exact(extra: int, steps: int, width: int, batch: int) -> None:
    _compare({"rule": "sweeps", "count": steps - 1 + extra}, steps, width, batch, 0)


@settings(max_examples=15)
@given(every=st.integers(1, 8), **_SIZES)
def test_cutting_is_detaching(every: int, steps: int, width: int, batch: int) -> None:
    _compare({"rule": "cut", "count": every}, steps, width, batch, every)


@pytest.mark.parametrize("rule", ["feedback", "linspace"])
def test_feedback_is_exact_where_every_jacobian_is_that_diagonal(rule: str) -> None:
    factor = torch.linspace(0, 1, 4, dtype=torch.float64)

    def step(h: torch.Tensor, u: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor]:
        return (a * h + u,)

    module = fx.symbolic_trace(step)
    torch.manual_seed(0)
    start = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    drive = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    h, expected = start, []
    for u in drive:
        h = factor * h + u
        expected.append(h)
    found = rolled_loop(module, [start], [drive, factor], 6, module, rule=rule)
    read = [start, *drive]
    for a, b in zip(_gradients(found, read), _gradients(expected, read), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_rules_are_linear_in_the_cotangent() -> None:
    starts, inputs, weight = _problem(5, 3, 2)
    read, index = [*starts, *inputs, weight], torch.tensor(0)
    for rule in LOOP_RULES:
        found = _rolled(starts, inputs, weight, index, rule=rule, count=1)
        sent = [[torch.randn_like(f) for f in found] for _ in range(2)]
        both = [a - 2 * b for a, b in zip(*sent, strict=True)]
        first, second, sum_ = (
            torch.autograd.grad(found, read, s, retain_graph=True) for s in (*sent, both)
        )
        for a, b, c in zip(first, second, sum_, strict=True):
            torch.testing.assert_close(a - 2 * b, c, rtol=1e-9, atol=1e-9)


class _Unrolled(nn.Module):
    """A loop of four steps, written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.tanh(self.layer(x))
        return x.square().sum()


@pytest.mark.inductor
def test_code_from_a_warm_cache_finds_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[torch.Tensor]:
        torch.compiler.reset()
        torch.manual_seed(0)
        passes = "highway-recurrence{iterations=2,min_steps=1,only_where_faster=false}"
        model = gtrans.optimize(_Unrolled(), passes=passes, on_error="raise")
        model(torch.ones(2, 3)).backward()
        assert gtrans.report(model).captured[0].forward_steps[0].stats.rewritten == 1
        return [p.grad for p in model.parameters() if p.grad is not None]

    with fresh_cache():
        first = gradients()
        monkeypatch.setattr(loop, "_STEPS", {})  # as in another process
        hits = counters["inductor"]["fxgraph_cache_hit"]
        second = gradients()
        assert counters["inductor"]["fxgraph_cache_hit"] > hits
        assert len(loop._STEPS) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
