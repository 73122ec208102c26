"""Exact erasure: half of every exact class of many models, and how fast the analysis is.

Every model gets random parameters and statistics in float64. The producer slices of half the
indices of every exact class are set to zero; outputs and the gradients of all kept parameters of
the erased model are compared with those of the zeroed one. A cast to float32 inside a model is
read as float64, so that it does not hide a difference behind rounding.

The columns "erasable" and "peer" are the shares of the parameters that some exact class, and some
group of torch-pruning, reaches; torch-pruning's counts where the model still runs after it.
"""

import inspect
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import gtrans
from benchmarks.pruning_parts import peer_pruning
from benchmarks.table import Table, verdict
from benchmarks.zoo import ZOO, Entry, allow_broken_torchvision, huggingface, timm_model
from gtrans.analysis.erasable import find_structure
from gtrans.errors import CaptureError
from gtrans.ir.program import Leaf, Program, export_program
from gtrans.rewrite.erase_graph import cut

TARGET_MODELS = 40
FORWARD, GRADIENT = 1e-12, 1e-10
ANALYSIS_S = 0.1

_QUICK = frozenset(
    {
        *("gpt2", "llama", "bert", "t5", "vit", "mlp", "unet", "moe", "timm-resnet18"),
        *("timm-vit", "timm-convnext", "timm-mobilenet", "torch-transformer", "reversible"),
    }
)


def _timm(name: str, size: int = 64, **options: Any) -> Entry:
    return Entry(f"timm-{name}", "timm", lambda: timm_model(name, size, **options))


def _hf(name: str, head: str, **options: Any) -> Entry:
    return Entry(f"hf-{name}", "transformers", lambda: huggingface(name, head, **options))


_SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

