"""Finds slices that look redundant only until they are gone: the cycles of HESSO-CRIC.

    V = the K lowest-scored indices
    a cycle: train while V's slices decay to zero; sample the scores; then put everything back
             next V = what was among the K lowest meanwhile and has not been tried yet
    until nothing new comes up; the final score is the mean over all samples

An index that others depend on is scored higher once those have decayed, and the mean notices.
Source: arXiv:2409.09085. Left out: the term of the loss after probing whole layers, which needs the
loss at every step.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gtrans.analysis.erase_choice import Selection
from gtrans.analysis.unit_scores import Scores

SAMPLES = 4
"""How often the scores are sampled in a cycle."""

_STATE = ("done", "decaying", "_total", "_samples", "_tried", "_new", "_held", "_at")


@dataclass
class CorrectiveCycles:
    """The cycles; `step` is called after every optimizer step until `done`.

    Args:
        tensors: the model's parameters; they are put back after every cycle.
        score: the scores as things are now.
        lowest: the K lowest-scored indices.
        length: steps of a cycle.
        most: cycles at most.
    """

    tensors: Mapping[str, nn.Parameter]
    score: Callable[[], Scores]
    lowest: Callable[[Scores], Selection]
    length: int
    most: int
    done: bool = field(default=False, init=False)
    decaying: Selection = field(default_factory=dict, init=False)
    _total: Scores = field(default_factory=dict, init=False)
    _samples: int = field(default=0, init=False)
    _tried: Selection = field(default_factory=dict, init=False)
    _new: Selection = field(default_factory=dict, init=False)
    _held: Sequence[torch.Tensor] = field(default=(), init=False)
    _at: int = field(default=0, init=False)

    def mean(self) -> Scores:
        """The mean of all samples."""
        return {name: total / self._samples for name, total in self._total.items()}

    def step(self) -> float:
        """Samples; returns what the slices of `decaying` are to be multiplied with."""
        t = self._at % self.length
        if t == 0:
            self._begin()
        self._at += 1
        if t % max(1, self.length // SAMPLES) == 0:
            self._sample()
        return (self.length - t - 1) / (self.length - t)

    def finish(self) -> None:
        """Called after the decay: at the end of a cycle puts the parameters back."""
        if self._at % self.length:
            return
        for parameter, held in zip(self.tensors.values(), self._held, strict=True):
            parameter.copy_(held)
        self._held = ()
        self.decaying = {k: new & ~self._tried[k] for k, new in self._new.items()}
        none_new = not any(bool(v.any()) for v in self.decaying.values())
        self.done = none_new or self._at >= self.most * self.length

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: the parameters as they were before this cycle, too."""
        return {name: copy.deepcopy(getattr(self, name)) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        for name in _STATE:
            setattr(self, name, copy.deepcopy(state[name]))

    # ------------------------------------------------------------------ private

    def _begin(self) -> None:
        if not self.decaying:
            scores = self.score()
            self.decaying = self.lowest(scores)
            self._tried = {k: torch.zeros_like(v) for k, v in self.decaying.items()}
        for name, going in self.decaying.items():
            self._tried[name] = self._tried[name] | going
        self._new = {k: torch.zeros_like(v) for k, v in self.decaying.items()}
        self._held = [p.detach().clone() for p in self.tensors.values()]

    def _sample(self) -> None:
        scores = self.score()
        for name, value in scores.items():
            self._total[name] = self._total.get(name, torch.zeros_like(value)) + value
        self._samples += 1
        for name, low in self.lowest(scores).items():
            self._new[name] = self._new[name] | low
