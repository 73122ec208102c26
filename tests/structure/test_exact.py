"""Half of every exact class goes, and outputs and kept gradients stay, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gtrans

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Residual(nn.Module):
    def __init__(self, conv: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.na = conv(8, 12), nn.BatchNorm2d(12)
        self.b, self.nb = conv(12, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        y = self.nb(self.b(F.silu(self.na(self.a(x)))))
        return self.head(F.relu(x + y).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 2, stride=2)
        self.norm = nn.GroupNorm(4, 8)
        self.up, self.leave = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> Any:
        skip = F.gelu(self.enter(x))
        low = F.gelu(self.norm(self.down(skip)))
        return self.leave(torch.cat([skip, self.up(low)], 1))


class Attention(nn.Module):
    """Packed or separate projections; fewer key heads than query heads if `kv` is less."""

    def __init__(self, heads: int, kv: int, packed: bool) -> None:
        super().__init__()
        self.heads, self.kv, self.dim = heads, kv, 4
        width = heads * 4
        self.embed = nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed = packed
        if packed:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k = nn.Linear(width, width), nn.Linear(width, kv * 4)
            self.v = nn.Linear(width, kv * 4)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(10, width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed(ids)
        n, t, _ = x.shape
        h = self.norm1(x)
        if self.packed:
            q, k, v = self.qkv(h).view(n, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(h).view(n, t, self.heads, self.dim).transpose(1, 2)
            k = self.k(h).view(n, t, self.kv, self.dim).transpose(1, 2)
            v = self.v(h).view(n, t, self.kv, self.dim).transpose(1, 2)
            if self.kv != self.heads:
                k = k.repeat_interleave(self.heads // self.kv, dim=1)
                v = v[:, :, None].expand(-1, -1, self.heads // self.kv, -1, -1).flatten(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.dim))
        a, b = self.up(self.norm2(x)).chunk(2, dim=-1)
        return self.head(x + self.down(a * torch.sigmoid(b)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed(ids)
        return self.head(x + torch.tanh(self.mix(x)))


class Shuffle(nn.Module):
    """Grouped convolution, channel shuffle, squeeze and excite, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 12, 1, groups=1)
        self.b = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.squeeze, self.excite = nn.Linear(24, 6), nn.Linear(6, 24)
        self.head = nn.Linear(24 * 4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.b(F.relu(self.a(x))))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).flatten(1))


