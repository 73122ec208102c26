"""Trace plain torch code into operators, once for all places where it would give the same.

A pass inserts the same code for every layer of a model, and once more in the copy on which it is
tried; tracing it takes torch some milliseconds per operator.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

T = TypeVar("T")

_MOST = 512
_PLAIN = (int, float, str, torch.dtype, torch.device, type(None))

_seen: dict[Hashable, fx.Graph] = {}


def traced(
    function: Callable[..., Any], args: Sequence[Any], values: Sequence[torch.Tensor], mode: Any
) -> fx.Graph:
    """The operators of a function; their placeholders stand for the arguments that are nodes.

    Args:
        function: plain torch code; returns a tensor or a tuple of tensors.
        args: nodes, or constants.
        values: of the nodes, in order.
        mode: the fake mode of the values, or None.

    Returns:
        A graph without values, not to be changed: it may be handed out again.
    """
    key = _key(function, args, values) if mode is not None else None
    if key in _seen:
        return _seen[key]
    positions = [i for i, a in enumerate(args) if isinstance(a, fx.Node)]

    def of_tensors(*tensors: torch.Tensor) -> Any:
        full = list(args)
        for position, tensor in zip(positions, tensors, strict=True):
            full[position] = tensor
        return function(*full)

    with mode or nullcontext():
        graph = make_fx(of_tensors)(*values).graph
    if key is not None:
        for node in graph.nodes:
            node.meta = {}
        if len(_seen) >= _MOST:
            _seen.clear()
        _seen[key] = graph
    return graph


@contextmanager
def without_collection() -> Iterator[None]:
    """Pauses Python's cycle collector: over a growing graph its passes take superlinear time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def outside_tracing(function: Callable[[], T]) -> T:
    """Runs a function on real tensors even while torch is tracing with fake ones.

    Torch's modes belong to a thread, so a new thread has none.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _key(
    function: Callable[..., Any], args: Sequence[Any], values: Sequence[torch.Tensor]
) -> Hashable | None:
    """What the operators depend on; None if that cannot be told, or would keep graphs alive."""
    bound = function if isinstance(function, partial) else partial(function)
    constants = [None if isinstance(a, fx.Node) else a for a in args]
    given = (*bound.args, *bound.keywords.values(), *constants)
    name = getattr(bound.func, "__qualname__", "<locals>")
    sizes = [n for v in values for n in (*v.shape, *v.stride(), v.storage_offset())]
    if (
        "<" in name
        or not all(_is_plain(g) for g in given)
        or not all(isinstance(n, int) for n in sizes)
    ):
        return None
    kinds = tuple((v.dtype, v.device, v.shape, v.stride(), v.storage_offset()) for v in values)
    types = tuple(type(g) for g in given)
    nodes = tuple(isinstance(a, fx.Node) for a in args)
    default = torch.get_default_dtype()
    return bound.func, tuple(bound.keywords), given, types, nodes, kinds, default


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, f.name)) for f in fields(value))
    return isinstance(value, _PLAIN)
