"""Laws of erasure on random networks."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import gtrans

STEPS = (
    *("conv", "depthwise", "grouped", "batch-norm", "group-norm", "layer-norm", "relu", "sigmoid"),
    *("tanh", "add", "mul", "cat", "glu", "squeeze-excite", "shuffle", "mlp", "attention"),
    *("residual", "shift"),
)


class Network(nn.Module):
    """A random chain with skips over values [2, channels, 3, 3]; channels are multiples of 4."""

    pattern: torch.Tensor

    def __init__(self, plan: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleDict()
        sizes = [8]
        self.stem = nn.Conv2d(3, 8, 1)
        for number, (kind, pick, width) in enumerate(plan):
            c, other = sizes[-1], sizes[pick % len(sizes)]
            made, out = self._make(kind, c, other, 4 * width)
            for name, layer in made.items():
                self.layers[f"{number}-{name}"] = layer
            sizes.append(out)
        self.sizes = sizes
        self.head = nn.Linear(sizes[-1], 3)
        # A plain mean over positions would undo a norm over them.
        self.register_buffer("pattern", torch.randn(3, 3))

    @staticmethod
    def _make(kind: str, c: int, other: int, width: int) -> tuple[dict[str, nn.Module], int]:
        if kind == "conv":
            return {"a": nn.Conv2d(c, width, 3, padding=1, bias=width > 8)}, width
        if kind == "depthwise":
            return {"a": nn.Conv2d(c, c, 3, padding=1, groups=c)}, c
        if kind == "grouped":
            return {"a": nn.Conv2d(c, width, 1, groups=2)}, width
        if kind in ("batch-norm", "group-norm", "layer-norm"):
            norm = {"b": nn.BatchNorm2d(c), "g": nn.GroupNorm(4, c), "l": nn.LayerNorm(c)}
            return {"a": norm[kind[0]]}, c
        if kind in ("add", "mul"):
            return {"a": nn.Conv2d(other, c, 1)}, c
        if kind == "cat":
            return {}, c + other
        if kind == "glu":
            return {"a": nn.Conv2d(c, 2 * c, 1)}, c
        if kind in ("squeeze-excite", "mlp", "residual"):
            return {"a": nn.Linear(c, width), "b": nn.Linear(width, c)}, c
        if kind == "attention":
            return {"a": nn.Linear(c, 3 * c), "b": nn.Linear(c, c)}, c
        return {}, c

    def forward(self, x: torch.Tensor) -> Any:
        values = [F.relu(self.stem(x))]
        for number, (kind, pick, _) in enumerate(self.plan):
            a, b = (self.layers._modules.get(f"{number}-{k}") for k in "ab")
            values.append(_step(kind, values[-1], values[pick % len(values)], a, b))
        return self.head((values[-1] * self.pattern).sum((2, 3)))


def _step(kind: str, x: torch.Tensor, y: torch.Tensor, a: Any, b: Any) -> Any:
    n, c, h, w = x.shape
    match kind:
        case "conv" | "depthwise" | "grouped" | "batch-norm" | "group-norm":
            return a(x)
        case "layer-norm":
            return a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        case "add":
            return x + a(y)
        case "mul":
            return x * a(y)
        case "cat":
            return torch.cat([x, y], 1)
        case "glu":
            return F.glu(a(x), dim=1)
        case "squeeze-excite":
            return x * torch.sigmoid(b(F.relu(a(x.mean((2, 3))))))[:, :, None, None]
        case "shuffle":
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        case "mlp":
            return b(F.gelu(a(x.flatten(2).transpose(1, 2)))).transpose(1, 2).view(n, -1, h, w)
        case "residual":
            t = x.flatten(2).transpose(1, 2)
            return (t + b(torch.tanh(a(t)))).transpose(1, 2).reshape(n, c, h, w)
        case "attention":
            q, k, v = a(x.flatten(2).transpose(1, 2)).view(n, h * w, 3, 2, -1).unbind(2)
            scores = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(-1)
            mixed = torch.einsum("nhqk,nkhd->nqhd", scores, v).reshape(n, h * w, -1)
            return b(mixed).transpose(1, 2).reshape(n, c, h, w)
        case "shift":
            return F.pad(x, (1, 0, 0, 0))[..., :-1].roll(1, 2)
    unary: dict[str, Any] = {"relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    return unary[kind](x)


NETWORKS = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(1, 3)), min_size=2, max_size=8
)
X = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(3)).double()
SLOW = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@SLOW
@given(network=NETWORKS)
def test_zeros_go_without_a_trace(network: Any, erasure: Any) -> None:
    result = erasure(Network(network), (X,), {})
    assert result.forward <= 1e-9
    assert result.gradient <= 1e-9
    left = result.plan.left(result.selection)
    assert sum(p.numel() for p in result.erased.parameters()) == left["parameters"]


@SLOW
@given(network=NETWORKS)
def test_erasing_nothing_is_the_identity(network: Any) -> None:
    model = Network(network).double().eval()
    plan = gtrans.prune(model, X)
    none = {c.name: torch.zeros(c.size, dtype=torch.bool) for c in plan.classes}
    for form in ("auto", "graph"):
        erased = plan.erase(none, form=form)
        assert torch.equal(erased(X), model(X))
        assert erased.state_dict().keys() == model.state_dict().keys()


@SLOW
@given(network=NETWORKS, seed=st.integers(0, 99))
def test_one_after_the_other_is_both_at_once(network: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = Network(network).double().eval()
    plan = gtrans.prune(model, X)
    classes = [c for c in plan.classes if c.size >= 4]
    order = {c.name: torch.randperm(c.size) for c in classes}
    first = {name: o < 1 for name, o in order.items()}
    both = {name: o < 2 for name, o in order.items()}
    once = plan.erase(both)
    step = plan.erase(first)
    again = gtrans.prune(step, X)
    assert {c.name for c in again.classes} >= order.keys()
    second = {name: both[name][~first[name]] for name in order}
    twice = again.erase(second)
    for (name, p), q in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(p, q), name
    torch.testing.assert_close(once(X), twice(X), rtol=1e-10, atol=1e-12)


@SLOW
@given(network=NETWORKS)
def test_the_contract_is_not_vacuous(network: Any, random_half: Any) -> None:
    torch.manual_seed(0)
    model = Network(network).double().eval()
    plan = gtrans.prune(model, X)
    parameters = dict(model.named_parameters())
    made = [parameters[m.name] for c in plan.exact for m in c.producers]
    assume(made)
    slopes = torch.autograd.grad(model(X).square().sum(), made)
    assume(max(float(s.norm()) for s in slopes) > 1e-6)
    full = plan.erase(random_half(plan))
    assert float((full(X) - model(X)).detach().abs().max()) > 1e-9


def test_a_compiled_erased_model_computes_the_same(random_half: Any) -> None:
    network = [("conv", 0, 2), ("batch-norm", 0, 1), ("residual", 0, 2), ("glu", 0, 1)]
    model = Network(network).double().eval()
    plan = gtrans.prune(model, X)
    for form in ("module", "graph"):
        erased = plan.erase(random_half(plan), form=form)
        compiled = torch.compile(erased, backend="aot_eager")
        torch.testing.assert_close(compiled(X), erased(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_what_is_refused_really_changes(kind: str) -> None:
    """Zero producers are not enough before a sigmoid: the plan says so, and it is true."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return self.b(torch.sigmoid(y) if kind == "sigmoid" else y.softmax(-1))

    torch.manual_seed(0)
    model, x = Gate().double(), torch.randn(2, 4).double()
    plan = gtrans.prune(model, x)
    if kind == "softmax":
        assert not plan.classes
        assert any(f.reason == "softmax" for f in plan.frozen)
        return
    (found,) = plan.classes
    assert not found.exact
    assert "linear" in found.reason
    chosen = {found.name: torch.arange(6) < 3}
    plan.zero(chosen)
    assert float((plan.erase(chosen)(x) - model(x)).detach().abs().max()) > 1e-3
