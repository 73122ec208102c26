"""Drives chosen slices to zero while a model trains, beside any optimizer.

    HESSO and score-based methods (arXiv:2409.09085)       DHSPG (arXiv:2303.06862)
    every period: take the next lowest-scored indices      at the start: take the lowest-scored
    every step t of T: their slices *= (T - t - 1)/(T - t) every step: pull them to the origin,
      the product over a period is exactly 0                 project a slice that turns away to 0
    afterwards: keep them 0                                at the end: what is left becomes 0

It runs after `optimizer.step()`, through the optimizer's own hook, so momentum and Adam moments
cannot revive what is zero. Scores are computed once a period; no step waits for the device.
Left out of the paper: the corrective cycles of HESSO-CRIC.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass, Structure
from gtrans.analysis.erase_choice import Selection, Target, choose
from gtrans.analysis.unit_scores import METHODS, score
from gtrans.errors import ModelError, OptionError, did_you_mean


@dataclass(frozen=True)
class Schedule:
    """When to sparsify, in optimizer steps.

    Attributes:
        start: steps before anything happens.
        steps: steps until the target is reached.
        periods: into how many rounds of choosing and decaying they are divided.
    """

    start: int = 0
    steps: int = 1000
    periods: int = 10

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 1:
            raise OptionError(
                f"start must be at least 0 and steps at least 1, got {self.start} and {self.steps}"
            )
        if not 1 <= self.periods <= self.steps:
            raise OptionError(
                f"periods must lie between 1 and steps={self.steps}, got {self.periods}"
            )

    def period(self, step: int) -> tuple[int, int, int]:
        """Number of the period of a step counted from `start`, the step in it, its length."""
        length, rest = divmod(self.steps, self.periods)
        # The last period takes what does not divide.
        number = min(step // length, self.periods - 1)
        size = length + (rest if number == self.periods - 1 else 0)
        return number, step - number * length, size


@dataclass
class Sparsifier:
    """Zeroes slices of a model in training until a target is met.

    Args:
        structure: the analysed program.
        classes: what may be erased.
        tensors: the model's parameters by path.
        optimizer: the optimizer that trains them.
        target: what to reach.
        method: how indices are scored, and how they go ("dhspg", else linear decay).
        schedule: when.
        multiple_of: sizes that are left are multiples of this.
        pull: λ of DHSPG, how hard slices are pulled to the origin.
        half_space: ε of DHSPG, from 0 to below 1: larger projects earlier.
    """

    structure: Structure
    classes: Sequence[ErasableClass]
    tensors: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    target: Target
    method: str = "hesso"
    schedule: Schedule = field(default_factory=Schedule)
    multiple_of: int = 1
    pull: float = 1e-3
    half_space: float = 0.0
    taken: int = field(default=0, init=False)
    zeroed: Selection = field(init=False)
    active: Selection = field(init=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"unknown method {self.method!r}{did_you_mean(self.method, METHODS)}")
        if not 0 <= self.half_space < 1:
            raise OptionError(f"half_space must lie in [0, 1), got {self.half_space}")
        rates = {p: g for g in self.optimizer.param_groups for p in g["params"]}
        unknown = [
            m.name
            for c in self.classes
            for m in c.producers
            if self.tensors[m.name].requires_grad and self.tensors[m.name] not in rates
        ]
        if unknown:
            raise ModelError(
                f"the optimizer does not hold {unknown[0]!r} of this plan's model: make it with "
                "model.parameters() of the same model object that was given to gtrans.prune"
            )
        self._groups = rates
        none = {c.name: torch.zeros(c.size, dtype=torch.bool) for c in self.classes}
        self.zeroed, self.active = none, {k: v.clone() for k, v in none.items()}
        self._factors: dict[tuple[str, int], torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}
        # An impossible target is an error now, not after a day of training.
        zero = {c.name: torch.arange(c.size, dtype=torch.float64) for c in self.classes}
        choose(self.structure, self.classes, zero, self.target, multiple_of=self.multiple_of)
        self._handle = self.optimizer.register_step_post_hook(lambda *_: self.step())

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self.taken >= self.schedule.start + self.schedule.steps

    @property
    def sparsity(self) -> float:
        """Share of the indices whose producer slices are zero for good."""
        total = sum(c.size for c in self.classes)
        return sum(int(z.sum()) for z in self.zeroed.values()) / max(1, total)

    def __str__(self) -> str:
        state = "done" if self.done else f"step {self.taken}"
        return f"{self.method} sparsifier, {state}, {self.sparsity:.1%} of the indices are zero"

    def detach(self) -> None:
        """Stops following the optimizer; what is zero is no longer held there."""
        self._handle.remove()

    @torch.no_grad()
    def step(self) -> None:
        """Does the work of one step; the optimizer calls it after its own."""
        number = self.taken - self.schedule.start
        self.taken += 1
        if number < 0:
            return
        if number < self.schedule.steps:
            if self.method == "dhspg":
                self._pull_step(number)
            else:
                self._decay_step(number)
        self._hold()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after a restart."""
        return {"taken": self.taken, "zeroed": dict(self.zeroed), "active": dict(self.active)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of a sparsifier with the same options.

        Raises:
            ModelError: it was made for other classes.
        """
        sizes = {name: len(gone) for name, gone in state["zeroed"].items()}
        if sizes != {c.name: c.size for c in self.classes}:
            raise ModelError("this sparsifier state belongs to a plan with other classes")
        self.taken = state["taken"]
        self.zeroed = {k: v.clone() for k, v in state["zeroed"].items()}
        self.active = {k: v.clone() for k, v in state["active"].items()}
        self._refresh()

    # ------------------------------------------------------------------ private

    def _decay_step(self, number: int) -> None:
        period, t, length = self.schedule.period(number)
        if t == 0:
            self._select((period + 1) / self.schedule.periods)
        self._scale(self.active, (length - t - 1) / (length - t))
        if t == length - 1:
            self._commit(self.active)

    def _pull_step(self, number: int) -> None:
        if number == 0:
            self._select(1.0)
            self._before = self._copy()
            return
        for c in self.classes:
            self._pull_class(c)
        if number == self.schedule.steps - 1:
            self._commit(self.active)
            self._before = {}
        else:
            self._before = self._copy()

    def _copy(self) -> dict[str, torch.Tensor]:
        names = {m.name for c in self.classes for m in c.producers if self.active[c.name].any()}
        return {name: self.tensors[name].detach().clone() for name in names}

    def _pull_class(self, c: ErasableClass) -> None:
        """One DHSPG step on the active slices of a class: pull, then project."""
        active = self.active[c.name] & ~self.zeroed[c.name]
        if not bool(active.any()):
            return
        sums = torch.zeros(4, c.size, dtype=torch.float64)
        rate = max(self._rate(m.name) for m in c.producers)
        for m in c.producers:
            x, old = self.tensors[m.name].detach(), self._before[m.name]
            # What the optimizer did, whatever it is, is the descent direction of this step.
            v = (old - x) / max(rate, 1e-30)
            for i, value in enumerate((x * old, old * old, old * v, v * v)):
                sums[i] += _per_index(value, m.dim, m.labels, c.size)
        along, square, dot, speed = sums
        norm = square.sqrt().clamp(min=1e-12)
        strength = pull_strength(dot, norm, speed, self.pull)
        share = torch.where(active, rate * strength / norm, 0.0)
        inside = along - share * square >= self.half_space * square
        for m in c.producers:
            self._subtract(m.name, m.dim, m.labels, share)
        self.zeroed[c.name] |= active & ~inside
        if not bool(inside[active].all()):
            self._refresh()

    def _subtract(self, name: str, dim: int, labels: torch.Tensor, share: torch.Tensor) -> None:
        parameter, old = self.tensors[name], self._before[name]
        per_index = torch.where(labels >= 0, share[labels.clamp(min=0)], 0.0)
        shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
        parameter.sub_(old * per_index.to(old.device, old.dtype).reshape(shape))

    def _rate(self, name: str) -> float:
        group = self._groups.get(self.tensors[name])
        return 0.0 if group is None else float(group.get("lr", 1e-3))

    def _select(self, progress: float) -> None:
        scores = score(self.classes, self.tensors, self.method)
        scope = "isomorphic" if self.method == "isomorphic" else "global"
        chosen = choose(
            self.structure,
            self.classes,
            scores,
            self.target.at(progress),
            multiple_of=self.multiple_of,
            chosen=self.zeroed,
            scope=scope,
        )
        self.active = {name: gone & ~self.zeroed[name] for name, gone in chosen.items()}

    def _commit(self, chosen: Selection) -> None:
        for name, gone in chosen.items():
            self.zeroed[name] = self.zeroed[name] | gone
        self.active = {name: torch.zeros_like(gone) for name, gone in chosen.items()}
        self._refresh()

    def _scale(self, chosen: Selection, factor: float) -> None:
        for c in self.classes:
            if bool(chosen[c.name].any()):
                vector = torch.where(chosen[c.name], factor, 1.0)
                for m in c.producers:
                    self._multiply(m.name, m.dim, m.labels, vector)

    def _multiply(self, name: str, dim: int, labels: torch.Tensor, factor: torch.Tensor) -> None:
        parameter = self.tensors[name]
        per_index = torch.where(labels >= 0, factor[labels.clamp(min=0)], 1.0)
        shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
        parameter.mul_(per_index.to(parameter.device, parameter.dtype).reshape(shape))

    def _refresh(self) -> None:
        """Recomputes what `_hold` multiplies with; one vector per parameter dimension."""
        self._factors = {}
        for c in self.classes:
            if not bool(self.zeroed[c.name].any()):
                continue
            for m in c.producers:
                parameter = self.tensors[m.name]
                gone = (m.labels >= 0) & self.zeroed[c.name][m.labels.clamp(min=0)]
                keep = (~gone).to(parameter.device, parameter.dtype)
                key = (m.name, m.dim)
                self._factors[key] = self._factors.get(key, 1.0) * keep

    def _hold(self) -> None:
        for (name, dim), keep in self._factors.items():
            parameter = self.tensors[name]
            parameter.mul_(keep.reshape([-1 if d == dim else 1 for d in range(parameter.ndim)]))


def _per_index(value: torch.Tensor, dim: int, labels: torch.Tensor, size: int) -> torch.Tensor:
    others = [d for d in range(value.ndim) if d != dim]
    vector = (value.sum(others) if others else value).double().cpu()
    hit = labels >= 0
    return torch.zeros(size, dtype=torch.float64).index_add_(0, labels[hit], vector[hit])


def pull_strength(
    dot: torch.Tensor,
    norm: torch.Tensor,
    speed: torch.Tensor,
    base: float,
    amplify: float = 2.0,
    limit: float = 10.0,
) -> torch.Tensor:
    """λ of DHSPG for each index: `base`, or more where the plain step would grow the norm.

    The step is -(v + λ x/‖x‖). For x · v < 0 it shrinks ‖x‖ above λ_min = -x·v/‖x‖ and stays a
    descent direction below λ_max = -‖v‖²‖x‖/(x·v).

    Args:
        dot: x · v.
        norm: ‖x‖.
        speed: ‖v‖².
        base: λ where the plain step shrinks the norm by itself.
        amplify: how far above λ_min to go.
        limit: never more than this times `base`, unless λ_max demands the middle.
    """
    growing = dot < 0
    safe = torch.where(growing, dot, -1.0)
    lowest, highest = -safe / norm, -speed * norm / safe
    wanted = (amplify * lowest).clamp(min=base, max=base * limit)
    wanted = torch.where(wanted >= highest, (lowest + highest) / 2, wanted)
    return torch.where(growing, wanted, base)