MORE = (
    _hf("roberta", "AutoModelForSequenceClassification", **_SIZES, intermediate_size=48),
    _hf("mistral", "AutoModelForCausalLM", **_SIZES, intermediate_size=48, num_key_value_heads=2),
    _hf("qwen3", "AutoModelForCausalLM", **_SIZES, intermediate_size=48, num_key_value_heads=2),
    _hf("phi", "AutoModelForCausalLM", **_SIZES, intermediate_size=48),
    _hf("albert", "AutoModelForMaskedLM", **_SIZES, intermediate_size=48, embedding_size=16),
    *(
        _timm(name)
        for name in (
            *("regnety_002", "resnext50_32x4d", "resnetv2_50", "efficientnet_b0"),
            *("ghostnet_100", "mobilenetv4_conv_small", "dpn68", "repvgg_a0", "hrnet_w18_small"),
            *("res2net50_26w_4s", "mobilevit_s", "edgenext_xx_small", "poolformer_s12"),
            *("convformer_s18", "nfnet_l0"),
        )
    ),
    _timm("vgg11_bn", mlp_ratio=0.05),
    _timm("inception_v3", 96),
    _timm("gmlp_s16_224", img_size=64),
    _timm("resmlp_12_224", img_size=64),
    _timm("beit_base_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3),
    _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    _timm("coatnet_0_rw_224", img_size=64),
    _timm("levit_128s", 224),
    _timm("xcit_nano_12_p16_224", img_size=64),
    _timm("efficientformer_l1", 224),
)


class InDouble(TorchFunctionMode):
    """Reads float32 as float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = pytree.tree_map(
            lambda v: torch.float64 if v is torch.float32 else v, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def main(quick: bool, device: str) -> int:
    """Runs the benchmark; returns 0 where every model is exact and the analysis fast enough."""
    allow_broken_torchvision()
    logging.getLogger("gtrans").setLevel(logging.ERROR)  # the column "form" says it
    entries = [e for e in (*ZOO, *MORE) if not quick or e.name in _QUICK]
    columns = ("model", "classes", "exact", "erasable", "peer", "left", "forward", "gradient")
    table = Table((*columns, "form", "analysis"), (32, 9, 7, 10, 10, 8, 10, 10, 8, 10, 12))
    exact, wrong, outside, ahead, peers = 0, 0, 0, 0, 0
    for entry in entries:
        torch.manual_seed(0)
        try:
            row = _measure(entry.build, device)
        except CaptureError as error:
            outside += 1
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            table.row(entry.name, "not captured:", reason[:60])
            continue
        except Exception as error:  # one model must not end the others' run
            wrong += 1
            table.row(entry.name, f"{type(error).__name__}: {error}"[:90], " <-- fails")
            continue
        if not row["exact"]:
            outside += 1
            table.row(entry.name, row["classes"], 0, "0%", row["peer"], "nothing exact to erase")
            continue
        good = row["forward"] <= FORWARD and row["gradient"] <= GRADIENT
        exact, wrong = exact + good, wrong + (not good)
        ahead += row["share"] >= row["peer_share"]
        peers += row["peer_share"] > 0
        cells = [entry.name, row["classes"], row["exact"], f"{row['share']:.0%}", row["peer"]]
        cells += [
            f"{row['left']:.3f}",
            f"{row['forward']:.0e}",
            f"{row['gradient']:.0e}",
            row["form"],
        ]
        table.row(*cells, f"{1e3 * row['seconds']:.0f} ms", "" if good else "<-- differs")
    bert_s, nodes = _bert_seconds()
    if peer_pruning.installed():
        print(
            f"torch-pruning gives a model that runs on {peers} of these; gtrans reaches at least "
            f"as many parameters on {ahead} of {exact + wrong}"
        )
    print(f"analysis of a 12-layer BERT ({nodes} nodes): {1e3 * bert_s:.1f} ms")
    growth = None if quick else _growth()
    enough = exact >= (len(entries) - outside if quick else TARGET_MODELS)
    ok = enough and not wrong and bert_s < ANALYSIS_S and (growth is None or growth < 2)
    return verdict(
        ok,
        f"{exact} of {exact + wrong} models exact after erasing half of every exact class "
        f"({outside} more not captured or with nothing to erase); analysis of a 12-layer BERT "
        f"{1e3 * bert_s:.1f} ms",
    )


def _measure(build: Callable[[], tuple[nn.Module, dict[str, Any]]], device: str) -> dict[str, Any]:
    model, batch = build()
    try:
        return _measured(model, batch, device)
    except CaptureError:
        if batch.pop("labels", None) is None:
            raise
        return _measured(model, batch, device)  # some losses branch on the values of labels


def _measured(model: nn.Module, batch: dict[str, Any], device: str) -> dict[str, Any]:
    model = model.double().eval().to(device)
    batch = pytree.tree_map_only(torch.Tensor, lambda t: _double(t).to(device), batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch["use_cache"] = False  # a cache that is returned would be part of the interface
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with suppress(AttributeError, ValueError):
        # The default product of experts has no float64 kernel.
        choose: Any = model.set_experts_implementation
        choose("batched_mm")
    _randomise(model)
    peer_share, why = 0.0, "-"
    if peer_pruning.installed():
        with InDouble():
            peer_share, why = peer_pruning.erasable_share(model, batch)
    with InDouble():
        program = export_program(model, (), batch)
        start = time.perf_counter()
        structure = find_structure(program)
        seconds = time.perf_counter() - start
        plan = gtrans.PrunePlan(model, structure, (), batch)
        generator = torch.Generator().manual_seed(1)
        chosen = {
            c.name: torch.randperm(c.size, generator=generator) < c.size // 2 for c in plan.exact
        }
        plan.zero(chosen)
        erased = plan.erase(chosen)
        expected, actual = _step(model, batch), _step(erased, batch)
    masks = structure.masks({c.atom: chosen[c.name] for c in plan.exact})
    return {
        "classes": len(plan.classes),
        "exact": len(plan.exact),
        "share": 1 - structure.parameters({c.atom: 0 for c in plan.exact}) / plan.parameters,
        "peer_share": peer_share,
        "peer": why or f"{peer_share:.0%}",
        "left": plan.left(chosen)["parameters"] / plan.parameters,
        "forward": max(
            (
                float((a - b).norm() / a.norm().clamp(min=1e-30))
                for a, b in zip(expected, actual, strict=True)
            ),
            default=float("inf"),
        ),
        "gradient": _gradient_error(model, erased, masks),
        "form": "graph" if isinstance(erased, fx.GraphModule) else "same",
        "seconds": seconds,
    }


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            fan = max(1, p[0].numel()) if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape) / fan**0.5 + (0.5 if p.ndim == 1 else 0.0))
        for name, b in model.named_buffers():
            if "running_var" in name:
                b.copy_(torch.rand(b.shape) + 0.5)
            elif "running_mean" in name:
                b.copy_(torch.randn(b.shape) * 0.1)


def _step(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    leaves = pytree.tree_leaves(model(**batch))
    outputs = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for t in outputs:
        weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        total = total + (t * weight.to(t.device)).sum().cpu()
    total.backward()
    return [t.detach() for t in outputs]


def _gradient_error(
    model: nn.Module, erased: nn.Module, masks: dict[str, list[torch.Tensor]]
) -> float:
    old = dict(model.named_parameters(remove_duplicate=False))
    largest = max((float(p.grad.norm()) for p in old.values() if p.grad is not None), default=1.0)
    worst = 0.0
    for name, p in erased.named_parameters():
        reference = old[name].grad
        if reference is not None and p.grad is not None:
            reference = cut(reference, masks[name])
            # Biases before a normalisation have a gradient of zero: compare with the others' size.
            scale = max(float(reference.norm()), 1e-4 * largest)
            worst = max(worst, float((reference - p.grad).norm()) / scale)
    return worst


def _bert_seconds() -> tuple[float, int]:
    sizes = {**_SIZES, "num_hidden_layers": 12}
    model, batch = huggingface("bert", "AutoModelForQuestionAnswering", **sizes)
    batch.pop("labels", None)
    program = export_program(model.eval(), (), batch)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        find_structure(program)
        best = min(best, time.perf_counter() - start)
    return best, len(program.graph.nodes)


def _growth() -> float:
    """Seconds per node at 100,000 nodes over those at 10,000, on a stack of residual blocks."""
    per_node = []
    for blocks in (1_600, 16_000):
        program = _stack(blocks)
        start = time.perf_counter()
        find_structure(program)
        seconds, nodes = time.perf_counter() - start, len(program.graph.nodes)
        per_node.append(seconds / nodes)
        print(f"analysis of {nodes} nodes: {seconds:.2f} s, {1e6 * seconds / nodes:.0f} us a node")
    return per_node[1] / per_node[0]


def _stack(blocks: int) -> Program:
    """The program of `x = x + b(relu(a(x)))`, repeated; written down, for capture is slower."""
    base = export_program(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),), {})
    graph = fx.Graph()
    leaves: dict[fx.Node, Leaf] = {}
    tensors: dict[fx.Node, torch.Tensor] = {}
    aten = torch.ops.aten
    value = torch.randn(2, 4)

    def parameter(name: str) -> fx.Node:
        node = graph.placeholder(name.replace(".", "_"))
        leaves[node], tensors[node] = Leaf(name, "parameter"), nn.Parameter(torch.randn(4, 4))
        node.meta["val"] = tensors[node]
        return node

    weights = [parameter(f"w{i}.weight") for i in range(2 * blocks + 2)]
    x = graph.placeholder("x")
    leaves[x], x.meta["val"] = Leaf("x", "input"), value

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = value
        return node

    x = call(aten.linear.default, x, weights[-2])
    for i in range(blocks):
        hidden = call(aten.relu.default, call(aten.linear.default, x, weights[2 * i]))
        x = call(aten.add.Tensor, x, call(aten.linear.default, hidden, weights[2 * i + 1]))
    graph.output((call(aten.linear.default, x, weights[-1]),))
    return replace(base, module=fx.GraphModule(nn.Module(), graph), leaves=leaves, tensors=tensors)
