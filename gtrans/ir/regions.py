"""Regions of a captured forward under `torch.autocast` or `torch.no_grad`, made part of the graph.

Capture hands such a region over as one call of a graph within the graph. Analyses and rewrites
should see its operators among the others:

    wrap_with_set_grad_enabled(False, body, x)      body(detach(x)): nothing in it has a gradient
    wrap_with_autocast("cpu", bfloat16, ..., body, x)   body(x), each node marked with the region

What leaves such a graph again (`gtrans.rewrite.erase_graph`) puts marked nodes back under autocast.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_MARK = "gtrans_autocast"


@dataclass(frozen=True)
class Autocast:
    """The arguments of `torch.autocast` around a node."""

    device: str
    dtype: torch.dtype | None
    enabled: bool
    cache: bool | None


def autocasts(node: fx.Node) -> tuple[Autocast, ...]:
    """The autocast regions around a node, outermost first."""
    found: tuple[Autocast, ...] = node.meta.get(_MARK, ())
    return found


@contextmanager
def under_autocast(node: fx.Node) -> Iterator[None]:
    """Runs what a node runs under the regions around it."""
    with ExitStack() as stack:
        for r in autocasts(node):
            options: dict[str, Any] = {"dtype": r.dtype, "cache_enabled": r.cache}
            stack.enter_context(torch.autocast(r.device, enabled=r.enabled, **options))
        yield


def inline_regions(module: fx.GraphModule) -> None:
    """Replaces calls of such regions by their operators; other graphs within the graph stay."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "wrap_with_autocast":
            device, dtype, enabled, cache, body, *given = node.args
            region = (Autocast(device, dtype, enabled, cache),)
            _inline(module, node, body, given, region)
        elif name == "wrap_with_set_grad_enabled":
            enabled, body, *given = node.args
            _inline(module, node, body, given if enabled else _detached(node, given), ())
    module.graph.eliminate_dead_code()


def _inline(
    module: fx.GraphModule,
    call: fx.Node,
    body: Any,
    given: Sequence[Any],
    region: tuple[Autocast, ...],
) -> None:
    inner = getattr(module, str(body.target))
    inline_regions(inner)
    # A region with gradients inside one without is the only thing that detached inputs change.
    made: dict[fx.Node, Any] = {}
    operands = iter(given)
    outputs: Any = ()
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(operands)
        elif node.op == "output":
            outputs = fx.map_arg(node.args[0], made.__getitem__)
        else:
            with module.graph.inserting_before(call):
                twin = module.graph.node_copy(node, made.__getitem__)
            if node.op == "get_attr":
                twin.target = _own(module, inner, str(node.target))
            twin.meta[_MARK] = region + autocasts(node)
            made[node] = twin
    if isinstance(outputs, (tuple, list)):
        for user in list(call.users):
            position: Any = user.args[1]
            user.replace_all_uses_with(outputs[position])
            module.graph.erase_node(user)
    else:
        call.replace_all_uses_with(outputs)
    module.graph.erase_node(call)


def _detached(call: fx.Node, given: Sequence[Any]) -> list[Any]:
    made: list[Any] = []
    for value in given:
        held = value.meta.get("val") if isinstance(value, fx.Node) else None
        if isinstance(held, torch.Tensor) and held.is_floating_point():
            with call.graph.inserting_before(call):
                twin = call.graph.call_function(torch.ops.aten.detach.default, (value,))
            twin.meta = {k: v for k, v in value.meta.items() if k in ("val", "nn_module_stack")}
            made.append(twin)
        else:
            made.append(value)
    return made


def _own(module: fx.GraphModule, inner: fx.GraphModule, name: str) -> str:
    """Moves an attribute of the inner graph to the outer one; returns its name there."""
    number = sum(1 for key in vars(module) if key.startswith("_of_region"))
    new = f"_of_region{number + len(module._buffers) + len(module._modules)}"
    setattr(module, new, getattr(inner, name))
    return new
