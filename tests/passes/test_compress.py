"""compress keeps codes where the gradient stays unbiased, and says where it would not."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import gtrans
from gtrans.contract import Aligned, Close, Unbiased
from gtrans.core import Stats
from gtrans.errors import OptionError
from gtrans.explanation import Explanation
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.passes.residual.compress import Compress
from gtrans.pipeline import SAVED_ANYWAY, Gate, Pipeline
from gtrans.rewrite import coded_slices, coded_values
from gtrans.rewrite.late import splice_late
from gtrans.runtime.quantise import Grid
from gtrans.testing import check_pass
from gtrans.verification import training_step


class Perceptron(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(self.act(self.up(self.norm(x))))
        return y


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(2, 8, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.o(y.transpose(1, 2).reshape(2, 8, 16))
        return out


class Softmax(Attention):
    """Attention written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(2, 8, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: torch.Tensor = self.o(y.transpose(1, 2).reshape(2, 8, 16))
        return out


class Fused(nn.Module):
    """Queries, keys and values as one product."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 8, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.o(y.transpose(1, 2).reshape(2, 8, 16))
        return out


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm(self.enter(x)))
        return functional.relu(self.last(self.inner(y)) + y)


class Afterwards(nn.Module):
    """Batch norms behind ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](functional.relu(self.enter(x)))
        out: torch.Tensor = self.norms[1](functional.relu(self.inner(y)))
        return out


class Flattened(nn.Module):
    """Norms that read values through views: of other dimensions, and permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(x)
        x = x + self.b(self.first(x.view(-1, 16))).view_as(x)
        y: torch.Tensor = self.c(self.second(x.transpose(0, 1)))
        return y


def tokens() -> torch.Tensor:
    return torch.randn(2, 8, 16)


CASES: dict[str, tuple[nn.Module, torch.Tensor, int]] = {
    "gelu": (nn.Sequential(Perceptron(functional.gelu), Perceptron(torch.tanh)), tokens(), 5),
    "relu": (nn.Sequential(Perceptron(torch.relu), Perceptron(torch.relu)), tokens(), 3),
    "gated": (nn.Sequential(Gated(), Gated()), tokens(), 9),
    "attention": (nn.Sequential(Attention(), Attention()), tokens(), 5),
    "softmax": (nn.Sequential(Softmax(), Softmax()), tokens(), 10),
    "fused": (nn.Sequential(Fused(), Fused()), tokens(), 5),
    "images": (Residual(), torch.randn(2, 3, 16, 16), 3),
    "views": (nn.Sequential(Flattened(), Flattened()), tokens(), 3),
    "norms behind": (Afterwards(), torch.randn(2, 3, 16, 16), 1),
}
SMALL = "min_numel=1,group=32"


def explained(model: nn.Module, x: torch.Tensor, options: str = "") -> Explanation:
    torch._dynamo.reset()
    return gtrans.explain(model, x, passes=f"compress{{{SMALL}{options}}},default")


def stats_of(explanation: Explanation) -> Stats:
    (stats,) = [step.stats for _, step in explanation.steps() if step.name == "compress"]
    return stats


class Frozen(nn.Module):
    """A ReLU whose output the backward compares with zero, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


def test_given_up_where_an_exact_pass_behind_it_saves_more() -> None:
    nearest = "compress{bits=8,rounding=nearest,min_numel=1}"
    (alone,) = gtrans.explain(Frozen(), torch.randn(64, 16), passes=f"{nearest},plan").captured
    assert alone.steps[0].stats.rewritten == 1
    explanation = gtrans.explain(
        Frozen(), torch.randn(64, 16), passes=f"{nearest},relu-mask{{min_numel=1}},plan"
    )
    (captured,) = explanation.captured
    stats = captured.steps[0].stats
    assert (stats.matched, stats.rewritten) == (1, 0)
    assert stats.skipped == {SAVED_ANYWAY: 1}
    assert captured.steps[1].stats.rewritten == 1
    assert captured.saved_bytes < alone.saved_bytes


