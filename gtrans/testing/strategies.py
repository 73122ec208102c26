"""Random models for hypothesis, as lists of layer names.

A drawn value is a description that prints in one line and can be pasted into a test; only its
`build` makes a module. Shrinking drops layers, not weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from gtrans.errors import OptionError, did_you_mean
from gtrans.testing.layers import FEATURES_LAST, IMAGE, SEQUENCE, Coupling, Maker, Residual

Family = Literal["vector", "sequence", "tokens", "image"]
Ending = Literal["plain", "several", "dictionary", "classify", "loss"]

LAYERS: dict[Family, dict[str, Maker]] = {
    "vector": FEATURES_LAST,
    "sequence": SEQUENCE,
    "tokens": SEQUENCE,
    "image": IMAGE,
}
"""The layers of each family of models, by name."""

_WRAPPERS = ("residual", "coupling")
_VOCABULARY = 11
_BATCHED = ("batch_norm", "batch_norm2d")


@dataclass(frozen=True)
class ModelSpec:
    """The description of a small model and its inputs.

    Attributes:
        family: what the inputs look like: vectors [B, D], sequences [B, T, D], token numbers [B, T]
            (embedded; with a tied head if it ends in "classify"), or images [B, D, T, T + 1].
        layers: names from `LAYERS`; "residual(a,b)" and "coupling(a,b)" wrap others.
        width: D.
        batch: B.
        length: T.
        ending: what the model returns: one value; a list of several losses, one of them from the
            middle of the model; a dictionary; or a cross-entropy loss and its logits.
        dtype: of parameters and floating inputs.
        zeros: the first third of the slices of every parameter is zero, as pruning leaves it.
        frozen: freezes every n-th parameter; 0 freezes none.
        strided: inputs are not contiguous.
        input_gradient: floating inputs require a gradient.
        training: whether dropout and batch norm are in training mode.
        seed: of parameters and inputs.
    """

    family: Family = "vector"
    layers: tuple[str, ...] = ()
    width: int = 6
    batch: int = 3
    length: int = 5
    ending: Ending = "plain"
    dtype: torch.dtype = torch.float32
    zeros: bool = False
    frozen: int = 0
    strided: bool = False
    input_gradient: bool = False
    training: bool = True
    seed: int = 0

    def __repr__(self) -> str:
        default = ModelSpec()
        given = {k: getattr(self, k) for k in self.__dataclass_fields__}
        shown = [f"{k}={v!r}" for k, v in given.items() if v != getattr(default, k)]
        return f"ModelSpec({', '.join(shown)})"

    def build(self) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """Makes the model and its inputs. The global random state stays as it is.

        Raises:
            OptionError: a layer name is unknown in this family.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = RandomModel(self).to(self.dtype).train(self.training)
            return model, self._inputs()

    @property
    def random(self) -> bool:
        """Whether two forwards differ by dropout."""
        return self.training and any("dropout" in name for name in self.layers)

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        shape: tuple[int, ...]
        if self.family == "tokens":
            shape = (self.batch, self.length)
            return (_strided(torch.randint(_VOCABULARY, shape), self.strided),)
        if self.family == "image":
            shape = (self.batch, self.width, self.length, self.length + 1)
        elif self.family == "sequence":
            shape = (self.batch, self.length, self.width)
        else:
            shape = (self.batch, self.width)
        x = _strided(torch.randn(shape, dtype=torch.float64).to(self.dtype), self.strided)
        return (x.requires_grad_(self.input_gradient),)


