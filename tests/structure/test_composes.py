"""Erased models are models: they export, are optimized, and come back from a checkpoint."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gtrans
from gtrans.errors import PlanError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.enter(x)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["module", "graph", "operators"])
def slim(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    plan = gtrans.prune(Net(), X)
    if request.param == "operators":
        return plan.operators.erase(plan.operators.all)
    return plan.erase(plan.select(sparsity=0.5, scope="local"), form=request.param)


def test_an_erased_model_is_optimized_and_has_the_same_gradients(slim: nn.Module) -> None:
    slim(X).square().sum().backward()
    expected = {n: p.grad for n, p in slim.named_parameters()}
    slim.zero_grad()
    gtrans.optimize(slim, backend="eager", passes="reversible,relu-mask,norm-output,plan")
    slim(X).square().sum().backward()
    for name, p in slim.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    assert gtrans.report(slim)


def test_an_erased_model_is_exported(slim: nn.Module) -> None:
    exported = torch.export.export(slim.eval(), (X,))
    torch.testing.assert_close(exported.module()(X), slim(X))


def test_sparsifying_goes_on_under_optimize() -> None:
    torch.manual_seed(0)
    model = Net()
    plan = gtrans.prune(model, X)
    gtrans.optimize(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = plan.sparsifier(optimizer, sparsity=0.5, steps=6, periods=2)
    for _ in range(7):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert sparsifier.done
    slim = gtrans.optimize(plan.erase(), backend="eager")
    torch.testing.assert_close(slim(X), model(X), rtol=1e-4, atol=1e-5)


def _bert(**options: Any) -> tuple[Any, dict[str, Any]]:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=31, hidden_size=16, num_attention_heads=2, intermediate_size=24, **options
    )
    return hf.BertForSequenceClassification(config), {"input_ids": torch.randint(31, (2, 5))}


def _llama(**options: Any) -> tuple[Any, dict[str, Any]]:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=31, hidden_size=16, num_attention_heads=4, intermediate_size=24, **options
    )
    return hf.LlamaForCausalLM(config), {"input_ids": torch.randint(31, (2, 5))}


def _gpt2(**options: Any) -> tuple[Any, dict[str, Any]]:
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=31, n_embd=16, n_head=2, bos_token_id=1, eos_token_id=2, n_layer=2
    )
    return hf.GPT2LMHeadModel(config), {"input_ids": torch.randint(31, (2, 5))}


def _half(plan: gtrans.PrunePlan, *parts: str) -> dict[str, torch.Tensor]:
    return {
        c.name: torch.arange(c.size) < c.size // 2
        for c in plan.classes
        if any(part in c.name for part in parts)
    }


def _conv() -> tuple[nn.Module, dict[str, Any]]:
    class ConvNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.inner, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.norm(self.enter(x)).relu()
            return self.head((x + self.inner(x).relu()).mean((2, 3)))

    return ConvNet(), {"x": torch.randn(2, 3, 6, 6)}


@pytest.mark.parametrize(
    ("make", "form"), [(_conv, "module"), (lambda: _bert(num_hidden_layers=2), "graph")]
)
def test_an_erased_model_is_written_as_onnx(make: Any, form: Any) -> None:
    why = "onnx and onnxscript are no dependencies of gtrans: pip install onnx onnxscript"
    reference = pytest.importorskip("onnx.reference", reason=why)
    pytest.importorskip("onnxscript", reason=why)
    torch.manual_seed(0)
    model, batch = make()
    if "input_ids" in batch:
        # Else they come from a gather for which onnx's evaluator (1.23) fails.
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    plan = gtrans.prune(model.eval(), **batch)
    slim = plan.erase(plan.select(sparsity=0.5), form=form).eval()
    with torch.no_grad():
        result = slim(**batch)
        program = torch.onnx.export(slim, (), kwargs=batch, dynamo=True, verbose=False)
    assert program is not None
    feed = {name: value.numpy() for name, value in batch.items()}
    (found,) = reference.ReferenceEvaluator(program.model_proto).run(None, feed)
    expected = getattr(result, "logits", result)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (_bert, ("intermediate",)),
        (_gpt2, ("c_fc",)),  # its config leaves the size open
        (_llama, ("mlp", "q_proj.weight[0].0")),
    ],
)
def test_a_smaller_model_comes_back_from_its_folder(
    make: Any, parts: tuple[str, ...], tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model, batch = make(num_hidden_layers=2)
    model.eval()
    plan = gtrans.prune(model, **batch)
    slim: Any = plan.erase(_half(plan, *parts), form="module")
    slim.config = plan.config_for(slim)
    assert slim.config.to_dict() != model.config.to_dict()
    slim.save_pretrained(tmp_path)
    again = type(slim).from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in again.parameters()) < plan.parameters
    torch.testing.assert_close(again(**batch).logits, slim(**batch).logits)


def test_a_smaller_residual_stream_comes_back_with_stock_norms(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, batch = _bert(num_hidden_layers=1)
    plan = gtrans.prune(model.eval(), **batch)
    stream = _half(plan, "word_embeddings")
    with pytest.raises(PlanError, match=r"LongerLayerNorm, .*norm='restart' gives stock norms"):
        plan.config_for(plan.erase(stream, form="module"))
    slim: Any = plan.erase(stream, form="module", norm="restart")
    with pytest.raises(PlanError, match=r"no setting of BertConfig gives .*scope='local'"):
        plan.config_for(slim)  # the class ties the width of its heads to that of the stream


def test_sizes_that_differ_between_layers_are_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    model, batch = _bert(num_hidden_layers=2)
    plan = gtrans.prune(model.eval(), **batch)
    slim = plan.erase(_half(plan, "layer.0.intermediate"), form="module")
    with pytest.raises(PlanError, match=r"BertConfig gives bert\.encoder\.layer\.\d\.interm"):
        plan.config_for(slim)
    plain = gtrans.prune(Net(), X)
    with pytest.raises(PlanError, match="Net has no `config`"):
        plain.config_for(plain.erase(plain.select(sparsity=0.5)))
