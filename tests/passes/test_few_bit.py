"""few-bit finds any activation, keeps few bits where that pays, and says where it does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import gtrans
from gtrans.analysis.derivative_tables import Table, nearest_table, samples_of, stochastic_table
from gtrans.analysis.pointwise import Activation, find_activations
from gtrans.captured import Captured
from gtrans.contract import Close, Unbiased
from gtrans.core import Stats
from gtrans.errors import ContractError, OptionError
from gtrans.explanation import Explanation
from gtrans.ir.joint import JointGraph
from gtrans.passes.residual.few_bit import FewBit
from gtrans.pipeline import DEFAULT, Gate, Pipeline
from gtrans.plan.worth import NOTHING_SAVED, Candidate, keep_what_pays, scales
from gtrans.testing import check_pass

Function = Callable[[torch.Tensor], torch.Tensor]


def gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


def own_activation(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x + 0.1 * torch.sin(x), torch.expm1(x))


SMOOTH: dict[str, Function] = {
    "gelu": functional.gelu,
    "gelu by hand": gelu_by_hand,
    "silu": functional.silu,
    "silu by hand": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": functional.mish,
    "mish by hand": lambda x: x * torch.tanh(functional.softplus(x)),
    "softplus": functional.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
    "hardswish": functional.hardswish,
    "with its residual": lambda x: x + functional.gelu(x),
    "one after another": lambda x: torch.tanh(functional.gelu(x)),
    "own": own_activation,
    "through another type": lambda x: x * torch.sigmoid(x.to(torch.float64)).to(x.dtype),
}


class Shifted(nn.Module):
    """act(x + b): the gradient of b is the one at the input of the activation."""

    def __init__(self, act: Function, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.b)


class Feedforward(nn.Module):
    """A low-rank update of a frozen layer, an activation, and a second layer, frozen or not."""

    def __init__(self, act: Function, trainable: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.up.requires_grad_(False)
        self.down.requires_grad_(trainable)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.act(self.up(x) + self.b(self.a(x))))
        return y


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


def explain(model: nn.Module, *inputs: Any, options: str = "", after: str = DEFAULT) -> Explanation:
    text = f"few-bit{{min_numel=1{options}}}," if options is not None else ""
    return gtrans.explain(model, *inputs, passes=f"{text}{after}")


def stats_of(explanation: Explanation) -> Stats:
    (stats,) = [step.stats for _, step in explanation.steps() if step.name == "few-bit"]
    return stats


def activation_of(model: nn.Module, x: torch.Tensor) -> Activation:
    (captured,) = gtrans.explain(model, x, passes="plan").captured
    (activation,) = find_activations(original(captured))
    return activation


def original(captured: Captured) -> JointGraph:
    assert captured.original is not None
    return captured.original


def table_of(model: nn.Module, x: torch.Tensor, bits: int, rounding: str) -> Table:
    samples = samples_of(activation_of(model, x))
    assert samples is not None
    make = nearest_table if rounding == "nearest" else stochastic_table
    return make(samples, bits)


def gradient_and_input(
    model: Shifted, x: torch.Tensor, dy: torch.Tensor, options: str
) -> tuple[torch.Tensor, torch.Tensor]:
    gtrans.optimize(model, passes=f"few-bit{{min_numel=1{options}}}", backend="eager")
    model(x).backward(dy)
    assert stats_of(gtrans.report(model)).rewritten == 1
    gradient = model.b.grad
    assert gradient is not None
    return gradient, (x + model.b).detach()


# ------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("name", SMOOTH)
def test_the_derivative_is_that_of_the_expression_in_the_graph(name: str) -> None:
    activation = activation_of(Feedforward(SMOOTH[name]), torch.randn(4, 8))
    x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(SMOOTH[name](x).sum(), x)
    torch.testing.assert_close(activation.derivative(x.detach()), expected, rtol=1e-12, atol=1e-12)
    assert stats_of(explain(Feedforward(SMOOTH[name]), torch.randn(4, 8))).rewritten == 1


def test_products_are_no_activations() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(x) * self.b(x)
            return y

    assert stats_of(explain(Product(), torch.randn(4, 8))).matched == 0


# -------------------------------------------------------------------------------------- rewriting


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 16), (5, 7), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_is_a_table_lookup_bit_for_bit(
    bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Shifted(functional.gelu, shape, dtype)
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    table = table_of(model, x, bits, "nearest")
    found, at = gradient_and_input(model, x, dy, f",bits={bits},rounding=nearest")
    codes = torch.bucketize(at.float(), torch.tensor(table.thresholds))
    expected = (dy.float() * torch.tensor(table.levels)[codes]).to(dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_stochastic_takes_a_neighbouring_level(bits: int) -> None:
    torch.manual_seed(0)
    shape, dtype = (40, 7), torch.float64
    model = Shifted(functional.silu, shape, dtype)
    x, dy = 3 * torch.randn(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    table = table_of(model, x, bits, "stochastic")
    activation = activation_of(model, x)
    found, at = gradient_and_input(model, x, dy, f",bits={bits}")
    nearest = torch.tensor(table.levels, dtype=dtype)
    assert float((found.unique()[:, None] - nearest).abs().amin(1).max()) < 1e-12
    assert float((found - activation.derivative(at)).abs().max()) <= table.largest


class _Drawn(fx.Interpreter):
    """Runs a graph with a given number for every random one."""

    number = 0.0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Numbers of 24 bits, or of 16 to which half of the last one is added.
        added = {2.0**-24: 0.0, 2.0**-16: 2.0**-17}
        factor = args[1] if target is torch.ops.aten.mul.Tensor else None
        if isinstance(factor, float) and factor in added:
            return torch.full_like(args[0], self.number - added[factor])
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_stochastic_is_unbiased_by_quadrature(bits: int) -> None:
    torch.manual_seed(0)
    shape = (6, 8)
    model = Shifted(gelu_by_hand, shape, torch.float64)
    x, dy = (2 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    (captured,) = explain(model, x, options=f",bits={bits}").captured
    joint = captured.rewritten
    assert joint is not None
    names = [joint.input_of(p).kind for p in joint.primals]
    primals = [model.b.detach() if kind == "parameter" else x for kind in names]
    run, draws = _Drawn(joint.module), 500
    mean = torch.zeros_like(dy)
    for i in range(draws):
        run.number = (i + 0.5) / draws
        gradients = run.run(*primals, dy)[joint.signature.num_forward_outputs :]
        mean += gradients[names.index("parameter")] / draws
    at = (x + model.b).detach().requires_grad_()
    (expected,) = torch.autograd.grad(gelu_by_hand(at), at, dy)
    # The midpoint rule on a step function errs by at most half a cell.
    step = table_of(model, x, bits, "stochastic").largest
    assert bool(((mean - expected).abs() <= (0.5 / draws * step + 1e-12) * dy.abs()).all())


def test_the_forward_keeps_its_bits_and_backward_stays_linear() -> None:
    torch.manual_seed(0)
    model, x = Feedforward(functional.gelu), torch.randn(4, 8)
    check_pass(FewBit(bits=3, rounding="nearest", min_numel=1), model, [x])


def test_a_gradient_that_is_one_number_repeated() -> None:
    torch.manual_seed(0)
    model, x = Shifted(functional.gelu, (3, 8), torch.float32), torch.randn(3, 8)
    table = table_of(model, x, 2, "nearest")
    options = ",bits=2,rounding=nearest"
    found, at = gradient_and_input(model, x, torch.ones(()).expand(3, 8), options)
    codes = torch.bucketize(at, torch.tensor(table.thresholds))
    assert torch.equal(found, torch.tensor(table.levels)[codes])
    assert found.is_contiguous()


def test_half_precision_autocast() -> None:
    torch.manual_seed(0)
    model, x = Feedforward(gelu_by_hand), torch.randn(4, 8)
    gtrans.optimize(model, passes="few-bit{min_numel=1,bits=4,rounding=nearest}", backend="eager")
    plain = Feedforward(gelu_by_hand)
    plain.load_state_dict(model.state_dict())
    gradients = []
    for m in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = m(x).square().sum()
        loss.backward()
        assert m.a.weight.grad is not None
        gradients.append(m.a.weight.grad)
    assert stats_of(gtrans.report(model)).rewritten == 1
    difference = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert 0 < difference < 0.125


# ----------------------------------------------------------------------------------- what it saves


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_saved_bytes_fall_where_the_next_layer_is_frozen(bits: int) -> None:
    model = nn.Sequential(Feedforward(functional.gelu), Feedforward(gelu_by_hand))
    x = torch.randn(4, 8)
    before = gtrans.explain(model, x)
    after = explain(model, x, options=f",bits={bits}")
    elements = 2 * 4 * 16
    assert stats_of(after).rewritten == 2
    assert before.saved_bytes - after.saved_bytes == elements * 4 - elements * bits // 8
    assert any("predicted error of its gradient" in note for note in stats_of(after).notes)


def test_refused_where_the_next_layer_is_trained() -> None:
    model, x = Feedforward(functional.gelu, trainable=True), torch.randn(4, 8)
    after = explain(model, x)
    assert dict(stats_of(after).skipped) == {
        "x stays saved for aten.mm.default; nothing would be saved": 1
    }
    assert after.saved_bytes == gtrans.explain(model, x).saved_bytes
    assert str(after.contract).startswith("exact")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_refused_on_gated_activations(rounding: str) -> None:
    after = explain(Gated(), torch.randn(4, 8), options=f",rounding={rounding}")
    (reason,) = stats_of(after).skipped
    assert reason.startswith("x stays saved for aten.m")
    assert reason.endswith("; nothing would be saved")


def test_only_the_layers_that_pay_are_rewritten() -> None:
    model = nn.Sequential(
        Feedforward(functional.gelu, trainable=True), Feedforward(functional.gelu)
    )
    stats = stats_of(explain(model, torch.randn(4, 8)))
    assert (stats.matched, stats.rewritten, stats.skipped.total()) == (2, 1, 1)


def test_refused_where_its_input_can_be_had_from_what_stays() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)
            self.down.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(functional.gelu(self.norm(self.up(x))))
            return y

    (reason,) = stats_of(explain(Normed(), torch.randn(4, 8))).skipped
    assert reason.startswith("x can be had from what stays saved for aten.native_layer_norm")


def test_all_is_rolled_back_unless_the_planned_bytes_fall() -> None:
    (captured,) = gtrans.explain(
        Feedforward(functional.gelu), torch.randn(4, 8), passes="plan"
    ).captured
    joint = original(captured)
    (activation,) = find_activations(joint)
    candidate = Candidate(
        site=activation.dx,
        value=activation.x,
        bytes=1,
        let_go=scales(activation.dx, activation.dy),
        rewrite=lambda graph, site: None,
    )
    verdict = keep_what_pays(joint, [candidate])
    assert verdict.chosen == []
    assert verdict.refused == {activation.dx: NOTHING_SAVED}
    assert verdict.bytes_after == verdict.bytes_before > 0


# ------------------------------------------------------------------------------------ refusals


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        dx: torch.Tensor = dy.clamp(-1, 1) * x.cos()
        return dx


@pytest.mark.parametrize(
    ("act", "options", "reason"),
    [
        (functional.gelu, ",min_numel=65", "fewer elements than min_numel"),
        (torch.exp, "", "its derivative is not bounded"),
        (lambda x: x * x, "", "its derivative is not bounded"),
        (torch.sqrt, "", "its derivative is not finite between -10 and 10"),
        (functional.relu, "", "piecewise linear: a mask keeps its derivative exactly"),
        (functional.hardtanh, "", "piecewise linear: a mask keeps its derivative exactly"),
        (_Clipped.apply, "", "the gradient is not linear in the incoming one"),
        (
            torch.sin,
            ",rounding=nearest",
            "2 bits cannot follow its derivative as closely as promised",
        ),
        (
            lambda x: functional.gelu(x.t()).sum(0, keepdim=True).expand(16, 4).t(),
            "",
            "the gradient changes its layout here",
        ),
    ],
)
def test_refusals(act: Function, options: str, reason: str) -> None:
    options = options if "min_numel" in options else f",min_numel=1{options}"
    found = gtrans.explain(
        Feedforward(act), torch.rand(4, 8), passes=f"few-bit{{{options[1:]}}},plan"
    )
    assert dict(stats_of(found).skipped) == {reason: 1}


def test_a_gradient_that_is_divided_by_a_size_that_changes() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.last(functional.gelu(self.first(x)))
            return functional.gelu(y).mean(0)

    torch.compiler.reset()
    model = gtrans.optimize(
        Averaged(), passes="few-bit", backend="eager", on_error="raise", dynamic=True
    )
    for rows in (80, 96):
        model(torch.randn(rows, 64)).sum().backward()
    assert "few-bit: matched 2, rewrote 2" in str(gtrans.report(model))


def test_dynamic_shapes_need_a_known_dimension() -> None:
    class Odd(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
            self.down.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(functional.gelu(self.up(x)))
            return y

    reason = "its shape is dynamic and no dimension of known size is a multiple of 8"
    for width, expected in ((7, {reason: 1}), (16, {})):
        x = torch.randn(6, 8)
        torch._dynamo.mark_dynamic(x, 0)
        assert dict(stats_of(explain(Odd(width), x)).skipped) == expected


def test_a_rewrite_that_is_not_permitted_is_left_out() -> None:
    (captured,) = gtrans.explain(
        Feedforward(functional.gelu), torch.randn(4, 8), passes="plan"
    ).captured
    _, (step,) = Pipeline((FewBit(min_numel=1),)).run(original(captured), gate=Gate(()))
    assert step.stats.rewritten == 0
    assert dict(step.stats.skipped) == {"held back by the rewrite limit": 1}


# ------------------------------------------------------------------------- contracts and options


def test_composes_with_the_default_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Feedforward(functional.gelu), nn.LayerNorm(8), nn.ReLU(), Feedforward(functional.mish)
    )
    x = torch.randn(4, 8)
    text = f"few-bit{{min_numel=1,bits=4,rounding=nearest}},bit-masks{{min_numel=1}},{DEFAULT}"
    verified = gtrans.verify(model, x, passes=text).require()
    assert isinstance(verified.contract, Close)
    assert verified.explanation.saved_bytes < gtrans.explain(model, x).saved_bytes


def test_contracts() -> None:
    assert FewBit().contract == Unbiased(noise=frozenset({"few-bit"}))
    assert FewBit(bits=3, rounding="nearest").contract == Close(rtol=0.5)
    assert not any(isinstance(p, FewBit) for p in Pipeline.parse("default").passes)
    with pytest.raises(ContractError, match="pass 'few-bit' is unbiased, weaker than the admitted"):
        gtrans.optimize(Gated(), passes="few-bit,default", allow="close")


def test_the_promise_of_nearest_fits_common_activations() -> None:
    for name in ("gelu", "silu", "mish", "softplus", "tanh", "elu"):
        activation = activation_of(Feedforward(SMOOTH[name]), torch.randn(4, 8))
        samples = samples_of(activation)
        assert samples is not None
        for bits in (1, 2, 3, 4):
            promise = FewBit(bits=bits, rounding="nearest").contract
            assert isinstance(promise, Close)
            for weight in ("uniform", "normal"):
                found = nearest_table(samples, bits, weight).largest
                assert found <= promise.rtol / 2


def test_options() -> None:
    assert str(Pipeline.parse("few-bit{bits=3,rounding=nearest}")) == (
        "few-bit{bits=3,rounding=nearest}"
    )
    with pytest.raises(OptionError, match="few-bit: bits must be 1, 2, 3 or 4, got 5"):
        FewBit(bits=5)
    with pytest.raises(OptionError, match="few-bit: min_numel must be at least 1, got 0"):
        FewBit(min_numel=0)
    with pytest.raises(OptionError, match=r"few-bit\{rounding\}: 'up'"):
        Pipeline.parse("few-bit{rounding=up}")


def test_the_plan_without_recomputation_keeps_only_the_packed_codes() -> None:
    model, x = Feedforward(functional.gelu), torch.randn(4, 8)
    (captured,) = explain(model, x, after="plan{recompute=none}").captured
    kept = {value.shape for value in captured.saved if value.kind == "activation"}
    assert "f32[4, 16]" not in kept


@pytest.mark.inductor
def test_inductor_computes_the_same_as_eager() -> None:
    gradients = []
    for backend in ("inductor", "eager"):
        torch.manual_seed(0)
        model = Feedforward(gelu_by_hand)
        x = torch.randn(4, 8)
        gtrans.optimize(
            model,
            passes="few-bit{min_numel=1,bits=3,rounding=nearest},default",
            backend=backend,
            on_error="raise",
        )
        model(x).sum().backward()
        assert stats_of(gtrans.report(model)).rewritten == 1
        gradients.append(model.a.weight.grad)
    first, second = gradients
    assert first is not None
    torch.testing.assert_close(first, second)


def test_dropout_after_it_draws_the_masks_it_would_draw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Feedforward(functional.gelu), nn.Dropout(0.5), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    expected = []
    for passes in ("plan", "few-bit{min_numel=1},plan"):
        gtrans.optimize(model, passes=passes, backend="eager")
        torch.manual_seed(1)
        expected.append([model(x), model(x)])  # the second call: nothing was drawn in between
    assert stats_of(gtrans.report(model)).rewritten == 1
    assert torch.equal(expected[0][0], expected[1][0])
    assert torch.equal(expected[0][1], expected[1][1])
