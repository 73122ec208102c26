"""The passes over recurrent layers: what they find, refuse, and leave as torch has it."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import gtrans
from gtrans.analysis.recurrence_speed import RecurrenceSize
from gtrans.errors import OptionError
from gtrans.ir.forward import ForwardGraph
from gtrans.passes.rule.hoist_recurrence import HoistRecurrence
from gtrans.pipeline import Pipeline
from gtrans.sweep_plan import plan_sweeps

PASSES = (
    "hoist-recurrence", "highway-recurrence", "cut-carry", "stationary-feedback",
    "parallel-feedforward",
)  # fmt: skip


class Model(nn.Module):
    """A recurrent layer between two products."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layer = layer
        width = layer.proj_size or layer.hidden_size
        self.last = nn.Linear(width * (2 if layer.bidirectional else 1), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.layer(self.first(x))[0]
        return self.last(states)


def _note(model: nn.Module, x: torch.Tensor, passes: str) -> str:
    torch.compiler.reset()
    return str(gtrans.explain(model, x, passes=passes))


@pytest.mark.parametrize("name", PASSES)
def test_each_pass_is_exact_at_its_knob(name: str) -> None:
    options = {
        "hoist-recurrence": "method=scan",
        "highway-recurrence": "iterations=8,only_where_faster=false",
        "cut-carry": "every=9",
        "stationary-feedback": "",
        "parallel-feedforward": "tolerance=0.0,method=newton",
    }[name]
    torch.manual_seed(0)
    model = Model(nn.LSTM(3, 4, num_layers=2, bidirectional=True)).double()
    text = f"{name}{{min_steps=1,{options}}}".replace(",}", "}")
    torch.compiler.reset()
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    found = gtrans.verify(model, x, passes=text)
    worst = max(c.relative for c in found.gradients(torch.float64))
    assert (worst < 1e-9) == (name != "stationary-feedback")


def test_one_pass_sets_the_forward_and_another_the_backward() -> None:
    torch.manual_seed(0)
    model, x = Model(nn.GRU(3, 4)), torch.randn(70, 2, 3)
    text = _note(model, x, "parallel-feedforward,cut-carry,highway-recurrence,highway-recurrence")
    assert text.count("matched 1, rewrote 1") >= 2
    assert "another pass has set how it runs" in text
    again = _note(model, x, "hoist-recurrence,hoist-recurrence")
    assert "it is so already" in again


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LSTM(3, 4, proj_size=2), "it projects its states"),
        (nn.GRU(3, 4, num_layers=2, dropout=0.5), "it drops values between its layers"),
    ],
)
def test_what_the_operator_does_not_compute_is_refused(layer: nn.RNNBase, reason: str) -> None:
    assert reason in _note(Model(layer), torch.randn(9, 2, 3), "hoist-recurrence")
    small = _note(Model(nn.GRU(3, 4)), torch.randn(9, 2, 3), "hoist-recurrence{max_state=7}")
    assert "a state has more elements than max_state" in small
    short = Model(nn.GRU(3, 4))
    assert "fewer steps than min_steps" in _note(short, torch.randn(3, 2, 3), "hoist-recurrence")


