"""Few-bit derivatives and compressed residuals against eager, hooks and `torch.compile`.

First the tables: the dynamic program against alternating descent from many starts (which is how
published tables were made), and the error of two bits of GELU (at most 0.0081 for N(0, 1)). Then
memory and time, all variants side by side:

    eager            plain autograd
    hooks bf16/int8  eager with saved-tensor hooks that convert, int8 with a scale per tensor
    compile          torch.compile with its defaults, whose partitioner recomputes by minimum cut
    gtrans           the exact default passes
    few-bit          few-bit,default
    4 bits           compress{bits=4},default
    2 bits           pool-places,compress{bits=2},default

Without low-rank updates `few-bit` has nothing to do, with them 2 bits have little: those rows are
left out. Targets, from the papers: at least 29 % less peak than eager on the ViT with low-rank
updates, at least 13.8 % on BERT with them, by few-bit; at least 55 % less kept than eager on the
fully trained ViT, by four bits; a tenth of eager's activations on the ResNet, by two bits. And of
the time of `torch.compile` at most 1.05 with few-bit, 1.15 with four and two bits, on every model.
With `--quick` the model is so small that its time is overhead: that is not judged.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import gtrans
from benchmarks.networks import loss_of
from benchmarks.table import Table, verdict
from benchmarks.zoo import Built, huggingface, timm_model
from gtrans.analysis.derivative_tables import Samples, nearest_table, sample
from gtrans.analysis.measure import (
    interleaved_seconds,
    measured_peak,
    paired_ratio,
    saved_for_backward,
)

PASSES = {
    "gtrans": "default",
    "few-bit": "few-bit,default",
    "4 bits": "compress{bits=4},default",
    "2 bits": "pool-places,compress{bits=2},default",
}
_TABLE_ERROR = 0.0081
_MIB = 2**20
# Shares of eager's memory, and times of a step relative to `torch.compile`.
_MEMORY = {
    ("vit lora", "few-bit", "peak"): 0.71,
    ("bert lora", "few-bit", "peak"): 1 - 0.138,
    ("vit", "4 bits", "saved"): 0.45,
    ("resnet", "2 bits", "saved"): 0.1,
}
_TIME = {"few-bit": 1.05, "4 bits": 1.15, "2 bits": 1.15}


@dataclass(frozen=True)
class Figure:
    """What one variant of one model takes.

    Attributes:
        saved: bytes kept for the backward.
        peak: bytes at the peak of the step, parameters and inputs not counted.
        time: of a step, relative to `torch.compile`.
        error: relative error of all gradients together against eager.
    """

    saved: int
    peak: int
    time: float
    error: float


def main(quick: bool, device: str) -> int:
    """Prints the tables, then a row per model and variant; 0 if all targets hold."""
    missed = _tables()
    table = Table(
        ["model", "variant", "saved MiB", "of eager", "peak MiB", "of eager", "time", "error"],
        [12, 13, 11, 10, 10, 10, 9, 9],
    )
    figures: dict[tuple[str, str], Figure] = {}
    for name, build in _models(quick).items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, batch = build()
        model.to(device)
        batch = {k: v.to(device) for k, v in batch.items()}
        left_out = "2 bits" if "lora" in name else "few-bit"
        measured = _measure(model, batch, device, quick, [v for v in PASSES if v != left_out])
        base = measured["eager"]
        for variant, f in measured.items():
            figures[name, variant] = f
            table.row(
                name,
                variant,
                f"{f.saved / _MIB:.2f}",
                f"{f.saved / base.saved - 1:+.0%}",
                f"{f.peak / _MIB:.2f}",
                f"{f.peak / base.peak - 1:+.0%}",
                f"{f.time:.3f}",
                f"{f.error:.3f}",
            )
    return _judge(figures, missed, quick)


def _judge(figures: dict[tuple[str, str], Figure], missed: list[str], quick: bool) -> int:
    said: list[str] = []
    for (model, variant, kind), bound in _MEMORY.items():
        if (model, variant) in figures:
            found, base = figures[model, variant], figures[model, "eager"]
            share = getattr(found, kind) / getattr(base, kind)
            what = f"{model} {kind} with {variant}"
            said.append(f"{what} {share:.3f} of eager's (<= {bound:.3f})")
            missed += [what] if share > bound else []
    if not quick:
        for variant, bound in _TIME.items():
            times = {m: f.time for (m, v), f in figures.items() if v == variant}
            said.append(f"time with {variant} up to {max(times.values()):.3f} (<= {bound})")
            missed += [f"time of {m} with {variant}" for m, t in times.items() if t > bound]
    text = ", ".join(said) + ("; times not judged at this size" if quick else "")
    return verdict(not missed, text + (f"; missed: {', '.join(missed)}" if missed else ""))


# ---------------------------------------------------------------------- tables


def _tables() -> list[str]:
    """The mean square error of tables for N(0, 1); what missed its target."""
    table = Table(["derivative of", "bits", "program", "descent", "starts as good"],
                  [14, 6, 11, 11, 16])  # fmt: skip
    missed: list[str] = []
    for name, act in (("gelu", F.gelu), ("silu", F.silu), ("tanh", torch.tanh)):
        samples = sample(_derivative(act))
        for bits in (1, 2, 3):
            best = nearest_table(samples, bits, "normal").mean_square
            descents = [_descent(samples, 2**bits, seed) for seed in range(12)]
            as_good = sum(d <= best + 1e-6 for d in descents)
            table.row(name, bits, f"{best:.6f}", f"{min(descents):.6f}", f"{as_good} of 12")
            if best > min(descents) + 1e-6:
                missed.append(f"table of {name} with {bits} bits")
            if name == "gelu" and bits == 2 and best > _TABLE_ERROR:
                missed.append("error of GELU in two bits")
    return missed


def _derivative(act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def derivative(x: torch.Tensor) -> torch.Tensor:
        at = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(act(at).sum(), at)
        return found

    return derivative


def _descent(samples: Samples, count: int, seed: int) -> float:
    """Alternates between the best levels for the thresholds and the best thresholds for them."""
    x, h = samples.x.ravel(), samples.h.ravel()
    w = np.exp(-x * x / 2) * np.tile(samples.weights, len(samples.x))
    thresholds = np.sort(np.random.default_rng(seed).normal(0, 1.5, count - 1))
    level = np.zeros(count)
    for _ in range(200):
        code = np.searchsorted(thresholds, x)
        mass = np.bincount(code, w, count)
        level = np.where(mass > 0, np.bincount(code, w * h, count) / np.maximum(mass, 1e-30), level)
        for k in range(count - 1):
            low = thresholds[k - 1] if k else -10.0
            high = thresholds[k + 1] if k + 2 < count else 10.0
            inside = (x >= low) & (x <= high)
            gain = w[inside] * ((h[inside] - level[k]) ** 2 - (h[inside] - level[k + 1]) ** 2)
            if len(gain):
                thresholds[k] = x[inside][np.cumsum(gain).argmin()]
    code = np.searchsorted(thresholds, x)
    return float((w * (h - level[code]) ** 2).sum() / w.sum())


# ---------------------------------------------------------------------- memory and time


def _measure(
    model: nn.Module, batch: dict[str, Any], device: str, quick: bool, chosen: Collection[str]
) -> dict[str, Figure]:
    forwards: dict[str, Callable[[], torch.Tensor]] = {}
    models: dict[str, nn.Module] = {}
    for variant in ("eager", "hooks bf16", "hooks int8", "compile", *chosen):
        twin = models[variant] = copy.deepcopy(model)
        if variant == "compile":
            twin.compile()
        elif variant in PASSES:
            gtrans.optimize(twin, passes=PASSES[variant], on_error="raise")
        forwards[variant] = _forward(twin, batch, variant)
    steps = {v: _step(models[v], f) for v, f in forwards.items()}
    exact = _gradients(models["eager"], forwards["eager"])
    errors = {v: _error(exact, _gradients(models[v], f)) for v, f in forwards.items()}
    seconds = interleaved_seconds(steps, rounds=5 if quick else 21, warm_up=1, device=device)
    return {
        v: Figure(
            saved_for_backward(forwards[v], device=device),
            measured_peak(steps[v], device=device).bytes,
            paired_ratio(seconds[v], seconds["compile"]),
            errors[v],
        )
        for v in forwards
    }


def _forward(model: nn.Module, batch: dict[str, Any], variant: str) -> Callable[[], torch.Tensor]:
    resident = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def forward() -> torch.Tensor:
        with _hooks(variant, resident) if variant.startswith("hooks") else nullcontext():
            return loss_of(model(**batch))

    return forward


def _step(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)

    return step


@contextmanager
def _hooks(variant: str, resident: set[int]) -> Iterator[None]:
    """Converts what autograd saves; parameters, small tensors and integers stay."""

    def pack(x: torch.Tensor) -> Any:
        kept = x.untyped_storage().data_ptr() in resident or x.numel() < 4096
        if kept or x.dtype is not torch.float32:
            return x
        if variant == "hooks bf16":
            return x.to(torch.bfloat16)
        scale = x.abs().amax() / 127
        return (x / scale.clamp_min(1e-30)).round().to(torch.int8), scale

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, tuple):
            return kept[0].to(torch.float32) * kept[1]
        found: torch.Tensor = kept
        return found.float() if found.dtype is torch.bfloat16 else found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _gradients(model: nn.Module, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    forward().backward()
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def _error(exact: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# ---------------------------------------------------------------------- models


def _models(quick: bool) -> dict[str, Callable[[], Built]]:
    layers, width, heads, count = (1, 64, 2, 4) if quick else (2, 384, 6, 8)
    shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers,
                             "num_attention_heads": heads, "vocab_size": 500}  # fmt: skip

    def text(built: Built) -> Built:
        ids = torch.randint(3, 500, (count, 64 if quick else 192))
        return built[0], {"input_ids": ids, "labels": ids}

    def vit() -> Built:
        side = 64 if quick else 112
        model = timm_model("vit_tiny_patch16_224", patch_size=8, embed_dim=width, num_heads=heads,
                           depth=layers, img_size=side)[0]  # fmt: skip
        return model, {"x": torch.randn(count, 3, side, side)}

    def bert() -> Built:
        return text(huggingface("bert", "AutoModelForMaskedLM", **shape, **_no_dropout("bert"),
                                intermediate_size=4 * width))  # fmt: skip

    def gpt2() -> Built:
        return text(huggingface("gpt2", n_layer=layers, n_embd=width, n_head=heads, vocab_size=500,
                                **_no_dropout("gpt2")))  # fmt: skip

    def llama() -> Built:
        return text(huggingface("llama", **shape, intermediate_size=width * 43 // 16))

    def resnet() -> Built:
        return timm_model("resnet18")[0], {"x": torch.randn(8, 3, 128, 128)}

    found: dict[str, Callable[[], Built]] = {
        "vit lora": lambda: _lora(vit(), ["qkv"]),
        "vit": vit,
        "resnet": resnet,
        "bert lora": lambda: _lora(bert(), ["query", "value"]),
        "bert": bert,
        "gpt2 lora": lambda: _lora(gpt2(), ["c_attn"]),
        "gpt2": gpt2,
        "llama lora": lambda: _lora(llama(), ["q_proj", "v_proj"]),
        "llama": llama,
    }
    return {"vit lora": found["vit lora"]} if quick else found


def _no_dropout(kind: str) -> dict[str, Any]:
    """Without dropout gradients of different compilers can be compared."""
    names = {
        "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "gpt2": ("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    }
    return dict.fromkeys(names[kind], 0.0)


def _lora(built: Built, targets: list[str]) -> Built:
    from peft import LoraConfig, get_peft_model

    model, batch = built
    wrapped: Any = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    return wrapped.train(), batch
