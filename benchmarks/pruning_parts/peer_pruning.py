"""What torch-pruning, if it is installed, makes of a model: for the `erasure` benchmark.

It is not a dependency: `pip install --no-deps --target FOLDER torch-pruning`, then
`PYTHONPATH=FOLDER python -m benchmarks erasure`.
"""

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

LIMIT_S = 10
"""Its search for groups need not end; after so many seconds it counts as failed."""


def installed() -> bool:
    """Whether torch-pruning can be imported."""
    return find_spec("torch_pruning") is not None


def erasable_share(model: nn.Module, batch: dict[str, Any]) -> tuple[float, str]:
    """The share of the parameters that some group of torch-pruning reaches.

    It is counted only if the model still runs after half of every group is pruned. Layers that
    give an output, which it would prune too, are left out for it.

    Returns:
        The share, and why it is zero.
    """
    tp: Any = import_module("torch_pruning")
    model = copy.deepcopy(model)
    try:
        with _limited(LIMIT_S):
            kept = _output_layers(model, batch)
            graph = tp.DependencyGraph().build_dependency(
                model, batch, forward_fn=_forward, output_transform=_floats
            )
            groups = list(graph.get_all_groups(ignored_layers=kept))
            share = _share(model, graph, groups)
            _pruner(tp, model, batch, 0.5, kept).step()
            _forward(model, batch)
    except TimeoutError:
        return 0.0, "timeout"
    except Exception as error:  # whatever it raises is what its user would see
        return 0.0, type(error).__name__
    return share, ""


def pruned(model: nn.Module, batch: dict[str, Any], ratio: float) -> nn.Module:
    """A copy of a model with a share of all its channels pruned by torch-pruning's magnitude.

    What it leaves to its user is done: attention like BERT's is named to it, its heads stay,
    the attribute with their width is set, and frozen parameters are thawed meanwhile.
    """
    tp: Any = import_module("torch_pruning")
    model = copy.deepcopy(model)
    attention: list[Any] = [m for m in model.modules() if hasattr(m, "attention_head_size")]
    heads = {layer: m.num_attention_heads for m in attention for layer in (m.query, m.key, m.value)}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    model.requires_grad_()  # it follows the autograd graph, in which frozen layers are missing
    _pruner(tp, model, batch, ratio, _output_layers(model, batch), heads).step()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for m in attention:
        m.attention_head_size = m.query.out_features // m.num_attention_heads
    return model


def _pruner(
    tp: Any,
    model: nn.Module,
    batch: dict[str, Any],
    ratio: float,
    kept: list[nn.Module],
    heads: dict[nn.Module, int] | None = None,
) -> Any:
    return tp.pruner.BasePruner(
        model,
        batch,
        tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=kept,
        num_heads=heads or {},
        forward_fn=_forward,
        output_transform=_floats,
    )


def _share(model: nn.Module, graph: Any, groups: list[Any]) -> float:
    touched = {p: torch.zeros(p.shape, dtype=torch.bool) for p in model.parameters()}
    for group in groups:
        for dependency, indices in group:
            module = dependency.target.module
            if isinstance(module, nn.Parameter):
                dim = dependency.target.pruning_dim
                touched[module].index_fill_(dim, torch.tensor(indices), True)
                continue
            out = graph.is_out_channel_pruning_fn(dependency.handler)
            swapped = isinstance(module, (nn.modules.conv._ConvTransposeNd, nn.Embedding))
            for name, p in module.named_parameters(recurse=False):
                if p.ndim == 1 and (out or name == "weight") and len(indices) <= len(p):
                    touched[p][torch.tensor(indices)] = True
                elif p.ndim > 1:
                    dim = int(out == swapped)
                    touched[p].index_fill_(dim, torch.tensor(indices), True)
    total = sum(p.numel() for p in touched)
    return sum(int(t.sum()) for t in touched.values()) / max(1, total)


def _output_layers(model: nn.Module, batch: dict[str, Any]) -> list[nn.Module]:
    """The layers whose result is a result of the model, found by running it."""
    results: dict[int, nn.Module] = {}
    held: list[Any] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            held.append(output)
            results[output.data_ptr()] = module

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [m.register_forward_hook(note) for m in layers]
    try:
        outputs = _floats(_forward(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return [results[t.data_ptr()] for t in outputs if t.data_ptr() in results]


def _forward(model: nn.Module, batch: dict[str, Any]) -> Any:
    return model(**batch)


def _floats(output: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
