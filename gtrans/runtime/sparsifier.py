"""Drives chosen slices to zero while a model trains, beside any optimizer.

    HESSO and score-based methods (arXiv:2409.09085)       DHSPG (arXiv:2303.06862)
    every period: take the next lowest-scored indices      at the start: take the lowest-scored
    every step t of T: their slices *= (T - t - 1)/(T - t) every step: pull them to the origin, fast
      the product over a period is exactly 0                 enough to be there at the end; project
                                                             a slice that turns away to 0
    afterwards: keep them 0                                at the end: what is left becomes 0

It runs around `optimizer.step()`, through the optimizer's own hooks, so momentum and Adam moments
cannot revive what is zero. Scores are computed once a period; between, HESSO multiplies each
parameter once. HESSO-CRIC spends the first half of its steps on finding out which slices to take
(see `corrective_cycles`), and the second on their decay; for DHSPG see `half_space`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass
from gtrans.analysis.erase_choice import Selection, Target, TargetOptions
from gtrans.analysis.unit_scores import METHODS, Scores, score
from gtrans.errors import ModelError, OptionError, did_you_mean
from gtrans.runtime.corrective_cycles import CorrectiveCycles
from gtrans.runtime.half_space import PulledClass

PULLED = ("dhspg", "h2spg")
"""Methods whose slices are pulled to the origin; all others decay linearly."""
CYCLES = 5
"""Cycles of HESSO-CRIC at most."""
LOOK = 32
"""Every so many steps DHSPG looks at what the optimizer does; dearer than to multiply."""


class SparsifierOptions(TargetOptions, total=False):
    """What and when to sparsify; one of `sparsity`, `params` and `flops` is given.

    Attributes:
        start: optimizer steps before anything happens; a tenth of training is a good value.
        steps: optimizer steps until the target is reached (1000 by default).
        periods: rounds of choosing and decaying (10 by default).
        pull: λ of DHSPG, how hard slices are pulled to the origin (1e-3 by default).
        half_space: ε of DHSPG, from 0, the default, to below 1: larger projects earlier.
    """

    start: int
    steps: int
    periods: int
    pull: float
    half_space: float


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
        method: how indices are scored, and how they go (`PULLED`, else linear decay).
        schedule: when.
        pull: λ of DHSPG.
        half_space: ε of DHSPG.
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

    @classmethod
    def of(
        cls,
        choice: Choice,
        classes: Sequence[ErasableClass],
        tensors: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        method: str,
        options: Mapping[str, Any],
    ) -> "Sparsifier":
        """A sparsifier with `SparsifierOptions`.

        Raises:
            OptionError: an option is unknown or out of range.
            PlanError: the target cannot be reached.
            ModelError: the optimizer holds the parameters of another model.
        """
        parts = {
            part: {k: options[k] for k in part.__annotations__ if k in options}
            for part in (Target, Schedule, cls)
        }
        known = SparsifierOptions.__annotations__
        for name in options:
            if name not in known:
                raise OptionError(f"unknown option {name!r}{did_you_mean(name, known)}")
        target, schedule = Target(**parts[Target]), Schedule(**parts[Schedule])
        return cls(choice, classes, tensors, optimizer, target, method, schedule, **parts[cls])

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
        self._factors: list[_Factor] = []
        self._pulled: list[PulledClass] = []
        self._shares: dict[str, torch.Tensor] = {}
        self._cycles: CorrectiveCycles | None = None
        self._decided = False
        # An impossible target is an error now, not after a day of training.
        zero = {c.name: torch.arange(c.size, dtype=torch.float64) for c in self.classes}
        self.choice.choose(zero, self.target, none)
        self._handles = [
            self.optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            self.optimizer.register_step_post_hook(lambda *_: self.step()),
        ]

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
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def step(self) -> None:
        """Does the work of one step; the optimizer calls it after its own."""
        number = self.taken - self.schedule.start
        self.taken += 1
        if number < 0:
            return
        if number >= self.schedule.steps:
            self._scale(1.0)
        elif self.method in PULLED:
            self._pull_step(number)
        elif self.method == "hesso-cric":
            self._corrected_step(number)
        else:
            self._decay_step(number)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after a restart; restore model and optimizer as well."""
        return {
            "taken": self.taken,
            "zeroed": {k: v.clone() for k, v in self.zeroed.items()},
            "active": {k: v.clone() for k, v in self.active.items()},
            "shares": dict(self._shares),
            "decided": self._decided,
            "cycles": None if self._cycles is None else self._cycles.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of a sparsifier with the same options.

        Raises:
            ModelError: it was made for other classes.
        """
        sizes = {name: len(gone) for name, gone in state["zeroed"].items()}
        if sizes != {c.name: c.size for c in self.classes}:
            raise ModelError("this sparsifier state belongs to a plan with other classes")
        self.taken, self._decided = state["taken"], state["decided"]
        self.zeroed = {k: v.clone() for k, v in state["zeroed"].items()}
        self.active = {k: v.clone() for k, v in state["active"].items()}
        self._shares, self._cycles = dict(state["shares"]), None
        if state["cycles"] is not None:
            self._cycles = self._new_cycles()
            self._cycles.load_state_dict(state["cycles"])
        self._refresh()

    # ------------------------------------------------------------------ decay

    def _decay_step(self, number: int) -> None:
        period, t, length = self.schedule.period(number)
        if t == 0:
            self._select((period + 1) / self.schedule.periods)
        self._scale((length - t - 1) / (length - t))
        if t == length - 1:
            self._commit(self.active)

    def _corrected_step(self, number: int) -> None:
        """Cycles in the first half, then one decay of what they found."""
        if self._cycles is None and number < max(1, self.schedule.steps // 2):
            self._cycles = self._new_cycles()
        cycles = self._cycles
        if cycles is not None and not cycles.done:
            factor = cycles.step()
            if self.active is not cycles.decaying:
                self.active = cycles.decaying
                self._refresh()
            self._scale(factor)
            cycles.finish()
            return
        if not self._decided:
            self._decided = True
            scores = score(self.classes, self.tensors, "hesso") if cycles is None else cycles.mean()
            self.active = self.choice.choose(scores, self.target, self.zeroed)
            self._refresh()
        left = self.schedule.steps - number
        self._scale((left - 1) / left)
        if left == 1:
            self._commit(self.active)

    def _new_cycles(self) -> CorrectiveCycles:
        return CorrectiveCycles(
            self.tensors,
            lambda: score(self.classes, self.tensors, "hesso"),
            lambda scores: self.choice.choose(scores, self.target, self.zeroed),
            max(1, self.schedule.steps // 2 // CYCLES),
            CYCLES,
        )

    # ------------------------------------------------------------------ pull

    def _before_step(self) -> None:
        """Notes what is pulled before the optimizer moves it, if this step is looked at."""
        number = self.taken - self.schedule.start
        looked_at = 0 < number < self.schedule.steps and number % LOOK == LOOK // 2
        if self.method in PULLED and looked_at:
            moving = {name: a & ~self.zeroed[name] for name, a in self.active.items()}
            self._pulled = [PulledClass(c, self.tensors, moving[c.name]) for c in self.classes]

    def _pull_step(self, number: int) -> None:
        """One DHSPG step on the active slices: pull, and project where it was looked at."""
        if number == 0:
            self._select(1.0)
            least = self._least(self.schedule.steps)
            self._pull_by({name: torch.full((len(a),), least) for name, a in self.active.items()})
        if self._pulled:
            shares, least = {}, self._least(self.schedule.steps - number)
            for pulled in self._pulled:
                name = pulled.cls.name
                rate = max((self._rate(m.name) for m in pulled.cls.producers), default=0.0)
                shares[name], turned = pulled.look(
                    max(rate, 1e-30), self.pull, self.half_space, least
                )
                self.zeroed[name] |= turned
            self._pulled = []
            self._pull_by(shares)
        self._scale(0.0)
        if number == self.schedule.steps - 1:
            self._commit(self.active)
            self._scale(0.0)

    def _pull_by(self, shares: dict[str, torch.Tensor]) -> None:
        self._shares = shares
        self._refresh()

    @staticmethod
    def _least(left: int) -> float:
        """The share of each step until the next look that keeps up with a linear decay.

        Slices that are still long at the end would be cut off there, which costs more accuracy.
        """
        return 1 - ((left - LOOK) / left) ** (1 / LOOK) if left > LOOK else 1 / left

    def _rate(self, name: str) -> float:
        group = self._groups.get(self.tensors[name])
        return 0.0 if group is None else float(group.get("lr", 1e-3))

    # ------------------------------------------------------------------ both

    def _select(self, progress: float) -> None:
        scores = score(self.classes, self.tensors, self.method)
        chosen = self.choice.choose(scores, self.target.at(progress), self.zeroed)
        self.active = {name: gone & ~self.zeroed[name] for name, gone in chosen.items()}
        self._refresh()

    def _commit(self, chosen: Selection) -> None:
        for name, gone in chosen.items():
            self.zeroed[name] = self.zeroed[name] | gone
        self.active = {name: torch.zeros_like(gone) for name, gone in chosen.items()}
        self._refresh()

    def _refresh(self) -> None:
        """Recomputes what parameters are multiplied with: vectors for each of their dimensions.

        One is 0 for what is zero and else 1; the other says how much of a slice is on its way.
        """
        found: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for c in self.classes:
            gone, active = self.zeroed[c.name], self.active[c.name]
            if not bool((gone | active).any()):
                continue
            going = active * self._shares.get(c.name, torch.ones(()))
            for m in c.producers:
                hit, place = m.labels >= 0, m.labels.clamp(min=0)
                keep, stays = ~(hit & gone[place]), 1.0 - hit * going[place]
                before = found.get((m.name, m.dim), (torch.tensor(True), torch.ones(())))
                found[m.name, m.dim] = (before[0] & keep, before[1] * stays)
        self._factors = []
        for (name, dim), (keep, stays) in found.items():
            parameter = self.tensors[name]
            shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
            kept = keep.to(parameter.device, parameter.dtype).reshape(shape)
            moving = ((1 - stays) * keep).to(parameter.device, parameter.dtype).reshape(shape)
            self._factors.append(_Factor(parameter, kept, moving if bool(moving.any()) else None))

    def _scale(self, factor: float) -> None:
        """Multiplies active slices with a factor and zeroed ones with 0; leaves the others."""
        for each in self._factors:
            each.scale(factor)


class _Factor:
    """What a parameter is multiplied with along one of its dimensions.

    Args:
        parameter: changed in place.
        keep: 0 where it is zero, else 1; of a shape that broadcasts.
        moving: how much of each slice is on its way, if any is.
    """

    def __init__(
        self, parameter: torch.Tensor, keep: torch.Tensor, moving: torch.Tensor | None
    ) -> None:
        self._parameter, self._keep, self._moving = parameter, keep, moving
        self._last, self._product = 1.0, keep

    def scale(self, factor: float) -> None:
        """Multiplies what is on its way with a factor, and what is zero with 0."""
        if factor != self._last and self._moving is not None:
            # The pull stays the same between two looks, and its vector with it.
            self._last, self._product = factor, self._keep.sub(self._moving, alpha=1 - factor)
        self._parameter.mul_(self._product)