class Recurrent(nn.Module):
    """Stacked, bidirectional, then cells: hidden units of all of them can go."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.rnn = kind(8, 6, num_layers=2, **options)
        self.gru = nn.GRUCell(6 * (1 + self.rnn.bidirectional), 7)
        self.lstm, self.head = nn.LSTMCell(7, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y, _ = self.rnn(F.relu(self.enter(x)))
        h = state = None
        for t in range(2):
            h = self.gru(y[:, t], h)
            state = self.lstm(h, state)
        assert state is not None
        return self.head(state[0])


class Spectral(nn.Module):
    """Filters along time by Fourier transforms, and sums messages at the ends of edges."""

    edges: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 2)
        self.kernel = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]]))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.enter(x)
        spectrum = torch.fft.rfft(h, n=8, dim=1) * torch.fft.rfft(self.kernel, n=8, dim=0)
        h = torch.fft.irfft(spectrum, n=8, dim=1)[:, :4].transpose(0, 1)
        sent = torch.zeros_like(h).index_add(0, self.edges[1], h[self.edges[0]])
        top = sent.gather(0, sent.argmax(0, keepdim=True))
        return self.leave(h + sent + top)


def _mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh()),
        *(nn.Dropout(0.0), nn.Linear(12, 4)),
    )


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))

PLAIN: dict[str, Callable[[], Built]] = {
    "mlp": lambda: (_mlp(), (torch.randn(5, 6),), {}),
    "resnet": lambda: (Residual(lambda i, o: nn.Conv2d(i, o, 3, padding=1)), (IMAGE,), {}),
    "depthwise": lambda: (
        Residual(
            lambda i, o: nn.Sequential(
                nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False), nn.Conv2d(i, o, 1)
            )
        ),
        (IMAGE,),
        {},
    ),
    "group-conv": lambda: (
        Residual(lambda i, o: nn.Conv2d(i, o, 3, padding=1, groups=4)),
        (IMAGE,),
        {},
    ),
    "u-net": lambda: (UNet(), (IMAGE,), {}),
    "tied": lambda: (Tied(), (IDS,), {}),
    "packed-attention": lambda: (Attention(4, 4, True), (IDS,), {}),
    "separate-attention": lambda: (Attention(4, 4, False), (IDS,), {}),
    "gqa": lambda: (Attention(6, 2, False), (IDS,), {}),
    "gru": lambda: (Recurrent(nn.GRU, batch_first=True), (torch.randn(2, 3, 5),), {}),
    "lstm": lambda: (
        Recurrent(nn.LSTM, batch_first=True, bidirectional=True),
        (torch.randn(2, 3, 5),),
        {},
    ),
    "rnn": lambda: (Recurrent(nn.RNN, bias=False), (torch.randn(2, 3, 5),), {}),
    "spectral": lambda: (Spectral(), (torch.randn(2, 4, 3),), {}),
    "shuffle": lambda: (Shuffle(), (torch.randn(2, 4, 2, 2),), {}),
}


def _hf(kind: str, head: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        transformers.logging.set_verbosity_error()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        tokens = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **tokens, **options})
        config.use_cache = False
        model = getattr(transformers, head).from_config(config)
        if "Image" in head:
            size = config.image_size
            return model, (torch.randn(2, 3, size, size),), {}
        ids = torch.randint(3, 50, (2, 7))
        return model, (), {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}

    return build


def _mixtral() -> Built:
    options = {"intermediate_size": 24, "num_key_value_heads": 2, "num_local_experts": 4}
    model, args, kwargs = _hf("mixtral", "AutoModelForCausalLM", **options)()
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return model, args, kwargs


HF: dict[str, Callable[[], Built]] = {
    "bert": _hf("bert", "AutoModelForQuestionAnswering", intermediate_size=48),
    "gpt2": _hf("gpt2", "AutoModelForCausalLM", n_embd=32, n_layer=2, n_head=4),
    "llama": _hf(*("llama", "AutoModelForCausalLM"), intermediate_size=48, num_key_value_heads=2),
    "mixtral": _mixtral,
    "t5": _hf("t5", "AutoModelForSeq2SeqLM", d_model=32, d_kv=8, d_ff=48, num_layers=2),
    "albert": _hf("albert", "AutoModelForMaskedLM", intermediate_size=48, embedding_size=16),
    "vit": _hf(
        *("vit", "AutoModelForImageClassification"),
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    ),
}

TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 2, 1)},
    "mobilenetv3_small_050": {},
    "mixer_s32_224": {"img_size": 64},
    "densenet121": {"block_config": (2, 2, 2, 2)},
}


def _timm(name: str) -> Built:
    import timm

    options = TIMM[name]
    size = options.get("img_size", 64)
    return timm.create_model(name, num_classes=10, **options), (torch.randn(2, 3, size, size),), {}


@pytest.mark.parametrize("form", ["auto", "graph"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_models_stay_exact(name: str, form: str, erasure: Any) -> None:
    result = erasure(*PLAIN[name](), form=form)
    assert result.plan.exact, str(result.plan)
    assert result.forward <= 1e-12
    assert result.gradient <= 1e-12
    _counts_are_as_predicted(result)


@pytest.mark.parametrize("name", HF)
def test_transformers_stay_exact(name: str, erasure: Any) -> None:
    result = erasure(*HF[name]())
    assert len(result.plan.exact) >= 5
    assert result.forward <= 1e-12
    # Key biases have a gradient of exactly zero, so what is compared there is rounding.
    assert result.gradient <= 1e-11
    _counts_are_as_predicted(result)


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_stay_exact(name: str, erasure: Any) -> None:
    result = erasure(*_timm(name))
    assert len(result.plan.exact) >= 3
    assert result.forward <= 1e-12
    assert result.gradient <= 1e-11
    assert type(result.erased) is type(result.model)
    _counts_are_as_predicted(result)


def test_a_llama_stays_a_llama() -> None:
    """Its own RMS norm keeps the old divisor; only the value dimension needs another class."""
    model, args, kwargs = HF["llama"]()
    model.eval()
    plan = gtrans.prune(model, *args, same_class=True, **kwargs)
    assert any("v_proj" in name for f in plan.frozen for name in f.members)
    chosen = plan.select(sparsity=0.5, scope="local")
    plan.zero(chosen)
    slim = plan.erase(chosen, form="module")
    assert type(slim) is type(model)
    assert slim.get_parameter("model.embed_tokens.weight").shape == (50, 16)
    torch.testing.assert_close(slim(**kwargs).logits, model(**kwargs).logits, rtol=1e-5, atol=1e-6)
    longer = torch.randint(3, 50, (3, 11))
    torch.testing.assert_close(slim(longer).logits, model(longer).logits, rtol=1e-5, atol=1e-6)


def test_a_state_that_is_given_is_not_known_to_be_zero() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.rnn, self.head = nn.Linear(3, 6), nn.GRU(3, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> Any:
            y, _ = self.rnn(x, torch.sigmoid(self.start(x[:1])))
            return self.head(y)

    plan = gtrans.prune(Given(), torch.randn(4, 2, 3))
    (found,) = plan.classes
    assert found.reason.startswith("gru (")


class Regions(nn.Module):
    """Half precision around some layers, none inside that, and a scale without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.enter(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = self.a(self.norm(x))
            with torch.autocast(x.device.type, enabled=False):
                y = F.relu(y.float())
            y = self.b(y)
        with torch.no_grad():
            scale = self.norm(x).square().sum(-1, keepdim=True)
        return y.float() * scale


@pytest.mark.parametrize("form", ["module", "graph"])
def test_regions_under_autocast_and_without_gradients(form: Any) -> None:
    model, x = Regions(), torch.randn(4, 5)
    plan = gtrans.prune(model, x)
    assert [c.exact for c in plan.classes] == [True, True]
    chosen = plan.select(sparsity=0.5, scope="local")
    plan.zero(chosen)
    slim = plan.erase(chosen, form=form)
    found, expected = slim(x), model(x)
    # One unit in the last place of bfloat16, in the product that autocast halves.
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    found.sum().backward()
    expected.sum().backward()
    new, old = slim.get_parameter("b.bias").grad, model.b.bias.grad
    assert new is not None
    assert old is not None
    torch.testing.assert_close(new, old, rtol=1e-2, atol=1e-2)
    assert not torch.is_autocast_enabled("cpu")


def test_training_mode_with_batch_statistics(erasure: Any) -> None:
    result = erasure(*PLAIN["resnet"](), train=True)
    assert result.forward <= 1e-12
    assert result.gradient <= 1e-11
    running = dict(result.erased.named_buffers())
    assert set(running) == set(dict(result.model.named_buffers()))


def _counts_are_as_predicted(result: Any) -> None:
    left = result.plan.left(result.selection)
    assert sum(p.numel() for p in result.erased.parameters()) == left["parameters"]
    assert left["parameters"] < result.plan.parameters
    assert left["flops"] < result.plan.flops
