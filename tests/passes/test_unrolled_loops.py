"""Passes over loops that are written in Python: the exact points, the forward, and refusals."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import gtrans
from tests.passes.stepping import Gradients, step_of, step_of_rewritten


class Loop(nn.Module):
    """A recurrence of some kind between two products, with a loss on all states or the last.

    Args:
        kind: a name of `_KINDS`.
        width: of the state.
        every: steps after which the state is detached by hand; 0 for never.
        taps: whether every state is read, or the last one only.
    """

    def __init__(self, kind: str, width: int, every: int = 0, taps: bool = True) -> None:
        super().__init__()
        self.kind, self.every, self.taps = kind, every, taps
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.cell: nn.Module = {
            "gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell,
        }.get(kind, nn.Linear)(width, width)  # fmt: skip
        self.a = nn.Parameter(torch.rand(width))
        self.b = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drive = self.first(x)
        state = [torch.zeros_like(drive[0])] * (2 if self.kind in ("lstm", "rotation") else 1)
        outputs = []
        for t, u in enumerate(drive.unbind(0)):
            if self.every and t % self.every == 0:
                state = [s.detach() for s in state]
            state = _KINDS[self.kind](self, u, state)
            outputs.append(self.last(state[0]))
        return torch.stack(outputs) if self.taps else outputs[-1]


State = list[torch.Tensor]


def _cell(model: Loop, u: torch.Tensor, state: State) -> State:
    return [model.cell(u, state[0])]


def _lstm(model: Loop, u: torch.Tensor, state: State) -> State:
    h, c = model.cell(u, (state[0], state[1]))
    return [h, c]


def _spiking(model: Loop, u: torch.Tensor, state: State) -> State:
    v = 0.5 * state[0] + model.cell(u)
    soft = torch.sigmoid(4 * (v - 0.5))
    spike = ((v > 0.5).to(v.dtype) - soft).detach() + soft
    return [v * (1 - spike)]


def _linear(model: Loop, u: torch.Tensor, state: State) -> State:
    return [model.a.sigmoid() * state[0] + u]


def _minimal_gru(model: Loop, u: torch.Tensor, state: State) -> State:
    z = model.cell(u).sigmoid()
    return [torch.lerp(state[0], u, z)]


def _independent(model: Loop, u: torch.Tensor, state: State) -> State:
    return [torch.relu(u + model.a * state[0])]


def _rotation(model: Loop, u: torch.Tensor, state: State) -> State:
    (a, b), (c, s) = state, (model.a.cos(), model.b.sin())
    return [c * a - s * b + u, s * a + c * b]


_KINDS: dict[str, Callable[[Loop, torch.Tensor, State], State]] = {
    "gru": _cell, "rnn": _cell, "lstm": _lstm, "spiking": _spiking, "linear": _linear,
    "minimal-gru": _minimal_gru, "independent": _independent, "rotation": _rotation,
}  # fmt: skip
POINTWISE = ("spiking", "linear", "minimal-gru", "independent", "rotation")


def _agree(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@settings(max_examples=6)
@example(kind="lstm", steps=4, every=1, taps=False, frozen=False)
@example(kind="lstm", steps=5, every=2, taps=False, frozen=False)
@given(
    kind=st.sampled_from(sorted(_KINDS)),
    steps=st.integers(4, 8),
    every=st.integers(1, 8),
    taps=st.booleans(),
    frozen=st.booleans(),
)
def test_cutting_a_loop_is_detaching_its_state(
    kind: str, steps: int, every: int, taps: bool, frozen: bool
) -> None:
    torch.manual_seed(0)
    by_hand = Loop(kind, 3, every=every, taps=taps).double()
    by_hand.cell.requires_grad_(not frozen)
    model = copy.deepcopy(by_hand)
    model.every = 0
    x = torch.randn(steps, 2, 3, dtype=torch.float64)
    expected, gradients = step_of(by_hand, x)
    out, found = step_of_rewritten(model, x, f"cut-carry{{every={every}}}")
    assert torch.equal(out, expected)
    _agree(found, gradients)


@settings(max_examples=8)
@given(
    kind=st.sampled_from(POINTWISE),
    steps=st.integers(4, 9),
    width=st.integers(1, 3),
    batch=st.integers(1, 2),
    taps=st.booleans(),
    frozen=st.booleans(),
)
def test_scanning_a_loop_is_exact(
    kind: str, steps: int, width: int, batch: int, taps: bool, frozen: bool
) -> None:
    torch.manual_seed(0)
    model = Loop(kind, width, taps=taps).double()
    model.first.requires_grad_(not frozen)
    x = torch.randn(steps, batch, 3, dtype=torch.float64)
    expected, gradients = step_of(copy.deepcopy(model), x)
    out, found = step_of_rewritten(model, x, "hoist-recurrence{method=scan}")
    assert torch.equal(out, expected)
    _agree(found, gradients)


@settings(max_examples=8)
@given(kind=st.sampled_from(sorted(_KINDS)), steps=st.integers(4, 6), taps=st.booleans())
def test_sweeps_over_a_loop_are_exact_at_its_length(kind: str, steps: int, taps: bool) -> None:
    torch.manual_seed(0)
    model = Loop(kind, 3, taps=taps).double()
    x = torch.randn(steps, 2, 3, dtype=torch.float64)
    expected, gradients = step_of(copy.deepcopy(model), x)
    out, found = step_of_rewritten(model, x, "highway-recurrence{iterations=9,min_steps=2}")
    assert torch.equal(out, expected)
    _agree(found, gradients)


@settings(max_examples=8)
@example(kind="lstm", steps=4, taps=False, how="method=newton", then="")
@example(kind="gru", steps=5, taps=True, how="method=jacobi-gs,block=2", then="highway")
@given(
    kind=st.sampled_from(sorted(_KINDS)),
    steps=st.integers(4, 6),
    taps=st.booleans(),
    how=st.sampled_from(
        ["method=gate", "method=newton", "method=quasi-newton", "method=picard", "method=jacobi",
         "method=jacobi-gs,block=2", "method=gs-jacobi,block=2", "max_sweeps=1"]
    ),
    then=st.sampled_from(["", "highway"]),
)  # fmt: skip
def test_states_found_by_sweeps_are_those_of_the_loop(
    kind: str, steps: int, taps: bool, how: str, then: str
) -> None:
    torch.manual_seed(0)
    model = Loop(kind, 3, taps=taps).double()
    x = torch.randn(steps, 2, 3, dtype=torch.float64)
    expected, gradients = step_of(copy.deepcopy(model), x)
    passes = f"parallel-feedforward{{min_steps=2,tolerance=0.0,{how}}}"
    if then:
        passes += ",highway-recurrence{iterations=9,min_steps=2}"
    out, found = step_of_rewritten(model, x, passes)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    _agree(found, gradients)


class Stack(nn.Module):
    """Blocks one after another, each with weights of its own.

    Args:
        kind: "pre-norm" (a residual stream), "post-norm", or "plain" (no way past a block).
        depth: how many blocks.
    """

    def __init__(self, kind: str, depth: int = 6) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            if self.kind == "pre-norm":
                x = x + block(norm(x))
            else:
                x = norm(x + block(x)) if self.kind == "post-norm" else norm(block(x))
        return x


@settings(max_examples=6)
@example(kind="pre-norm", how="method=picard")
@given(
    kind=st.sampled_from(["pre-norm", "post-norm", "plain"]),
    how=st.sampled_from(
        ["method=gate", "method=picard", "method=jacobi", "method=gs-jacobi,block=2"]
    ),
)
def test_a_stack_of_blocks_with_weights_of_their_own_is_solved(kind: str, how: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(kind).double(), torch.randn(3, 4, dtype=torch.float64)
    passes = f"parallel-feedforward{{min_steps=2,tolerance=0.0,{how}}}"
    expected, gradients = step_of(copy.deepcopy(model), x)
    out, found = step_of_rewritten(model, x, passes)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    _agree(found, gradients)
    assert "matched 1, rewrote 1" in _report(model, x, passes)


def test_blocks_with_weights_of_their_own_are_no_recurrence() -> None:
    torch.manual_seed(0)
    found = _report(Stack("pre-norm"), torch.randn(3, 4), "highway-recurrence{min_steps=2}")
    assert "matched 0" in found


def test_jacobians_of_large_states_are_refused() -> None:
    wide = _report(
        Loop("gru", 200), torch.randn(6, 2, 3), "parallel-feedforward{min_steps=2,method=newton}"
    )
    assert "a state of 400 elements is too large for Jacobians: take method=gate" in wide


def test_a_loop_whose_states_are_set_is_not_set_again() -> None:
    once = "parallel-feedforward{min_steps=2}"
    found = _report(Loop("gru", 3), torch.randn(6, 2, 3), f"{once},{once}")
    assert "it is so already" in found


def test_fewer_sweeps_are_near_and_feedback_points_along_the_gradient() -> None:
    torch.manual_seed(0)
    model, x = Loop("gru", 4).double(), torch.randn(12, 2, 3, dtype=torch.float64)
    _, exact = step_of(copy.deepcopy(model), x)
    joined = torch.cat([exact[n].flatten() for n in exact])
    for passes, least in (
        ("highway-recurrence{iterations=2,min_steps=2}", 0.999),
        ("stationary-feedback{min_steps=2}", 0.9),
    ):
        _, found = step_of_rewritten(model, x, passes)
        given_ = torch.cat([found[n].flatten() for n in exact])
        cosine = float(given_ @ joined / given_.norm() / joined.norm())
        assert cosine > least
        assert "rewrote 1" in _report(model, x, passes)


def _report(model: nn.Module, x: torch.Tensor, passes: str) -> str:
    torch.compiler.reset()
    return str(gtrans.explain(model, x, passes=passes))


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_every_kind_of_loop_is_found(kind: str) -> None:
    text = _report(Loop(kind, 3), torch.randn(6, 2, 3), "cut-carry{every=2}")
    assert "matched 1, rewrote 1" in text
    scanned = _report(Loop(kind, 3), torch.randn(6, 2, 3), "hoist-recurrence{method=scan}")
    assert ("matched 1, rewrote 1" in scanned) == (kind in POINTWISE)


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ("cut-carry{every=6}", "no more steps than every"),
        ("hoist-recurrence", "a loop in Python: hoist-recurrent-wgrad, or method=scan"),
        ("hoist-recurrence{method=scan}", "a step mixes elements"),
        ("parallel-feedforward", "fewer steps than min_steps"),
    ],
)
def test_a_loop_that_stays_says_why(passes: str, reason: str) -> None:
    assert reason in _report(Loop("gru", 3), torch.randn(6, 2, 3), passes)


class Complex(nn.Module):
    """Complex states, by a diagonal or by what is not holomorphic and reads a real state too."""

    def __init__(self, holomorphic: bool) -> None:
        super().__init__()
        self.holomorphic, self.first = holomorphic, nn.Linear(3, 4)
        self.angle, self.decay = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor, outputs = torch.polar(self.decay.sigmoid(), self.angle), []
        r = x.new_zeros(x.shape[1], 4)
        h = torch.complex(r, r)
        for u in self.first(x).unbind(0):
            if self.holomorphic:
                h = factor * h + u
            else:
                h, r = torch.tanh(factor * h.conj() + u * r), 0.5 * r + h.abs()
            outputs.append(h.real + r)
        return torch.stack(outputs)


@settings(max_examples=8)
@given(holomorphic=st.booleans(), steps=st.integers(4, 9))
def test_complex_states(holomorphic: bool, steps: int) -> None:
    torch.manual_seed(0)
    model, x = Complex(holomorphic).double(), torch.randn(steps, 2, 3, dtype=torch.float64) + 1.0
    expected, gradients = step_of(copy.deepcopy(model), x)
    for one in ("ode-adjoint{min_steps=2}", "hoist-recurrence{method=scan,min_steps=2}"):
        assert "matched 1, rewrote 1" in _report(model, x, one)
        out, found = step_of_rewritten(model, x, one)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        _agree(found, gradients)
    for refused in ("parallel-feedforward{min_steps=2}", "highway-recurrence{min_steps=2}"):
        assert "the values that a step hands over are complex" in _report(model, x, refused)


class _Broken(nn.Module):
    """A pointwise loop with something that keeps it unrolled."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first = how, nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, outputs = torch.zeros_like(x[0]), list[torch.Tensor]()
        for t in range(len(x)):
            if self.how == "in place":
                h = (h * 0.5).add_(self.first(x[t]))
            elif self.how == "random":
                h = 0.5 * h + nn.functional.dropout(self.first(x[t]), 0.5)
            elif self.how == "mixing":
                h = h.cumsum(-1) + self.first(x[t])
            else:
                h = (h[:, :1] if t == 0 else h) * self.first(x[t])
                h = h.mean(-1, keepdim=True)
            outputs.append(h)
        return torch.stack(outputs)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("in place", "a step's values are written in place"),
        ("random", "random numbers are drawn between its steps"),
        ("mixing", "a step mixes elements"),
        ("wide", "a step changes the shape of its carry"),
    ],
)
def test_a_loop_that_cannot_be_rolled_up_says_why(how: str, reason: str) -> None:
    text = _report(_Broken(how), torch.randn(6, 2, 3), "hoist-recurrence{method=scan}")
    assert reason in text


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_dropout_that_drops_nothing_draws_nothing(p: float, training: bool) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop = nn.Linear(3, 3), nn.Dropout(p)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(6):
                x = x + self.drop(torch.tanh(self.inner(x)))
            return x

    model, x = Dropping().double().train(training), torch.randn(2, 3, dtype=torch.float64)
    expected, gradients = step_of(copy.deepcopy(model), x)
    passes = "parallel-feedforward{min_steps=2,tolerance=0.0}"
    out, found = step_of_rewritten(model, x, passes)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    _agree(found, gradients)
    assert "matched 1, rewrote 1" in _report(model, x, passes)


def test_cutting_twice_is_cutting_once() -> None:
    torch.manual_seed(0)
    model, x = Loop("gru", 3).double(), torch.randn(9, 2, 3, dtype=torch.float64)
    once = step_of_rewritten(model, x, "cut-carry{every=2}")
    twice = step_of_rewritten(model, x, "cut-carry{every=2},cut-carry{every=2}")
    assert torch.equal(once[0], twice[0])
    _agree(twice[1], once[1])
