"""What autograd itself keeps for the backward of some outputs, outside of compiled graphs.

Dynamo runs what it cannot capture as plain Python. Whether it did, and what that keeps, shows in
autograd's record: compiled graphs are one node each, and every other node holds tensors under names
that begin with `_saved_`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

_COMPILED = "CompiledFunction"


def recorded_bytes(outputs: Any, resident: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages that autograd holds for outputs, each once, compiled graphs apart.

    Args:
        outputs: what a model returned, nested as it may be.
        resident: tensors that are in memory anyway: parameters, buffers and inputs. What was
            recorded before these were made belongs to somebody else. Sparse tensors count nothing.
    """
    resident = list(resident)
    leaves = [v for v in pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor)]
    pending: list[Any] = [v.grad_fn for v in leaves if v.grad_fn is not None]
    counted = {_storage(t) for t in (*resident, *leaves) if _is_dense(t)}
    seen: set[Any] = {t.grad_fn for t in resident}
    total = 0
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions if following is not None]
        for tensor in () if _COMPILED in type(node).__name__ else _held(node):
            if _storage(tensor) not in counted:
                counted.add(_storage(tensor))
                total += tensor.untyped_storage().nbytes()
    return total


def _held(node: Any) -> list[torch.Tensor]:
    held = []
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            try:
                held += pytree.tree_leaves(getattr(node, name))
            except RuntimeError:  # torch hands out nothing that was written in place since
                continue
    return [v for v in held if isinstance(v, torch.Tensor) and _is_dense(v)]


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
