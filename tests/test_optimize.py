"""`gtrans.optimize` on tiny models, by the eager backend unless a test says otherwise."""

import copy
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans
from gtrans.api import _sessions
from gtrans.errors import CaptureError, ContractError, ModelError, OptionError

log = logging.getLogger("talk")


@dataclass
class Result:
    """What a model may return."""

    loss: torch.Tensor
    logits: torch.Tensor


class Small(nn.Module):
    """A block with a norm, an activation and dropout, and ways of returning the result."""

    def __init__(self, dropout: float = 0.0, answer: str = "tensor", breaks: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(8, 3)
        self.answer = answer
        self.breaks = breaks

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        y = self.drop(F.gelu(self.norm(self.first(x))))
        if self.breaks:
            print("between two graphs")
        y = self.last(y) * scale
        if self.answer == "dictionary":
            return {"loss": y.square().mean(), "logits": y}
        if self.answer == "dataclass":
            return Result(y.square().mean(), y)
        return y


class Rectified(Small):
    """Two layers and a ReLU, whose output nothing else needs."""

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        y: torch.Tensor = F.relu(self.last(self.first(x))) * scale
        return y


def twins(**options: Any) -> tuple[Small, Small]:
    torch.manual_seed(0)
    plain = Small(**options)
    return plain, gtrans.optimize(copy.deepcopy(plain), backend="eager")


def trained(model: nn.Module, step: Callable[[nn.Module], torch.Tensor], steps: int = 3) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        step(model).backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6, msg=name)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------ the same object


def test_the_same_object_comes_back_and_behaves_as_before() -> None:
    model = Small()
    keys = list(model.state_dict())
    assert gtrans.optimize(model, backend="eager") is model
    assert isinstance(model, Small)
    assert list(model.state_dict()) == keys
    plain = Small()
    plain.load_state_dict(model.state_dict())
    model(X).sum().backward()
    plain(X).sum().backward()
    assert not model.eval().training
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain.eval()(X))


def test_saving_loading_and_copying() -> None:
    _, model = twins()
    trained(model, lambda m: m(X).square().mean())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Small()
    fresh.load_state_dict(torch.load(file))
    same(model, fresh)
    twin = copy.deepcopy(model)
    same(model, twin)
    assert twin not in _sessions
    twin(X).sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same(model, torch.load(file, weights_only=False))


def test_restore_undoes_it_and_optimizing_twice_replaces() -> None:
    _, model = twins()
    gtrans.optimize(model, passes="none", backend="eager")
    model(X).sum().backward()
    assert str(gtrans.report(model).pipeline) == "plan"
    assert gtrans.restore(model) is model
    assert model._compiled_call_impl is None
    model(X)
    with pytest.raises(ModelError, match="nothing to restore"):
        gtrans.restore(model)


def test_the_report_needs_an_optimized_model_that_ran() -> None:
    plain, model = twins()
    with pytest.raises(ModelError, match="not optimized by gtrans; call"):
        gtrans.report(plain)
    with pytest.raises(ModelError, match="call the model once"):
        gtrans.report(model)
    model(X).sum().backward()
    report = gtrans.report(model)
    assert report.saved_bytes <= report.saved_bytes_before
    assert "plan" in str(report)
    assert report.to_dict()["graphs"] == 1


def test_hooks_still_run() -> None:
    _, model = twins()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.first.weight.register_hook(lambda g: calls.append("gradient"))
    model(X).sum().backward()
    assert sorted(calls) == ["forward", "gradient"]


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("answer", ["dictionary", "dataclass"])
def test_structured_outputs_and_keyword_arguments(answer: str) -> None:
    plain, model = twins(answer=answer)

    def step(m: nn.Module) -> torch.Tensor:
        out = m(x=X, scale=0.5)
        loss: torch.Tensor = out["loss"] if answer == "dictionary" else out.loss
        return loss

    trained(plain, step)
    trained(model, step)
    same(plain, model)


def test_dropout_batch_statistics_and_graph_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    plain, model = twins(dropout=0.5, breaks=True)
    trained(plain, lambda m: m(X).square().mean())
    trained(model, lambda m: m(X).square().mean())
    same(plain, model)
    assert len(gtrans.report(model).training) == 2
    assert "between two graphs" in capsys.readouterr().out
    with pytest.raises(Exception, match="break"):
        gtrans.optimize(Small(breaks=True), backend="eager", fullgraph=True)(X)


def test_tied_and_frozen_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 4)
            self.mix = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.words.weight
            self.mix.bias.requires_grad_(False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(torch.tanh(self.mix(self.words(ids))))
            return logits

    plain = Tied()
    model = gtrans.optimize(copy.deepcopy(plain), backend="eager")
    ids = torch.tensor([[1, 2, 6], [0, 1, 1]])
    trained(plain, lambda m: m(ids).square().mean())
    trained(model, lambda m: m(ids).square().mean())
    same(plain, model)
    assert model.head.weight is model.words.weight
    assert model.mix.bias.grad is None


def test_accumulated_gradients_and_two_backwards_through_one_graph() -> None:
    plain, model = twins()
    for m in (plain, model):
        for x in (X, 2 * X):
            m(x).sum().backward()
        y = m(X)
        y[:, 0].sum().backward(retain_graph=True)
        y[:, 1].sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_gradients_of_inputs() -> None:
    plain, model = twins()
    grads = []
    for m in (plain, model):
        x = X.clone().requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_autocast() -> None:
    plain, model = twins()
    for m in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(X)
        out.float().square().mean().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=1e-3)


