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
    search = _Search(type(model), config, model, smaller)
    for found in search.solutions(()):
        if _same(type(model)(copy.deepcopy(found)), smaller, args, kwargs):
            return found
    raise Inexpressible(search.problem)


_Move = tuple[Setting, int]


class _Search:
    """Changes settings one by one, or two at a time, as long as more shapes fit."""

    def __init__(
        self, cls: type[nn.Module], config: Any, model: nn.Module, smaller: nn.Module
    ) -> None:
        self.cls, self.config = cls, config
        self.wanted = {name: tuple(t.shape) for name, t in smaller.state_dict().items()}
        self.left = TRIALS
        self.problem = ""
        self._fewest = len(self.wanted) + 1
        self._seen: set[frozenset[_Move]] = set()
        changes = _changes(model, smaller)
        self.moves = [
            (setting, value)
            for setting in _settings(config, ())
            for value in _candidates(setting.value, changes)
        ]

    def solutions(self, done: tuple[_Move, ...]) -> Iterator[Any]:
        """Configs whose models have the shapes that are wanted, the likeliest first."""
        wrong = self._misfits(done)
        if wrong is None:
            return
        if not wrong:
            self.problem = "the sizes fit, but models built from it give other results"
            yield self._config(done)
            return
        self._note(wrong)
        for count in (1, 2):
            free = [m for m in self.moves if all(m[0] != setting for setting, _ in done)]
            better: list[tuple[int, tuple[_Move, ...]]] = []
            for moves in itertools.combinations(free, count):
                left = self._misfits((*done, *moves))
                if left is not None and len(left) < len(wrong):
                    better.append((len(left), moves))
            for _, moves in sorted(better, key=lambda pair: pair[0]):
                after = (*done, *moves)
                if frozenset(after) not in self._seen:
                    self._seen.add(frozenset(after))
                    yield from self.solutions(after)
            if better:
                return

    def _note(self, wrong: list[str]) -> None:
        if len(wrong) < self._fewest:
            self._fewest = len(wrong)
            self.problem = (
                f"no setting of {type(self.config).__name__} gives {wrong[0]} the shape "
                f"{self.wanted.get(wrong[0], '(none)')}; equal sizes in all layers "
                "(scope='local') help"
            )

    def _config(self, moves: Sequence[_Move]) -> Any:
        config = copy.deepcopy(self.config)
        for setting, value in moves:
            setting.set(config, value)
        return config

    def _misfits(self, moves: Sequence[_Move]) -> list[str] | None:
        """Names of the tensors that do not fit; None if nothing can be built, or no more tried."""
        self.left -= 1
        if self.left < 0:
            return None
        try:
            with torch.device("meta"):
                built = self.cls(self._config(moves)).state_dict()
        except Exception:  # sizes that the class refuses, in whatever way it does
            return None
        shapes = {name: tuple(t.shape) for name, t in built.items()}
        return [n for n in {**self.wanted, **shapes} if shapes.get(n) != self.wanted.get(n)]


def _same(twin: nn.Module, smaller: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    twin.load_state_dict(smaller.state_dict())
    like = next(smaller.parameters())
    twin.to(like.device, like.dtype).train(smaller.training)
    a, b = (_outputs(m, args, kwargs) for m in (smaller, twin))
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-5)
        for x, y in zip(a, b, strict=True)
    )


def _changes(model: nn.Module, smaller: nn.Module) -> list[tuple[int, int]]:
    """Old and new sizes of parameters, and values of integer attributes, that differ."""
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    pairs = [
        pair
        for name, tensor in smaller.state_dict().items()
        for pair in zip(shapes.get(name, tensor.shape), tensor.shape, strict=True)
    ]
    before = {(a.path, a.name, a.index): a.value for a in find_attributes(model)}
    after = {(a.path, a.name, a.index): a.value for a in find_attributes(smaller)}
    pairs += [(value, after[key]) for key, value in before.items() if key in after]
    return list(dict.fromkeys((old, new) for old, new in pairs if old != new))


def _candidates(value: int | None, changes: Sequence[tuple[int, int]]) -> list[int]:
    """What a setting may have become: what its value has, then what a factor of a size has."""
    if value is None:
        return list(dict.fromkeys(new for _, new in changes))
    same = [new for old, new in changes if old == value]
    shrunk = [value * new // old for old, new in changes if value * new % old == 0]
    return list(dict.fromkeys(v for v in (*same, *shrunk) if v > 0 and v != value))


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
