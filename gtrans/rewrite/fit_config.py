"""Fits a model's config to a smaller model, so that its class builds that one from the config.

Which setting means which size is written nowhere. What is known is how sizes of parameters and of
integer attributes have changed; from that follow a few values for each setting. They are tried by
building the model without memory and comparing the shapes of its parameters; at the end a real one
is built, given the smaller model's parameters, and its results are compared.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gtrans.ir.calling import captured_call
from gtrans.rewrite.fit_attributes import Inexpressible, same_state
from gtrans.rewrite.size_attributes import find_attributes
from gtrans.runtime.norms import LongerLayerNorm, LongerRMSNorm

TRIALS = 400
"""How many configs are tried."""


@dataclass(frozen=True)
class Setting:
    """An integer of a config, or of a config or list within it; None where it is not set."""

    place: tuple[str | int, ...]
    value: int | None

    def set(self, config: Any, value: int) -> None:
        """Writes another value."""
        *outer, last = self.place
        holder, lists = config, []
        for step in outer:
            lists.append((holder, step))
            holder = getattr(holder, str(step))
        if isinstance(last, int):  # a list or tuple is replaced, as others may share it
            owner, name = lists[-1]
            items = list(holder)
            items[last] = value
            setattr(owner, str(name), type(holder)(items))
        else:
            setattr(holder, last, value)


def fit_config(
    model: nn.Module, smaller: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """A copy of a model's config that describes a smaller model of its class.

    Args:
        model: the model, with a `config` that its class is built from.
        smaller: what was made of it.
        args: positional inputs to compare with.
        kwargs: keyword inputs.

    Raises:
        Inexpressible: no setting builds the smaller model; the message says where it differs.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise Inexpressible(f"{type(model).__name__} has no `config`")
    for path, module in smaller.named_modules():
        if isinstance(module, (LongerLayerNorm, LongerRMSNorm, torch.fx.GraphModule)):
            raise Inexpressible(
                f"{path or 'the model'} is a {type(module).__name__}, which the class does not "
                "build; norm='restart' gives stock norms"
            )
    wanted = {name: tuple(t.shape) for name, t in smaller.state_dict().items()}
    search = _Search(type(model), config, wanted, _changes(model, smaller))
    found = search.run()
    twin = type(model)(copy.deepcopy(found))
    twin.load_state_dict(smaller.state_dict())
    twin.to(next(smaller.parameters()).dtype).train(smaller.training)
    a, b = (_outputs(m, args, kwargs) for m in (smaller, twin))
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-3, atol=1e-5):
            raise Inexpressible(f"a model built from the config gives another output {i}")
    return found


class _Search:
    """Changes settings one by one, or two at a time, as long as more shapes fit."""

    def __init__(
        self,
        cls: type[nn.Module],
        config: Any,
        wanted: dict[str, tuple[int, ...]],
        changes: dict[int | None, list[int]],
    ) -> None:
        self.cls, self.wanted, self.config = cls, wanted, copy.deepcopy(config)
        self.left = TRIALS
        self.moves = [
            (setting, value)
            for setting in _settings(self.config, ())
            for value in changes.get(setting.value, ())
        ]

    def run(self) -> Any:
        """The config that fits.

        Raises:
            Inexpressible: there is none.
        """
        wrong = self._misfits(())
        while wrong:
            better = self._better(len(wrong))
            if better is None:
                name = wrong[0]
                raise Inexpressible(
                    f"no setting of {type(self.config).__name__} gives {name} the shape "
                    f"{self.wanted.get(name, '(none)')}; equal sizes in all layers "
                    "(scope='local') help"
                )
            moves, wrong = better
            for setting, value in moves:
                setting.set(self.config, value)
            self.moves = [m for m in self.moves if all(m[0] != setting for setting, _ in moves)]
        return self.config

    def _better(self, most: int) -> tuple[Sequence[tuple[Setting, int]], list[str]] | None:
        for count in (1, 2):
            tried = [
                (moves, wrong)
                for moves in itertools.combinations(self.moves, count)
                if (wrong := self._misfits(moves)) is not None and len(wrong) < most
            ]
            if tried:
                return min(tried, key=lambda pair: len(pair[1]))
        return None

    def _misfits(self, moves: Sequence[tuple[Setting, int]]) -> Any:
        """Names of the tensors that do not fit; None if nothing can be built."""
        self.left -= 1
        if self.left < 0:
            return None
        config = copy.deepcopy(self.config)
        try:
            for setting, value in moves:
                setting.set(config, value)
            with torch.device("meta"):
                built = {n: tuple(t.shape) for n, t in self.cls(config).state_dict().items()}
        except Exception:  # sizes that the class refuses, in whatever way it does
            return None
        names = {**self.wanted, **built}
        return [n for n in names if built.get(n) != self.wanted.get(n)]


def _changes(model: nn.Module, smaller: nn.Module) -> dict[int | None, list[int]]:
    """For each old size the new ones; for None, a setting that was left open, all new ones."""
    found: dict[int | None, dict[int, None]] = {}
    pairs = [
        (old, new)
        for name, tensor in smaller.state_dict().items()
        for old, new in zip(model.state_dict()[name].shape, tensor.shape, strict=True)
    ]
    before = {(a.path, a.name, a.index): a.value for a in find_attributes(model)}
    after = {(a.path, a.name, a.index): a.value for a in find_attributes(smaller)}
    pairs += [(value, after[key]) for key, value in before.items() if key in after]
    for old, new in pairs:
        if old != new:
            found.setdefault(old, {})[new] = None
            found.setdefault(None, {})[new] = None
    return {old: list(new) for old, new in found.items()}


def _settings(config: Any, place: tuple[str | int, ...]) -> Iterator[Setting]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        here = (*place, name)
        if value is None or (type(value) is int and value > 1):
            yield Setting(here, value)
        elif type(value) in (list, tuple) and all(type(v) is int for v in value):
            yield from (Setting((*here, i), v) for i, v in enumerate(value))
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _settings(value, here)


def _outputs(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    with same_state(model), captured_call(model, args, kwargs):
        leaves = pytree.tree_leaves(model(*args, **kwargs))
    return [t for t in leaves if isinstance(t, torch.Tensor)]