BACKWARDS = (
    "hoist-recurrence{min_steps=1,where_fused=true}",
    "hoist-recurrence{min_steps=1,where_fused=true,method=scan}",
    "highway-recurrence{min_steps=1,iterations=2,only_where_faster=false}",
    "cut-carry{min_steps=1,every=3}",
    "stationary-feedback{min_steps=1}",
)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, of the switch below
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(BACKWARDS),
    st.sampled_from((nn.GRU, nn.LSTM, nn.RNN)),
    st.sampled_from((1, 2, 5)),
    st.booleans(),
    st.sampled_from((torch.float32, torch.float64)),
)
def test_a_pass_over_the_backward_leaves_the_forward_to_the_bit(
    passes: str, layer: Any, steps: int, both: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(steps)
    model = Model(layer(3, 4, bidirectional=both)).to(dtype)
    model.first.requires_grad_(False)
    frozen = model.layer.get_parameter("weight_hh_l0").requires_grad_(False)
    x = torch.randn(steps, 2, 3, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=False):  # its LSTM rounds otherwise
        expected = model(x).detach()
    torch.compiler.reset()
    found = gtrans.optimize(model, passes=passes, backend="eager")(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert frozen.grad is None
    assert model.first.weight.grad is None
    assert model.layer.get_parameter("weight_ih_l0").grad is not None


@pytest.mark.parametrize(("swept", "own"), [(2e-3, "fused"), (5e-3, "fused"), (2e-3, "autograd")])
def test_sweeps_are_taken_where_they_are_faster(
    swept: float, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RecurrenceSize] = []

    def measured(size: RecurrenceSize, rules: tuple[Any, ...]) -> tuple[float, ...]:
        asked.append(size)
        assert rules == ((own, 0), ("loop", 0), ("sweeps", 3))
        return 4e-3, 3e-3, swept

    monkeypatch.setattr("gtrans.passes.wire.highway_recurrence.backward_seconds", measured)
    dtype = torch.float32 if own == "fused" else torch.float64
    model, x = Model(nn.LSTM(3, 4, num_layers=2)).to(dtype), torch.randn(20, 2, 3, dtype=dtype)
    torch.compiler.reset()
    found = gtrans.explain(model, x, passes="highway-recurrence{iterations=3}")
    assert asked == [RecurrenceSize("lstm", 20, 2, 4, dtype, "cpu")]
    reason = (
        "an exact backward of this size is faster here: 3 ms by torch's or hoist-recurrence, "
        "5 ms by sweeps"
    )
    assert (reason in str(found)) == (swept == 5e-3)
    assert found.captured[0].forward_steps[0].stats.rewritten == (swept == 2e-3)


def test_packed_sequences_are_refused() -> None:
    def call(x: Any, lengths: Any, hx: Any, weight: Any) -> Any:
        return torch.gru(x, lengths, hx, [weight] * 4, True, 1, 0.0, True, False)

    graph = ForwardGraph(fx.symbolic_trace(call))
    only = HoistRecurrence()
    (site,) = only.sites(graph)
    assert only.refuse(graph, site) == "its sequences are packed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hoist-recurrence{method=guess}", "method"),
        ("hoist-recurrence{min_steps=0}", "min_steps must be at least 1, got 0"),
        ("highway-recurrence{iterations=-1}", "iterations must be at least 0, got -1"),
        ("cut-carry{every=0}", "every must be at least 1, got 0"),
        ("stationary-feedback{feedback=guess}", "feedback"),
        ("stationary-feedback{min_steps=0}", "min_steps must be at least 1, got 0"),
        ("parallel-feedforward{method=guess}", "method"),
        ("parallel-feedforward{tolerance=-1.0}", "tolerance must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Pipeline.parse(text)


@pytest.mark.parametrize("layer", [nn.GRU(3, 4), nn.RNN(3, 4), nn.LSTM(3, 4).double()])
def test_long_layers_are_never_unrolled_unless_a_pass_wants_their_steps(
    layer: nn.RNNBase,
) -> None:
    model = Model(layer).to(next(layer.parameters()).dtype)
    x = torch.randn(40, 2, 3, dtype=model.first.weight.dtype)
    torch.compiler.reset()
    whole = gtrans.explain(model, x).captured[0].rewritten
    torch.compiler.reset()
    unrolled = gtrans.explain(model, x, passes="hoist-recurrent-wgrad").captured[0].rewritten
    torch.compiler.reset()
    short = gtrans.explain(model, x[:5]).captured[0].rewritten
    assert whole is not None
    assert unrolled is not None
    assert short is not None
    target = torch.ops.gtrans.recurrence.default
    assert [len(g.calls(target)) for g in (whole, unrolled, short)] == [1, 0, 0]
    assert len(whole.nodes) < 80 < len(unrolled.nodes)


def test_whole_layers_keep_output_and_gradients() -> None:
    torch.manual_seed(0)
    model = Model(nn.GRU(3, 4, num_layers=2, bidirectional=True))
    torch.compiler.reset()
    gtrans.verify(model, torch.randn(20, 2, 3)).require()


def test_the_planner_of_sweeps_sees_the_steps_of_a_long_layer() -> None:
    torch.compiler.reset()
    plans = plan_sweeps(Model(nn.GRU(3, 4)), torch.randn(20, 2, 3))
    assert [p.depth for p in plans] == [19]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_under_autocast_results_have_the_types_of_torch(kind: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(nn, kind)(4, 8, num_layers=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x)[0]
            return out

    def step(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().mean().backward()
        return out, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.manual_seed(0)
    torch.compiler.reset()
    x, model = torch.randn(20, 3, 4), Layer()
    expected, exact = step(copy.deepcopy(model))
    gtrans.optimize(model, backend="eager", on_error="raise")
    out, found = step(model)
    assert "hoist-recurrence" in str(gtrans.report(model))
    assert out.dtype is expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert torch.cosine_similarity(found, exact, 0) > 0.999
