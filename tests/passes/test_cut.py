"""The wire pass `cut` against a model that detaches by itself."""

import copy

import pytest
import torch
from torch import nn

import gtrans
import gtrans.errors
from gtrans.errors import OptionError
from gtrans.ir.joint import JointGraph
from gtrans.rewrite.wires import Tap, feed, taps


class Stack(nn.Module):
    """Three blocks with a residual path around the second, and an auxiliary output of the first."""

    def __init__(self, detach: str = "", skip: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.detach, self.skip = detach, skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 6]. Returns: the same shape."""
        a = self.first(x)
        a = a.detach() if self.detach == "first" else a
        b = self.second(torch.tanh(self.norm(a)))
        b = b.detach() if self.detach == "second" else b
        out: torch.Tensor = self.third(torch.relu(b + a if self.skip else b))
        return out


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a fixed loss; what gets none counts as zero."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return {**found, "x": torch.zeros_like(x) if x.grad is None else x.grad}


@pytest.mark.parametrize("at", ["first", "second"])
@pytest.mark.parametrize("skip", [True, False])
def test_equals_detach_in_the_model(at: str, skip: bool) -> None:
    torch.manual_seed(0)
    model, x = Stack(skip=skip).double(), torch.randn(5, 6, dtype=torch.float64)
    reference = Stack(detach=at, skip=skip).double()
    reference.load_state_dict(model.state_dict())
    ours = gtrans.optimize(copy.deepcopy(model), passes=f"cut{{at={at}}}", backend="eager")
    assert torch.equal(ours(x), model(x))
    expected, actual = gradients(reference, x), gradients(ours, x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-12, msg=name)
    assert any(v.abs().sum() > 0 for v in expected.values())
    steps = [s for _, s in gtrans.report(ours).steps() if s.name == "cut"]
    assert {(s.stats.matched, s.stats.rewritten) for s in steps} == {(1, 1)}


def test_what_only_the_cut_part_read_is_not_kept() -> None:
    model, x = Stack(skip=False), torch.randn(64, 6)
    full = gtrans.explain(model, x, passes="plan")
    cut = gtrans.explain(model, x, passes="cut{at=second},plan")
    assert cut.saved_bytes < full.saved_bytes


def test_a_module_that_does_not_exist_matches_nothing_and_changes_nothing() -> None:
    model, x = Stack(), torch.randn(5, 6)
    explanation = gtrans.explain(model, x, passes="cut{at=fourth}")
    (step,) = [s for _, s in explanation.steps() if s.name == "cut"]
    assert step.stats.matched == 0
    assert "matched 0" in str(explanation)


def test_a_wire_fed_with_itself_changes_nothing() -> None:
    """The law of knob G: feeding the true cotangent is the identity."""
    from dataclasses import dataclass

    from gtrans.passes.wire.cut import Cut

    @dataclass(frozen=True)
    class FeedItself(Cut):
        def rewrite(self, graph: JointGraph, site: torch.fx.Node) -> None:
            (wire,) = [t for t in taps(graph) if t.value is site]
            assert isinstance(wire, Tap)
            assert wire.cotangent is not None
            true = wire.cotangent.args[0]
            assert isinstance(true, torch.fx.Node)
            feed(graph, wire, true)

    model, x = Stack(), torch.randn(5, 6)
    ours = gtrans.optimize(
        copy.deepcopy(model), passes=gtrans.Pipeline((FeedItself("second"),)), backend="eager"
    )
    expected, actual = gradients(model, x), gradients(ours, x)
    assert all(torch.equal(actual[n], v) for n, v in expected.items())
    assert "gtrans.tap" not in str([n.target for n in _nodes(ours)])


def test_a_pattern_cuts_at_every_module_it_fits() -> None:
    model, x = Stack(skip=False), torch.randn(5, 6)
    ours = gtrans.optimize(copy.deepcopy(model), passes="cut{at=*}", backend="eager")
    found = gradients(ours, x)
    trained = {name for name, value in found.items() if value.abs().sum() > 0}
    # The last module's own parameters are above its output, so they get nothing either.
    assert trained == set()


def test_a_frozen_part_has_no_wire_to_cut() -> None:
    model, x = Stack(skip=False), torch.randn(5, 6)
    model.first.requires_grad_(False)
    explanation = gtrans.explain(model, x, passes="cut{at=first}")
    (step,) = [s for _, s in explanation.steps() if s.name == "cut"]
    assert step.stats.skipped == {"no gradient reaches this output": 1}


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(OptionError, match="cut: at must name a module"):
        gtrans.Pipeline.parse("cut{at=}")


def test_it_is_not_admitted_as_exact() -> None:
    with pytest.raises(gtrans.errors.ContractError, match="pass 'cut' is local, weaker"):
        gtrans.optimize(Stack(), passes="cut{at=first}", allow="exact")


def _nodes(model: nn.Module) -> list[torch.fx.Node]:
    return [
        n
        for c in gtrans.report(model).captured
        if c.rewritten is not None
        for n in c.rewritten.nodes
    ]
