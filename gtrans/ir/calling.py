"""How a model is called so that what it does can be written down as a graph of tensors.

Models of `transformers` as they are return a cache beside their logits: an object that no graph
holds, kept for generating text, which no training step reads. While a model is called through
`captured_call` it is asked for none, and what of its result is neither a tensor nor a plain number
or text becomes None in its place.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gtrans.errors import CaptureError

_PLAIN = (
    *(torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool),
    *(int, float, bool, str, type(None)),
)


@contextmanager
def captured_call(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[list[str]]:
    """Within it, calling the model gives results that a graph can have.

    Args:
        model: the model; it is as before afterwards.
        args: the positional inputs it will be called with.
        kwargs: the keyword inputs.

    Yields:
        Names of the results that were left out, filled in by each call.

    Raises:
        CaptureError: no tensor is among the results.
    """
    left_out: list[str] = []

    def without_cache(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, "use_cache": False}

    def only_plain(_: nn.Module, _inputs: Any, output: Any) -> Any:
        found, spec = pytree.tree_flatten(output)
        if all(isinstance(value, _PLAIN) for value in found):
            return output
        if not torch.compiler.is_dynamo_compiling():  # it takes no notes while it traces
            left_out[:] = _named(output)
            if not any(isinstance(value, torch.Tensor) for value in found):
                raise CaptureError(
                    f"the forward of {type(model).__name__} returns no tensor, but {left_out[0]}; "
                    "return tensors, tuples or dicts of them, or register the class with "
                    "torch.export.register_dataclass"
                )
        kept = [value if isinstance(value, _PLAIN) else None for value in found]
        return pytree.tree_unflatten(kept, spec)

    handles = [model.register_forward_hook(only_plain)]
    if _takes_cache(model, args, kwargs):
        handles.append(model.register_forward_pre_hook(without_cache, with_kwargs=True))
    try:
        yield left_out
    finally:
        for handle in handles:
            handle.remove()


def _named(output: Any) -> list[str]:
    return [
        f"{pytree.keystr(path).strip('.') or 'the result'} ({type(value).__name__})"
        for path, value in pytree.tree_leaves_with_path(output)
        if not isinstance(value, _PLAIN)
    ]


def _takes_cache(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether `use_cache` is an option of the forward that the caller has not set."""
    signature = inspect.signature(model.forward)
    if "use_cache" not in signature.parameters:
        return False
    try:
        return "use_cache" not in signature.bind_partial(*args, **kwargs).arguments
    except TypeError:  # inputs that do not fit: the call itself says so better
        return False