def test_a_changing_length_is_captured_twice_at_most() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(F.gelu(self.a(x)), -1)

    model = gtrans.optimize(Sequence(), backend="eager")
    for length in (5, 6, 9, 12, 7, 30):
        model(torch.randn(2, length, 4)).square().sum().backward()
    assert len(gtrans.report(model).captured) <= 2


def test_without_gradients_nothing_is_kept() -> None:
    _, model = twins()
    with torch.no_grad():
        model(X)
    with torch.inference_mode():
        model(X)
    assert gtrans.report(model).training == []


def test_many_models_of_one_class_are_all_captured() -> None:
    for _ in range(12):
        _, model = twins()
        model(X).sum().backward()
        assert len(gtrans.report(model).training) == 1


def test_explain_and_verify_leave_no_trace() -> None:
    model = Small(dropout=0.5)
    before = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    assert gtrans.explain(model, X).saved_bytes > 0
    assert gtrans.verify(model, X).ok
    assert torch.equal(state, torch.random.get_rng_state())
    same(before, model)
    assert model not in _sessions


# ------------------------------------------------------------------------------- torch.compile


def test_torch_compile_knows_the_backend() -> None:
    plain, _ = twins()
    model = copy.deepcopy(plain)
    options: dict[str, Any] = {"passes": "relu-mask,plan", "backend": "eager"}
    compiled: Any = torch.compile(model, backend="gtrans", options=options)
    trained(plain, lambda m: m(X).square().mean())
    trained(model, lambda m: compiled(X).square().mean())
    same(plain, model)


def test_torch_compile_refuses_unknown_options() -> None:
    compiled: Any = torch.compile(Small(), backend="gtrans", options={"backend": "eager", "n": 1})
    with pytest.raises(Exception, match="unknown options"):
        compiled(X)


def test_torch_compile_heeds_the_variables_and_counts_over_all_graphs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GTRANS_BISECT_LIMIT", "1")
    monkeypatch.setenv("GTRANS_DUMP_DIR", str(tmp_path))
    options: dict[str, Any] = {"passes": "relu-mask{min_numel=1},plan", "backend": "eager"}
    for _ in range(2):
        torch._dynamo.reset()  # or the second model would run what was compiled for the first
        compiled: Any = torch.compile(Rectified(), backend="gtrans", options=options)
        compiled(X).sum().backward()
    printed = capsys.readouterr().err.splitlines()
    relu = [line for line in printed if "relu-mask" in line]
    assert "graph 0: matched 1, rewrote 1; rewrites #1;" in relu[0]
    assert "graph 1" in relu[1]
    assert "held back" in relu[1]  # the limit counts over both graphs
    assert {f.name.split("_")[1] for f in tmp_path.glob("*.py")} == {"graph0", "graph1"}


def test_a_call_of_a_logger_does_not_end_the_graph(caplog: pytest.LogCaptureFixture) -> None:
    class Talking(Small):
        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            y: torch.Tensor = super().forward(x, scale=scale)
            log.warning("half way")
            return y * 2

    model, plain = Talking(), Talking()
    plain.load_state_dict(model.state_dict())
    gtrans.optimize(model, backend="eager", fullgraph=True)
    trained(model, lambda m: m(X).square().mean())
    assert "half way" not in caplog.text  # as the documentation says
    trained(plain, lambda m: m(X).square().mean())
    assert "half way" in caplog.text
    same(plain, model)
    assert len(gtrans.report(model).training) == 1


@pytest.mark.inductor
def test_inductor_computes_the_same() -> None:
    torch.manual_seed(0)
    verification = gtrans.verify(Small(), X, backend="inductor")
    assert verification.ok, str(verification)


# -------------------------------------------------------------------------------------- errors


def test_what_cannot_be_optimized_is_refused() -> None:
    frozen = Small().requires_grad_(False)
    with pytest.raises(ModelError, match="Small has no trainable parameters"):
        gtrans.optimize(frozen)
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got int"):
        gtrans.optimize(3)  # type: ignore[type-var]
    with pytest.raises(OptionError, match="unknown pass 'relu-msk'; did you mean"):
        gtrans.optimize(Small(), passes="relu-msk")
    with pytest.raises(OptionError, match="unknown backend 'indctor'; did you mean"):
        gtrans.optimize(Small(), backend="indctor")
    with pytest.raises(OptionError, match="on_error must be 'skip' or 'raise', got 'no'"):
        gtrans.optimize(Small(), on_error="no")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="unknown contract 'exactly'"):
        gtrans.optimize(Small(), allow="exactly")


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="does not accept these inputs"):
        gtrans.explain(Small(), torch.randn(4, 5))
    with pytest.raises(ModelError, match="does not accept these inputs"):
        gtrans.verify(Small(), X, X)


def test_a_model_that_dynamo_cannot_capture_is_refused() -> None:
    class Opaque(Small):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
            return super().forward(x, scale=scale)

    with pytest.raises(CaptureError, match="captured"):
        gtrans.verify(Opaque(), X)


def test_a_missing_compiler_falls_back_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="gtrans"):
        model = gtrans.optimize(Small())
    (line,) = [r.getMessage() for r in caplog.records if r.name == "gtrans"]
    assert "backend 'inductor' cannot run here: no C++ compiler found" in line
    assert line.endswith("using 'eager'")
    model(X).sum().backward()
