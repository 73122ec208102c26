"""Drives chosen slices to zero while a model trains, beside any optimizer.

    HESSO and score-based methods (arXiv:2409.09085)       DHSPG (arXiv:2303.06862)
    every period: take the next lowest-scored indices      at the start: take the lowest-scored
    every step t of T: their slices *= (T - t - 1)/(T - t) every step: pull them to the origin,
      the product over a period is exactly 0                 project a slice that turns away to 0
    afterwards: keep them 0                                at the end: what is left becomes 0

It runs after `optimizer.step()`, through the optimizer's own hook, so momentum and Adam moments
cannot revive what is zero. Scores are computed once a period; no step waits for the device.
HESSO-CRIC spends the first half of its steps on finding out which slices to take (see
`corrective_cycles`), and the second on their decay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass
from gtrans.analysis.erase_choice import Selection, Target
from gtrans.analysis.unit_scores import METHODS, Scores, score
from gtrans.errors import ModelError, OptionError, did_you_mean
from gtrans.runtime.corrective_cycles import CorrectiveCycles

CYCLES = 5
"""Cycles of HESSO-CRIC at most."""


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


class Choice(Protocol):
    """Picks what goes."""

    def choose(self, scores: Scores, target: Target, chosen: Selection) -> Selection:
        """What to erase for a target, given what is erased already."""
        ...


@dataclass
class Sparsifier:
    """Zeroes slices of a model in training until a target is met.

    Args:
        choice: picks what goes from scores.
        classes: what may be erased.
        tensors: the model's parameters by path.
        optimizer: the optimizer that trains them.
        target: what to reach.
        method: how indices are scored, and how they go ("dhspg", else linear decay).
        schedule: when.
        pull: λ of DHSPG, how hard slices are pulled to the origin.
        half_space: ε of DHSPG, from 0 to below 1: larger projects earlier.
    """

    choice: Choice
    classes: Sequence[ErasableClass]
    tensors: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    target: Target
    method: str = "hesso"
    schedule: Schedule = field(default_factory=Schedule)
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
        self._factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._pulled: list[_Pulled] = []
        self._cycles: CorrectiveCycles | None = None
        self._decay_from = -1
        # An impossible target is an error now, not after a day of training.
        zero = {c.name: torch.arange(c.size, dtype=torch.float64) for c in self.classes}
        self.choice.choose(zero, self.target, none)
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
            elif self.method == "hesso-cric":
                self._corrected_step(number)
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
            self._refresh()
        self._decay((length - t - 1) / (length - t))
        if t == length - 1:
            self._commit(self.active)

    def _decay(self, factor: float) -> None:
        for parameter, keep, active in self._factors:
            if active is not None:
                parameter.mul_(keep.sub(active, alpha=1 - factor))

    def _corrected_step(self, number: int) -> None:
        """Cycles in the first half, then one decay of what they found."""
        half = max(1, self.schedule.steps // 2)
        if self._cycles is None and number < half:
            self._cycles = CorrectiveCycles(
                self.tensors,
                lambda: score(self.classes, self.tensors, "hesso"),
                lambda scores: self.choice.choose(scores, self.target, self.zeroed),
                max(1, half // CYCLES),
                CYCLES,
            )
        cycles = self._cycles
        if cycles is not None and not cycles.done:
            factor = cycles.step()
            self.active = cycles.decaying
            self._refresh()
            self._decay(factor)
            cycles.finish()
            return
        if self._decay_from < 0:
            self._decay_from = number
            scores = score(self.classes, self.tensors, "hesso") if cycles is None else cycles.mean()
            self.active = self.choice.choose(scores, self.target, self.zeroed)
            self._refresh()
        left = self.schedule.steps - number
        self._decay((left - 1) / left)
        if left == 1:
            self._commit(self.active)

    def _pull_step(self, number: int) -> None:
        if number == 0:
            self._select(1.0)
        if not self._pulled:
            self._pulled = [_Pulled(c, self.tensors) for c in self.classes]
        for pulled in self._pulled:
            self._pull_class(pulled)
        if number == self.schedule.steps - 1:
            self._commit(self.active)
            self._pulled = []
        for pulled in self._pulled:
            pulled.keep(self.active[pulled.cls.name] & ~self.zeroed[pulled.cls.name])

    def _pull_class(self, pulled: "_Pulled") -> None:
        """One DHSPG step on the active slices of a class: pull, then project."""
        if not pulled.rows:
            return
        name = pulled.cls.name
        rate = max(self._rate(m.name) for m in pulled.cls.producers)
        dot, norm, speed, along = pulled.moments(max(rate, 1e-30))
        strength = pull_strength(dot, norm, speed, self.pull)
        active = self.active[name] & ~self.zeroed[name]
        share = torch.where(active, rate * strength / norm, 0.0)
        inside = along - share * norm * norm >= self.half_space * norm * norm
        pulled.subtract(share)
        self.zeroed[name] |= active & ~inside
        if not bool(inside[active].all()):
            self._refresh()

    def _rate(self, name: str) -> float:
        group = self._groups.get(self.tensors[name])
        return 0.0 if group is None else float(group.get("lr", 1e-3))

    def _select(self, progress: float) -> None:
        scores = score(self.classes, self.tensors, self.method)
        chosen = self.choice.choose(scores, self.target.at(progress), self.zeroed)
        self.active = {name: gone & ~self.zeroed[name] for name, gone in chosen.items()}

    def _commit(self, chosen: Selection) -> None:
        for name, gone in chosen.items():
            self.zeroed[name] = self.zeroed[name] | gone
        self.active = {name: torch.zeros_like(gone) for name, gone in chosen.items()}
        self._refresh()

    def _refresh(self) -> None:
        """Recomputes what parameters are multiplied with: a vector for each of their dimensions."""
        found: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for c in self.classes:
            gone, active = self.zeroed[c.name], self.active[c.name]
            if not bool((gone | active).any()):
                continue
            for m in c.producers:
                hit, place = m.labels >= 0, m.labels.clamp(min=0)
                keep, decay = ~(hit & gone[place]), hit & active[place]
                before = found.get((m.name, m.dim), (torch.tensor(True), torch.tensor(False)))
                found[m.name, m.dim] = (before[0] & keep, before[1] | decay)
        self._factors = []
        for (name, dim), (keep, decay) in found.items():
            parameter = self.tensors[name]
            shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
            kept = keep.to(parameter.device, parameter.dtype).reshape(shape)
            decaying = (decay & keep).to(parameter.device, parameter.dtype).reshape(shape)
            self._factors.append((parameter, kept, decaying if bool(decay.any()) else None))

    def _hold(self) -> None:
        for parameter, keep, _ in self._factors:
            parameter.mul_(keep)


@dataclass
class _Pulled:
    """The active slices of a class, as they were before the optimizer's step."""

    cls: ErasableClass
    tensors: dict[str, nn.Parameter]
    rows: list[tuple[nn.Parameter, int, torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list
    )

    def keep(self, active: torch.Tensor) -> None:
        """Notes the slices of the active indices: parameter, dimension, rows, labels, values."""
        self.rows = []
        for m in self.cls.producers if bool(active.any()) else ():
            hit = (m.labels >= 0) & active[m.labels.clamp(min=0)]
            rows = hit.nonzero().flatten()
            parameter = self.tensors[m.name].detach()
            places = rows.to(parameter.device)
            held = torch.atleast_1d(parameter).index_select(m.dim, places).clone()
            self.rows.append((self.tensors[m.name], m.dim, places, m.labels[rows], held))

    def moments(self, rate: float) -> tuple[torch.Tensor, ...]:
        """For every index x·v, ‖x‖, ‖v‖² and x·x', with x before and x' after the step.

        What the optimizer did, whatever it is, is the descent direction v of this step.
        """
        sums = torch.zeros(4, self.cls.size, dtype=torch.float64)
        for parameter, dim, rows, labels, old in self.rows:
            x = torch.atleast_1d(parameter.detach()).index_select(dim, rows)
            v = (old - x) / rate
            others = [d for d in range(x.ndim) if d != dim]
            parts = [p.sum(others) if others else p for p in (old * v, old * old, v * v, x * old)]
            sums.index_add_(1, labels, torch.stack(parts).double().cpu())
        dot, square, speed, along = sums
        return dot, square.sqrt().clamp(min=1e-12), speed, along

    def subtract(self, share: torch.Tensor) -> None:
        """Takes a share of what they were from the slices."""
        for parameter, dim, rows, labels, old in self.rows:
            shape = [-1 if d == dim else 1 for d in range(old.ndim)]
            step = old * share[labels].to(old.device, old.dtype).reshape(shape)
            torch.atleast_1d(parameter.detach()).index_add_(dim, rows, step, alpha=-1)


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
