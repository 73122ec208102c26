"""chunked-loss: the same loss and gradients, with a few logits at a time."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans
import gtrans.testing as kit
from gtrans.analysis.measure import measured_peak
from gtrans.capture import Compiler, compiled_call
from gtrans.contract import Exact
from gtrans.core import Stats
from gtrans.errors import OptionError
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.printer import to_code
from gtrans.passes.operator.chunked_loss import ChunkedLoss
from gtrans.pipeline import Graph, Pipeline, Step

Loss = Callable[["Tokens", torch.Tensor, torch.Tensor], Any]

V, D = 13, 4


class Tokens(nn.Module):
    """An embedding, a layer, and a loss over the vocabulary."""

    def __init__(self, loss: Loss, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.turned = nn.Parameter(torch.randn(D, V))
        self.offset = nn.Parameter(torch.randn(V))
        self.rarity = nn.Buffer(torch.rand(V) + 0.5)
        self.loss = loss

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.loss(self, torch.tanh(self.layer(self.embedding(tokens))), labels)


def used(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every loss needs."""
    return [p for name, p in model.named_parameters() if name not in ("turned", "offset")]


def plain(m: Tokens, h: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.cross_entropy(m.head(h).float().view(-1, V), y.view(-1), **options)


def tokens(batch: int = 3, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(V, (batch, length)), torch.randint(V, (batch, length))


def captured(loss: Loss, min_numel: int = 1) -> tuple[str, str, Stats]:
    seen: list[tuple[str, str, Stats]] = []

    def observe(step: Step, before: Graph, after: Graph) -> None:
        if isinstance(after, ForwardGraph):
            texts = [to_code(g.graph, lines=False) for g in (before, after)]
            seen.append((texts[0], texts[1], step.stats))

    pipeline = Pipeline((ChunkedLoss(chunks=2, min_numel=min_numel),))
    compiler = Compiler(pipeline, "eager", skip_failures=False, observers=(observe,))
    compiled_call(Tokens(loss), compiler)(*tokens())
    return seen[0]


def test_the_loss_takes_the_place_of_product_and_loss() -> None:
    before, after, stats = captured(plain)
    assert "linear(" in before
    lines = [line.strip() for line in after.splitlines() if "chunked_cross_entropy(" in line]
    (line,) = lines
    assert line.endswith("# f32[]  <- chunked-loss")
    assert ", None, view_1, 2, torch.float32, None, -100, 'mean', 0.0, 0.0)" in line
    assert "= cross_entropy(" not in after
    assert "float" not in after.replace("torch.float32", "")
    assert (stats.matched, stats.rewritten) == (1, 1)


def both(
    loss: Loss,
    inputs: tuple[torch.Tensor, ...],
    prepare: Callable[[Tokens], Any] | None = None,
    **options: Any,
) -> kit.Record:
    """Checks outputs and gradients against autograd; returns the rewritten step."""
    torch.manual_seed(0)
    model = Tokens(loss, **options)
    if prepare is not None:
        prepare(model)
    expected = kit.Runner(model, inputs).step()
    runner = kit.Runner(model, inputs, Pipeline((ChunkedLoss(chunks=4, min_numel=1),)))
    found = runner.step()
    assert runner.rewritten >= 1
    assert runner.contract == Exact(bitwise=False)
    for name, value in {**expected.outputs, **expected.gradients}.items():
        other = {**found.outputs, **found.gradients}[name]
        torch.testing.assert_close(other, value, equal_nan=True, msg=name)
    return found


def all_but(ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = tokens()
    y.view(-1)[:ignored] = -100
    return x, y


LOSSES: dict[str, Loss] = {
    "mean": plain,
    "sum": lambda m, h, y: plain(m, h, y, reduction="sum"),
    "smoothed": lambda m, h, y: plain(m, h, y, label_smoothing=0.2),
    "smoothed sum": lambda m, h, y: plain(m, h, y, label_smoothing=0.2, reduction="sum"),
    "other ignored class": lambda m, h, y: plain(m, h, y, ignore_index=3),
    "matmul and t": lambda m, h, y: F.cross_entropy(
        (h @ m.embedding.weight.t()).flatten(0, 1), y.flatten()
    ),
    "matmul and T": lambda m, h, y: F.cross_entropy(
        torch.matmul(h, m.embedding.weight.T).reshape(-1, V), y.flatten()
    ),
    "matmul and transpose": lambda m, h, y: F.cross_entropy(
        (h.flatten(0, 1) @ m.embedding.weight.transpose(0, 1)), y.flatten()
    ),
    "module": lambda m, h, y: 3 * nn.CrossEntropyLoss()(m.head(h).view(-1, V), y.view(-1)),
    "squared": lambda m, h, y: plain(m, h, y).square(),
    "matmul by [D, V]": lambda m, h, y: F.cross_entropy(
        torch.addmm(m.offset, h.flatten(0, 1), m.turned), y.flatten()
    ),
    "shifted": lambda m, h, y: F.cross_entropy(
        m.head(h)[..., :-1, :].contiguous().view(-1, V), y[..., 1:].reshape(-1)
    ),
    "shifted by narrow, in double": lambda m, h, y: F.cross_entropy(
        m.head(h).narrow(1, 0, 4).double().flatten(end_dim=-2), y[:, 1:].flatten()
    ),
    "classes second": lambda m, h, y: F.cross_entropy(
        m.head(h).unsqueeze(2)[:, 1:].permute(0, 3, 1, 2), y[:, 1:, None], reduction="sum"
    ),
    "last token": lambda m, h, y: F.cross_entropy(m.head(h)[:, -1], y[:, -1]),
    "chosen tokens": lambda m, h, y: F.cross_entropy(
        m.head(h).flatten(0, 1).index_select(0, y[0]), y[0]
    ),
    "indexed tokens": lambda m, h, y: F.cross_entropy(m.head(h).flatten(0, 1)[y[0]], y[0]),
    "no reduction": lambda m, h, y: (plain(m, h, y, reduction="none") * torch.arange(15.0)).sum(),
    "no reduction, classes second": lambda m, h, y: (
        F.cross_entropy(
            m.head(h).transpose(1, 2), y, reduction="none", label_smoothing=0.1, weight=m.rarity
        )
        .square()
        .mean()
    ),
    "scaled and divided": lambda m, h, y: F.cross_entropy(
        (3 * m.head(h) / 0.7).view(-1, V) * 0.5, y.view(-1)
    ),
    "scaled by a learned number, with a bias": lambda m, h, y: F.cross_entropy(
        (F.linear(h, m.head.weight, m.offset) * m.offset[0].exp()).flatten(0, 1), y.flatten()
    ),
    "capped": lambda m, h, y: F.cross_entropy(
        2 * torch.tanh(m.head(h) / 2).view(-1, V), y.view(-1), label_smoothing=0.1, weight=m.rarity
    ),
    "capped and scaled, per token": lambda m, h, y: F.cross_entropy(
        ((m.head(h) * 3).tanh() / 0.4).transpose(1, 2), y, reduction="none"
    ).mean(),
    "of log-probabilities": lambda m, h, y: F.nll_loss(
        F.log_softmax(m.head(h).view(-1, V), -1), y.view(-1), m.rarity, ignore_index=3
    ),
    "of log-probabilities, classes second": lambda m, h, y: F.nll_loss(
        m.head(h).transpose(1, 2).log_softmax(dim=1), y, reduction="sum"
    ),
    "class weights": lambda m, h, y: plain(m, h, y, weight=m.rarity),
    "class weights, smoothed": lambda m, h, y: plain(
        m, h, y, weight=m.rarity, label_smoothing=0.3, ignore_index=2
    ),
    "class weights, smoothed sum": lambda m, h, y: plain(
        m, h, y, weight=m.rarity, label_smoothing=0.3, reduction="sum"
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_autograd(name: str) -> None:
    both(LOSSES[name], tokens())


@pytest.mark.parametrize("name", ["mean", "sum", "smoothed", "no reduction", "class weights"])
@pytest.mark.parametrize("ignored", [4, 15], ids=["one chunk", "all"])
def test_ignored_tokens_do_not_count(name: str, ignored: int) -> None:
    found = both(LOSSES[name], all_but(ignored))
    loss = found.outputs["output 0"]
    assert loss is not None
    assert bool(loss.isnan()) is (ignored == 15 and name not in ("sum", "no reduction"))


def test_a_bias_an_untied_head_and_fewer_tokens_than_chunks() -> None:
    both(plain, tokens(), tied=False, bias=True)
    both(plain, tokens(1, 3), tied=False, bias=True)


@pytest.mark.parametrize("frozen", ["embedding", "layer"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    def prepare(model: Tokens) -> None:
        getattr(model, frozen).requires_grad_(False)

    both(plain, tokens(), prepare)


def test_without_gradients_none_are_computed() -> None:
    model = Tokens(plain)
    expected = model(*(batch := tokens()))
    compiler = Compiler(Pipeline((ChunkedLoss(min_numel=1),)), "eager", skip_failures=False)
    with torch.no_grad():
        found = compiled_call(model, compiler)(*batch)
    torch.testing.assert_close(found, expected.detach())
    assert compiler.captured[0].forward_steps[0].stats.rewritten == 1
    assert not compiler.captured[0].training
    assert compiler.captured[0].saved_bytes == 0


def test_one_graph_serves_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    model = Tokens(plain)
    compiler = Compiler(Pipeline((ChunkedLoss(4, 1),)), "eager", skip_failures=False)
    call = compiled_call(model, compiler, dynamic=True)
    for length in (6, 7, 9, 11):  # two tokens a chunk and more: Dynamo treats sizes 0 and 1 apart
        batch = tokens(3, length)
        expected = torch.autograd.grad(model(*batch), used(model))
        found = torch.autograd.grad(call(*batch), used(model))
        torch.testing.assert_close(found, expected)
    assert sum(c.training for c in compiler.captured) == 1


@pytest.mark.parametrize("where", ["autocast", "bfloat16"])
def test_half_precision_is_as_close_to_float32_as_the_plain_step(where: str) -> None:
    torch.manual_seed(0)
    model, batch = Tokens(plain), tokens(4, 16)
    wide = torch.autograd.grad(model(*batch), used(model))
    if where == "bfloat16":
        model = model.to(torch.bfloat16)
    compiler = Compiler(Pipeline((ChunkedLoss(min_numel=1),)), "eager", skip_failures=False)
    call = compiled_call(model, compiler)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
        losses = model(*batch), call(*batch)
    assert losses[0].dtype == losses[1].dtype
    plain_step, chunked = (torch.autograd.grad(x, used(model)) for x in losses)
    for a, b, c in zip(wide, plain_step, chunked, strict=True):
        assert b.dtype == c.dtype
        assert (c - a).norm() <= 1.5 * (b - a).norm() + 1e-3 * a.norm()
    assert compiler.captured[0].forward_steps[0].stats.rewritten == 1


class Wide(nn.Module):
    """A head whose vocabulary is much larger than its width, over many tokens."""

    def __init__(self, vocabulary: int = 4096, width: int = 16) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.layer(x))), y)


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model(x, y).backward()
    model.zero_grad(set_to_none=True)


def test_saved_bytes_and_peak_lose_the_logits() -> None:
    count, vocabulary, width = 512, 4096, 16
    model = Wide(vocabulary, width)
    x, y = torch.randn(count, width), torch.randint(vocabulary, (count,))
    logits = 4 * count * vocabulary
    figures = []
    for passes in ("plan", "chunked-loss{chunks=8},plan"):
        twin = copy.deepcopy(model)
        saved = kit.Runner(twin, (x, y), Pipeline.parse(passes)).step().saved_bytes
        gtrans.optimize(twin, passes=passes, backend="eager", on_error="raise")
        figures.append((saved, measured_peak(partial(step, twin, x, y)).bytes))
    (plain_saved, plain_peak), (saved, peak) = figures
    assert plain_saved >= logits
    assert saved <= 4 * width * (vocabulary + 4 * count)
    assert plain_peak >= 2 * logits
    assert peak <= logits


# ------------------------------------------------------------------------------------- reasons

REASONS: dict[str, Loss] = {
    "it has arguments that torch deprecates": lambda m, h, y: plain(m, h, y, reduce=False).sum(),
    "its targets are probabilities": lambda m, h, y: F.cross_entropy(
        m.head(h).view(-1, V), torch.softmax(y.view(-1, 1) * torch.ones(V), -1)
    ),
    "its classes are not the outputs of the product": lambda m, h, y: F.cross_entropy(
        m.head(h), y[:, :1].expand(3, V) % 5
    ),
    "its logits are rounded on the way": lambda m, h, y: F.cross_entropy(
        m.head(h).bfloat16().view(-1, V), y.view(-1)
    ).float(),
    "its logits are read elsewhere too": lambda m, h, y: (
        F.cross_entropy((z := m.head(h)).view(-1, V), y.view(-1)),
        z,
    ),
    "a step on the way mixes classes and tokens": lambda m, h, y: F.cross_entropy(
        m.head(h).view(-1, 1), y.view(-1).repeat(V) * 0
    ),
    "its logits come from relu": lambda m, h, y: F.cross_entropy(
        torch.relu(m.head(h)).view(-1, V), y.view(-1)
    ),
    "its logits are capped by more than a number": lambda m, h, y: F.cross_entropy(
        (torch.tanh(m.head(h)) * m.offset[0]).view(-1, V), y.view(-1)
    ),
    "its input is not log_softmax of something": lambda m, h, y: F.nll_loss(
        m.head(h).view(-1, V), y.view(-1)
    ),
    "its log-probabilities are rounded": lambda m, h, y: F.nll_loss(
        F.log_softmax(m.head(h).view(-1, V), -1, dtype=torch.bfloat16), y.view(-1)
    ).float(),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_to_leave_a_loss_alone(reason: str) -> None:
    assert captured(REASONS[reason])[2].skipped == {reason: 1}


def test_small_losses_are_left_alone() -> None:
    assert captured(plain, min_numel=196)[2].skipped == {"fewer logits than min_numel": 1}


@pytest.mark.parametrize("option", ["chunks", "min_numel"])
def test_options_must_be_positive(option: str) -> None:
    with pytest.raises(OptionError, match=f"chunked-loss: {option} must be at least 1, got 0"):
        Pipeline.parse(f"chunked-loss{{{option}=0}}")


# ---------------------------------------------------------------------------- losses as they are


def language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    if kind == "bert":
        model: nn.Module = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    else:
        config = transformers.AutoConfig.for_model(kind, **sizes, **HEADS.get(kind, {}))
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.train()


# Heads that cap their logits, multiply and divide them.
HEADS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 4, "num_key_value_heads": 1, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {"logits_scaling": 3.0},
}


class LossOnly(nn.Module):
    """As training loops have it that want nothing but the loss."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.model(input_ids=ids, labels=labels, **self.options).loss


@pytest.mark.parametrize("kind", ["llama", "llama with a count", "bert", *HEADS])
def test_losses_of_transformers_are_found_as_they_are(kind: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"use_cache": False} if kind != "bert" else {}
    if kind.endswith("count"):
        options["num_items_in_batch"] = torch.tensor(9)
    model = LossOnly(language_model(kind.split()[0]).eval(), **options)
    ids = torch.randint(61, (2, 8))
    labels = ids.where(ids > 20, -100)
    expected = kit.Runner(model, (ids, labels)).step()
    runner = kit.Runner(model, (ids, labels), Pipeline((ChunkedLoss(chunks=3, min_numel=1),)))
    found = runner.step()
    assert runner.rewritten == 1
    for name, value in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], value, msg=name)


def test_logits_that_are_returned_as_well_are_kept_with_the_reason() -> None:
    model = language_model("llama")
    ids = torch.randint(61, (2, 8))
    compiler = Compiler(Pipeline((ChunkedLoss(min_numel=1),)), "eager", skip_failures=False)
    compiled_call(model, compiler)(input_ids=ids, labels=ids, use_cache=False)
    (step,) = compiler.captured[0].forward_steps
    assert step.stats.skipped == {"its logits are read elsewhere too": 1}


def test_no_value_has_room_for_all_logits() -> None:
    class Sliced(Wide):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(torch.tanh(self.layer(x)))[:-1].float(), y[1:])

    count, vocabulary = 64, 512
    compiler = Compiler(Pipeline((ChunkedLoss(min_numel=1),)), "eager", skip_failures=False)
    x, y = torch.randn(count, 16), torch.randint(vocabulary, (count,))
    compiled_call(Sliced(vocabulary), compiler)(x, y)
    joint = compiler.captured[0].rewritten
    assert joint is not None
    values = [n.meta["val"] for n in joint.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert max(v.numel() for v in values) <= 16 * vocabulary