class RandomModel(nn.Module):
    """The module that a `ModelSpec` describes."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.width
        last = spec.family != "image"
        self.embedding = nn.Embedding(_VOCABULARY, width) if spec.family == "tokens" else None
        self.first = nn.Linear(width, width) if last else nn.Conv2d(width, width, 1)
        self.layers = nn.ModuleList(_make(spec, name, width) for name in spec.layers)
        self.last = nn.Linear(width, width, bias=False) if last else nn.Conv2d(width, width, 1)
        self.ending = spec.ending
        self.classes = nn.Linear(width, _VOCABULARY, bias=False) if last else None
        if self.embedding is not None and self.classes is not None:
            self.classes.weight = self.embedding.weight
        for i, parameter in enumerate(self.parameters()):
            if spec.frozen and i % spec.frozen == spec.frozen - 1:
                parameter.requires_grad_(False)
            if spec.zeros:
                with torch.no_grad():
                    parameter[: len(parameter) // 3].zero_()

    def forward(self, x: torch.Tensor) -> Any:
        if self.embedding is not None:
            x = self.embedding(x)
        x = self.first(x)
        middle = x
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == len(self.layers) // 2:
                middle = x
        if self.ending in ("classify", "loss") and self.classes is not None:
            logits = self.classes(x).flatten(0, -2)
            labels = torch.arange(logits.shape[0], device=x.device) % _VOCABULARY
            loss = F.cross_entropy(logits, labels)
            return loss if self.ending == "loss" else (loss, logits)
        y = self.last(x)
        if self.ending == "several":
            return [y.square().mean(), middle.sum() * 0.1, torch.tanh(y).flatten()[0]]
        if self.ending == "dictionary":
            return {"hidden": middle, "output": y}
        return y


def _make(spec: ModelSpec, name: str, width: int) -> nn.Module:
    wrapper, _, rest = name.partition("(")
    if wrapper in _WRAPPERS and rest.endswith(")"):
        inner = [n for n in rest[:-1].split(",") if n]
        if wrapper == "residual":
            return Residual(nn.Sequential(*[_make(spec, n, width) for n in inner]))
        half = width // 2
        if half == 0:
            return nn.Identity()
        first = nn.Sequential(*[_make(spec, n, half) for n in inner])
        second = nn.Sequential(*[_make(spec, n, half) for n in inner])
        return Coupling(first, second, half, 1 if spec.family == "image" else -1)
    known = LAYERS[spec.family]
    if name not in known:
        raise OptionError(
            f"unknown layer {name!r} of {spec.family} models{did_you_mean(name, known)}"
        )
    if name in _BATCHED and spec.family == "vector" and spec.batch == 1:
        name = "layer_norm"  # batch norm refuses to train on a single value
    return known[name](width)


def _strided(x: torch.Tensor, strided: bool) -> torch.Tensor:
    if not strided:
        return x
    wide = torch.stack([x, x], -1)
    return wide[..., 0].transpose(0, 1).contiguous().transpose(0, 1)


@dataclass(frozen=True)
class Choice:
    """What `models` may draw; the fields are those of `ModelSpec`."""

    families: Sequence[Family] = ("vector", "sequence", "tokens", "image")
    endings: Sequence[Ending] = ("plain", "several", "dictionary", "classify", "loss")
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16)
    most_layers: int = 5
    without: Sequence[str] = field(default=())


def models(choice: Choice | None = None) -> st.SearchStrategy[ModelSpec]:
    """Random small models: odd sizes, batches of one, strided inputs, frozen parameters, ties.

    Args:
        choice: narrows what is drawn; by default everything is.
    """
    chosen = choice or Choice()
    return st.sampled_from(list(chosen.families)).flatmap(lambda f: _models_of(f, chosen))


def layer_lists(family: Family, choice: Choice) -> st.SearchStrategy[tuple[str, ...]]:
    """Random lists of layer names of one family."""
    plain = st.sampled_from([n for n in LAYERS[family] if n not in choice.without])
    few = st.lists(plain, min_size=1, max_size=2)
    wrapped = st.builds(
        lambda wrapper, inner: f"{wrapper}({','.join(inner)})", st.sampled_from(_WRAPPERS), few
    )
    layer = st.one_of(plain, plain, wrapped)
    return st.lists(layer, min_size=0, max_size=choice.most_layers).map(tuple)


def _models_of(family: Family, choice: Choice) -> st.SearchStrategy[ModelSpec]:
    endings = [e for e in choice.endings if e not in ("classify", "loss") or family != "image"]
    return st.builds(
        ModelSpec,
        family=st.just(family),
        layers=layer_lists(family, choice),
        width=st.sampled_from([1, 2, 3, 5, 6, 8, 8, 9]),
        batch=st.integers(1, 4),
        length=st.integers(2, 5),
        ending=st.sampled_from(endings),
        dtype=st.sampled_from(list(choice.dtypes)),
        zeros=st.sampled_from([False, False, False, True]),
        frozen=st.sampled_from([0, 0, 2, 3]),
        strided=st.booleans(),
        input_gradient=st.booleans() if family != "tokens" else st.just(False),
        training=st.sampled_from([True, True, True, False]),
        seed=st.integers(0, 3),
    )
