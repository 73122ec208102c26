"""The recurrent operator against torch's layers: every method, every rule, at its exact point."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtrans.runtime import recurrence
from gtrans.runtime.cells import CELLS
from gtrans.runtime.recurrence import METHODS, Recurrence, recurrent_network
from gtrans.runtime.watch import forget

FEW = settings(max_examples=20, deadline=None, derandomize=True)
KINDS = st.sampled_from(sorted(CELLS))
STEPS = st.sampled_from((1, 2, 7, 12))
LAYERS: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}


def _layer(kind: str, width: int, **options: Any) -> nn.RNNBase:
    torch.manual_seed(width)
    if kind == "rnn_relu":
        options["nonlinearity"] = "relu"
    layer: nn.RNNBase = LAYERS[kind](3, width, **options).double()
    return layer


def _run(layer: nn.RNNBase, kind: str, x: torch.Tensor, hx: Any, **options: Any) -> Any:
    return recurrent_network(
        kind, x, hx, list(layer.parameters()), layer.bias, layer.num_layers, layer.bidirectional,
        layer.batch_first, **options,
    )  # fmt: skip


def _set(layer: nn.RNNBase, hidden: torch.Tensor, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        for name, given in (("weight_hh_l0", hidden), ("weight_ih_l0", inputs)):
            layer.get_parameter(name).copy_(given)


def _start(layer: nn.RNNBase, batch: int) -> Any:
    ways = 2 if layer.bidirectional else 1
    shape = (layer.num_layers * ways, batch, layer.hidden_size)
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if isinstance(layer, nn.LSTM):
        return h, torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return h


def _flat(result: Any) -> list[torch.Tensor]:
    out, last = result[0], result[1:]
    return [out, *(t for part in last for t in (part if isinstance(part, tuple) else (part,)))]


def _gradients(layer: nn.RNNBase, x: torch.Tensor, hx: Any, found: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    loss = sum((t * torch.randn_like(t)).sum() for t in _flat(found))
    starts = hx if isinstance(hx, tuple) else (hx,)
    assert isinstance(loss, torch.Tensor)
    return list(torch.autograd.grad(loss, [x, *starts, *layer.parameters()]))


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(
        float((a - b).detach().abs().max() / (1e-6 + b.detach().abs().max()))
        for a, b in zip(found, exact, strict=True)
    )


@FEW
@given(KINDS, STEPS, st.sampled_from((1, 4)), st.booleans(), st.integers(1, 2), st.booleans())
def test_exact_rules_give_the_gradient_of_torch(
    kind: str, steps: int, width: int, both: bool, layers: int, bias: bool
) -> None:
    layer = _layer(kind, width, bidirectional=both, num_layers=layers, bias=bias, batch_first=both)
    shape = (2, steps, 3) if both else (steps, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = _start(layer, 2)
    expected = layer(x, hx)
    exact = _gradients(layer, x, hx, expected)
    rules: list[dict[str, Any]] = [
        {"rule": "loop"},
        {"rule": "scan"},
        {"rule": "sweeps", "count": steps},
        {"rule": "cut", "count": steps},
    ]
    for options in rules:
        found = _run(layer, kind, x, hx, **options)
        assert _error(_flat(found), _flat(expected)) < 1e-10
        assert _error(_gradients(layer, x, hx, found), exact) < 1e-10, options


@FEW
@given(KINDS, STEPS, st.sampled_from((1.0, 4.0)), st.sampled_from(METHODS))
def test_every_method_ends_in_the_states_of_the_loop(
    kind: str, steps: int, gain: float, method: str
) -> None:
    layer = _layer(kind, 4)
    _set(layer, gain * layer.get_parameter("weight_hh_l0"), layer.get_parameter("weight_ih_l0"))
    x = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = _start(layer, 2)
    expected = layer(x, hx)
    exact = _gradients(layer, x, hx, expected)
    found = _run(layer, kind, x, hx, method=method, block=3)
    assert _error(_flat(found), _flat(expected)) < 1e-10
    assert _error(_gradients(layer, x, hx, found), exact) < 1e-10
    capped = _run(layer, kind, x, hx, method=method, block=3, max_sweeps=1)
    assert _error(_flat(capped), _flat(expected)) < 1e-10


@FEW
@given(KINDS, st.integers(1, 9), st.sampled_from((1, 3, 40)), st.integers(1, 3))
def test_what_goes_past_and_the_rest_are_the_whole_derivative(
    kind: str, steps: int, width: int, batch: int
) -> None:
    cell = CELLS[kind]
    torch.manual_seed(steps)
    like = torch.empty(0, dtype=torch.float64)
    x = like.new_empty(steps, batch, cell.gates * width).normal_()
    weight = like.new_empty(cell.gates * width, width).normal_() / width
    before, w = like.new_empty(2, steps, batch, cell.states * width).normal_()
    before.requires_grad_()
    after = cell.advance(x, before, weight, None)
    (exact,) = torch.autograd.grad(after, before, w)
    found = cell.linearise(x, before.detach(), after.detach(), weight, None)
    assert _error([found.pull(w), found.rest(w) + found.past * w], [exact, exact]) < 1e-12


def test_gates_need_few_sweeps_and_newton_fewer() -> None:
    layer = _layer("gru", 16)
    x = torch.randn(256, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        w_ih, w_hh, b_ih, b_hh = layer.parameters()
        start = torch.zeros(2, 16, dtype=torch.float64)
        chain = Recurrence("gru", x @ w_ih.t() + b_ih, start, w_hh, b_hh)
        sweeps = {m: chain.solve(m, 1e-8, 0, 16).sweeps for m in METHODS}
    assert sweeps["newton"] <= 6
    assert sweeps["newton"] < sweeps["gate"] <= sweeps["quasi-newton"] + 3
    assert sweeps["quasi-newton"] < sweeps["jacobi"] < 100
    assert sweeps["gauss-seidel"] == 256


@FEW
@given(st.sampled_from(("gru", "lstm", "rnn_tanh")), st.integers(1, 5))
def test_a_cut_is_a_detach(kind: str, every: int) -> None:
    layer, steps = _layer(kind, 4), 11
    x = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = _start(layer, 2)
    found = _run(layer, kind, x, hx, rule="cut", count=every)
    state, outputs = hx, []
    for first in range(0, steps, every):
        if first:
            state = tuple(s.detach() for s in state) if kind == "lstm" else state.detach()
        out, state = layer(x[first : first + every], state)
        outputs.append(out)
    expected = (torch.cat(outputs), state)
    exact = _gradients(layer, x, hx, expected)
    assert _error(_gradients(layer, x, hx, found), exact) < 1e-10


def test_feedback_is_exact_where_the_jacobian_is_a_constant_diagonal() -> None:
    """A ReLU that is always on, with a diagonal product: h' = a h + x."""
    layer = _layer("rnn_relu", 3, bias=False)
    _set(layer, torch.diag(torch.tensor([0.0, 0.5, 1.0])), torch.eye(3))
    x = torch.rand(9, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = torch.rand(1, 2, 3, dtype=torch.float64, requires_grad=True)
    exact = _gradients(layer, x, hx, layer(x, hx))
    for rule in ("feedback", "linspace"):
        found = _gradients(layer, x, hx, _run(layer, "rnn_relu", x, hx, rule=rule))
        assert _error(found, exact) < 1e-12


def test_sweeps_come_nearer_and_the_measured_feedback_beats_the_ramp() -> None:
    layer = _layer("gru", 12)
    x = torch.randn(100, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = _start(layer, 2)
    exact = torch.cat([g.flatten() for g in _gradients(layer, x, hx, layer(x, hx))])

    def cosine(**options: Any) -> float:
        parts = _gradients(layer, x, hx, _run(layer, "gru", x, hx, **options))
        return float(torch.cosine_similarity(torch.cat([g.flatten() for g in parts]), exact, 0))

    by_sweeps = [cosine(rule="sweeps", count=k) for k in (0, 1, 3, 10)]
    assert by_sweeps == sorted(by_sweeps)
    assert by_sweeps[-1] > 0.9999
    assert cosine(rule="feedback") > cosine(rule="linspace")


def test_sweeps_that_do_not_settle_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    forget()
    layer = _layer("rnn_relu", 3, bias=False)
    _set(layer, torch.eye(3), torch.eye(3))
    x = torch.rand(20, 1, 3, dtype=torch.float64, requires_grad=True)
    hx = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)
    with caplog.at_level(logging.WARNING, "gtrans"):
        for _ in range(3):
            _gradients(layer, x, hx, _run(layer, "rnn_relu", x, hx, rule="sweeps", count=1))
    assert [r.message.startswith("gtrans: sweep 1 over a recurrence") for r in caplog.records] == [
        True
    ]
    forget()


@pytest.mark.parametrize("kind", LAYERS)
def test_parts_of_a_long_backward_are_those_of_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = _layer(kind, 4), torch.randn(11, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = _start(layer, 2)
    found = []
    for most in (1 << 20, 100):
        monkeypatch.setattr(recurrence, "_ONE_PART", most)
        found.append(_gradients(layer, x, hx, _run(layer, kind, x, hx)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