def test_what_pays_is_numbered_as_ever_and_can_be_held_back() -> None:
    (captured,) = gtrans.explain(Perceptron(functional.gelu), torch.randn(64, 16)).captured
    assert captured.original is not None
    pipeline = Pipeline.parse("compress{min_numel=1},norm-output")
    everything, only_second = Gate(), Gate({2})
    pipeline.run(captured.original, gate=everything)
    assert len(everything.seen) > 1
    assert [r.number for r in everything.seen] == list(range(1, len(everything.seen) + 1))
    _, (step, _) = pipeline.run(captured.original, gate=only_second)
    assert step.stats.rewritten == 1
    assert [r.site for r in only_second.seen] == [r.site for r in everything.seen]


def test_activations_in_place_have_codes() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.inner = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.norm, self.act = nn.BatchNorm2d(8), nn.SiLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.silu(self.inner(self.act(self.norm(self.enter(x)))), inplace=True)

    stats = stats_of(
        gtrans.explain(InPlace(), torch.randn(2, 3, 12, 12), passes="compress{min_numel=1},plan")
    )
    assert sum("for an activation" in n for n in stats.notes) >= 1


def _forward_of(name: str) -> list[fx.Node]:
    """The forward nodes of a case that was compressed."""
    model, x, _ = CASES[name]
    (captured,) = explained(model, x, ",bits=4,block=8").captured
    assert captured.rewritten is not None
    return [n for n in captured.rewritten.nodes if captured.rewritten.is_forward(n)]


def test_averages_are_kept_of_maps_and_not_of_the_heads_of_an_attention() -> None:
    def has_averages(name: str) -> bool:
        values = (n.meta.get("val") for n in _forward_of(name))
        return any(isinstance(v, torch.Tensor) and v.dtype is torch.int16 for v in values)

    assert has_averages("images")
    assert not has_averages("attention")
    assert not has_averages("fused")


def test_values_are_coded_behind_the_product_that_reads_them() -> None:
    order = {n: i for i, n in enumerate(_forward_of("gelu"))}
    (value,) = (n for n in order if n.target is torch.ops.aten.gelu.default)
    readers, pending = list[fx.Node](), [value]
    while pending:
        users = [u for u in pending.pop().users if u in order]
        readers += users
        pending += [u for u in users if ops.is_view(u)]
    (ranges,) = (order[n] for n in readers if n.target is torch.ops.aten.amin.default)
    (product,) = (order[n] for n in readers if n.target is torch.ops.aten.addmm.default)
    assert ranges > product


# ------------------------------------------------------------------------------ unbiasedness


@contextmanager
def shifted(monkeypatch: pytest.MonkeyPatch, sign: float, only: str | None) -> Iterator[set[str]]:
    """Copies that are the value itself plus a fixed error, in one copy or (None) in none."""
    names: set[str] = set()

    def decoded(
        graph: JointGraph,
        source: fx.Node,
        frames: object,
        grid: Grid,
        anchor: fx.Node,
        name: str,
    ) -> fx.Node:
        assert grid.stochastic
        names.add(name)

        def moved(x: torch.Tensor) -> torch.Tensor:
            if name != only:
                return x.clone()
            error = torch.arange(x.numel(), device=x.device, dtype=x.dtype).sin().reshape(x.shape)
            return x + sign * torch.where(x > 0, x, 0.0) if grid.zeros else x + sign * error

        (kept,) = graph.splice_after(source, torch.clone, source)
        return splice_late(graph, anchor, moved, kept)[0]

    with monkeypatch.context() as patch:
        patch.setattr(coded_values, "decoded_late", decoded)
        patch.setattr(coded_slices, "decoded_late", decoded)
        patch.setattr(Grid, "frame_bytes", lambda self, numel: 0.0)
        patch.setattr(Grid, "code_bytes", lambda self, numel: 1.0)
        yield names


