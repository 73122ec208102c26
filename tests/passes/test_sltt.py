"""Spiking networks step by step: what by-hand detaching gives, at any knob, in less memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import gtrans
from gtrans.errors import OptionError
from gtrans.explanation import Explanation
from gtrans.pipeline import Pipeline
from tests.passes.stepping import step_of, step_of_rewritten


class _Surrogate(torch.autograd.Function):
    """A step whose backward is that of an arctangent."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(v)
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        (v,) = ctx.saved_tensors
        return given[0] / (1 + (3 * v) ** 2)


def _function(v: torch.Tensor) -> torch.Tensor:
    spike: torch.Tensor = _Surrogate.apply(v)  # type: ignore[no-untyped-call]
    return spike


def _straight_through(v: torch.Tensor) -> torch.Tensor:
    soft = torch.sigmoid(4 * v)
    return ((v > 0).to(v.dtype) - soft).detach() + soft


class Network(nn.Module):
    """Two convolutions and a product with neurons between, as one writes them.

    Args:
        spike: from a potential above threshold to a spike.
        neuron: "hard" (reset to zero), "soft" (reset by subtraction) or "learned" (leak, too).
        steps: T.
        detached: cut by hand.
        make: whether the first step makes the state, instead of the line before the loop.
        ending: "sum" of outputs, their "mean", or the "last" one; or a loss for "every" step.
    """

    def __init__(
        self, spike: Callable[[torch.Tensor], torch.Tensor], neuron: str = "hard", steps: int = 6,
        every: int = 0, make: bool = False, ending: str = "sum",
    ) -> None:  # fmt: skip
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.Linear(3 * 16, 2)
        self.leak = nn.Parameter(torch.tensor(0.2))
        self.spike, self.neuron, self.steps, self.every = spike, neuron, steps, every
        self.make, self.ending = make, ending

    def fire(self, v: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaked = v + (x - v) * self.leak.sigmoid()
        v = leaked if self.neuron == "learned" else 0.5 * v + x
        s = self.spike(v - 0.2)
        return s, v * (1 - s) if self.neuron == "hard" else v - 0.2 * s.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = b = None if self.make else x.new_zeros(len(x), 3, 4, 4)
        outputs = []
        for t in range(self.steps):
            if self.every and t % self.every == 0 and a is not None and b is not None:
                a, b = a.detach(), b.detach()
            current = self.first(x)
            a = torch.zeros_like(current) if a is None else a
            s, a = self.fire(a, current)
            current = self.second(s)
            b = torch.zeros_like(current) if b is None else b
            s, b = self.fire(b, current)
            outputs.append(self.last(s.flatten(1)))
        if self.ending == "last":
            return outputs[-1]
        if self.ending == "every":
            return torch.stack([o.sin() for o in outputs]).sum(0)
        return (
            sum(outputs[1:], outputs[0]) if self.ending == "sum" else torch.stack(outputs).mean(0)
        )


def _explained(model: nn.Module, x: torch.Tensor, passes: str) -> Explanation:
    torch.compiler.reset()
    return gtrans.explain(model, x, passes=passes)


@settings(max_examples=3)
@example(spike=_function, neuron="hard", steps=6, every=1, make=True, ending="mean")
@example(spike=_straight_through, neuron="learned", steps=7, every=7, make=True, ending="last")
@given(
    spike=st.sampled_from([_function, _straight_through]),
    neuron=st.sampled_from(["hard", "soft", "learned"]),
    steps=st.integers(6, 8),
    every=st.integers(1, 8),
    make=st.booleans(),
    ending=st.sampled_from(["sum", "mean", "last", "every"]),
)
def test_it_is_detaching_by_hand_and_exact_at_all_steps(
    spike: Callable[[torch.Tensor], torch.Tensor], neuron: str, steps: int, every: int,
    make: bool, ending: str,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    by_hand = Network(spike, neuron, steps, every, make, ending).double()
    model = copy.deepcopy(by_hand)
    model.every = 0
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    expected, gradients = step_of(by_hand, x)
    out, found = step_of_rewritten(model, x, f"sltt{{every={every}}}")
    assert torch.equal(out, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_some_of_the_steps_give_the_gradient_of_all_in_the_mean() -> None:
    torch.manual_seed(0)
    model, x = Network(_function).double(), torch.rand(2, 1, 4, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    _, expected = step_of_rewritten(model, x, "sltt")
    torch.compiler.reset()
    gtrans.optimize(twin, passes="sltt{steps=3}", backend="eager", on_error="raise")
    draws = []
    for seed in range(40):
        torch.manual_seed(seed)
        twin.zero_grad(set_to_none=True)
        draws.append({n: g.clone() for n, g in step_of(twin, x)[1].items()})
    assert len({float(d["last.weight"].sum()) for d in draws}) > 5
    for name in ("first.weight", "last.weight"):
        mean, spread = (
            getattr(torch.stack([d[name] for d in draws]), f)(0) for f in ("mean", "std")
        )
        z = (mean - expected[name]) / (spread / len(draws) ** 0.5).clamp(min=1e-12)
        assert float(z.abs().median()) < 2


def test_what_is_kept_does_not_grow_with_the_steps() -> None:
    torch.manual_seed(0)
    x, kept = torch.rand(2, 1, 4, 4), []
    for steps in (8, 16):
        model = Network(_straight_through, steps=steps, ending="last")
        kept.append([_explained(model, x, p).saved_bytes for p in ("plan", "sltt,plan")])
    assert kept[1][0] > 1.6 * kept[0][0]
    # A step or two at the ends stay outside of the operator.
    assert kept[1][1] == kept[0][1] < kept[1][0] / 2


def test_a_loop_that_does_not_spike_says_so() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.zeros_like(x[0])
            for u in x.unbind(0):
                h = self.cell(u, h)
            return h

    found = str(_explained(Cell(), torch.randn(6, 2, 3), "sltt"))
    assert "it compares nothing, so nothing in it spikes" in found
    assert "sltt: matched 0" in str(_explained(nn.Linear(3, 3), torch.randn(6, 3), "sltt"))


def test_random_numbers_between_steps_keep_it_from_running_twice() -> None:
    class Dropping(Network):
        def fire(self, v: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().fire(v, nn.functional.dropout(x, 0.1))

    x = torch.rand(2, 1, 4, 4)
    found = str(_explained(Dropping(_straight_through), x, "sltt"))
    assert "random numbers are drawn between its steps; stepwise=false cuts" in found
    cut = str(_explained(Dropping(_straight_through), x, "sltt{stepwise=false}"))
    assert "sltt{stepwise=false}: matched 1, rewrote 1" in cut


@pytest.mark.parametrize("option", ["every=0", "steps=-1", "min_steps=0"])
def test_options_out_of_range_are_refused(option: str) -> None:
    name = option.split("=")[0]
    with pytest.raises(OptionError, match=f"sltt: {name} must be at least"):
        Pipeline.parse(f"sltt{{{option}}}")
    with pytest.raises(OptionError, match="sltt: steps needs stepwise=true"):
        Pipeline.parse("sltt{steps=2,stepwise=false}")