def gradient(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    model = copy.deepcopy(model).double()
    gtrans.optimize(
        model, passes=f"compress{{{SMALL},slope_bits=4}},plan", backend="eager", on_error="raise"
    )
    found = training_step(model, ((x.double(),), {}), None, 0)
    return {n: v for n, (kind, v) in found.items() if kind == "gradient" and v is not None}


@pytest.mark.parametrize(
    "name", ["relu", "gated", "attention", "softmax", "fused", "images", "views", "norms behind"]
)
def test_the_gradient_is_affine_in_every_coded_copy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rounding of mean zero (see test_quantise) and copies independent: unbiased."""
    model, x, _ = CASES[name]
    monkeypatch.setattr("gtrans.plan.worth._check", lambda *_: None)
    with shifted(monkeypatch, 0.0, None) as names:
        middle = gradient(model, x)
    assert names
    for only in sorted(names)[:4]:
        ends = []
        for sign in (-0.5, 0.5):
            with shifted(monkeypatch, sign, only):
                ends.append(gradient(model, x))
        moved = 0.0
        for key, exact in middle.items():
            torch.testing.assert_close((ends[0][key] + ends[1][key]) / 2, exact)
            moved = max(moved, float((ends[1][key] - exact).abs().max()))
        assert moved > 0


@pytest.mark.slow
def test_every_law_holds_for_images() -> None:
    model, x, _ = CASES["images"]
    torch.manual_seed(0)
    assert check_pass(Compress(bits=2, min_numel=1, group=32, block=4), model, [x])


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_are_nearly_exact(name: str) -> None:
    model, x, _ = CASES[name]
    torch._dynamo.reset()
    found = gtrans.gradient_error(
        model, x, passes=f"compress{{bits=8,slope_bits=4,{SMALL}}},plan", draws=1
    )
    assert found.relative < 0.05


# ------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("name", [n for n in CASES if n != "norms behind"])  # one value of many
def test_saved_bytes_fall(name: str) -> None:
    model, x, least = CASES[name]
    after = explained(model, x, ",bits=2,block=4")
    torch._dynamo.reset()
    before = gtrans.explain(model, x)
    assert stats_of(after).rewritten >= least
    # Groups of 32 elements spend as much on their ranges as on their codes.
    assert after.saved_bytes < 0.65 * before.saved_bytes
    assert isinstance(after.contract, Unbiased)


def test_reasons_not_to() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            out: torch.Tensor = y * self.b(y)
            return out

    (reason,) = [r for r in stats_of(explained(Squared(), tokens())).skipped if "noise" in r]
    assert reason == (
        "its noise would multiply with itself: a gradient made of it flows into aten.mm.default, "
        "which reads it as well"
    )
    skipped = stats_of(explained(nn.Sequential(Attention()), tokens())).skipped
    assert not any("query" in r for r in skipped)
    odd = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    reasons = stats_of(explained(odd, torch.randn(3, 5))).skipped
    assert "its inner sizes do not divide into groups of a multiple of 8" in reasons
    large = stats_of(explained(odd, torch.randn(3, 5), ",min_numel=1000")).skipped
    assert set(large) == {"fewer elements than min_numel"}


def test_contracts_and_options() -> None:
    assert Compress().contract == Unbiased(noise=frozenset({"compress"}))
    assert isinstance(Compress(bits=8, rounding="nearest").contract, Close)
    assert isinstance(Compress(bits=2, rounding="nearest").contract, Aligned)
    text = "compress{bits=2,rounding=nearest}"
    assert str(Pipeline.parse(text)) == text
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        ({"group": 4}, "group must be at least 8, got 4"),
        ({"slope_bits": 5}, "slope_bits must be 1, 2, 3 or 4, got 5"),
        ({"block": -1}, "block must not be negative, got -1"),
        ({"min_numel": 0}, "min_numel must be at least 1, got 0"),
    ]
    for options, message in wrong:
        with pytest.raises(OptionError, match=f"compress: {message}"):
            Compress(**options)


def test_a_dimension_may_be_dynamic() -> None:
    x = torch.randn(6, 16)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    model = nn.Sequential(Perceptron(functional.gelu), Perceptron(torch.relu))
    gtrans.optimize(model, passes=f"compress{{{SMALL}}},default", backend="eager")
    for count in (6, 10):
        model(torch.randn(count, 16) if count == 10 else x).sum().backward()
    report = gtrans.report(model)
    assert len(report.captured) == 1
    assert stats_of(report).rewritten >= 4


@pytest.mark.inductor
def test_inductor_computes_the_same_as_eager() -> None:
    gradients = []
    model, x, _ = CASES["gelu"]
    for backend in ("inductor", "eager"):
        torch._dynamo.reset()
        model.zero_grad()
        torch.manual_seed(0)
        passes = f"compress{{{SMALL},bits=2}},default"
        gtrans.optimize(model, passes=passes, backend=backend, on_error="raise")
        model(x).square().sum().backward()
        assert stats_of(gtrans.report(model)).rewritten == 5
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        gtrans.restore(model)
    for compiled, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)
