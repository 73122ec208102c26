"""A loop as one operator whose backward holds one step, or a few, at a time.

    h[t], y[t] = f(h[t-1], x[t])          t = 1 .. T

Nothing inside of a step is kept for the backward, which runs each step once more:

    windows     nothing is kept. The backward runs the steps anew, in their own order, and after
                each window of `count` steps its gradient, which does not leave the window. So the
                gradient is cut between windows, and one window is held at a time. Of the windows,
                `draws` may be chosen anew in every backward, scaled so that the mean is the sum
                over all of them.
    checkpoint  what each step starts from is kept; steps are run and pulled from the last: exact.
    backsolve   the last state is kept; the state before is found from f(h) = h + d(h) by
                h <- h' - d(h), `count` times, the carries being what is added to. Exact as far as
                that settles, which the first state tells: it is known, and compared.

Sources: Meng et al., ICCV 2023, arXiv:2302.14311 (windows of one step); Chen et al., NeurIPS 2018,
arXiv:1806.07366 (backsolve), here with the solver's own steps, so that its error is that of the
inversion and not one more of the solver.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from gtrans.runtime.loop import name_of, slots_of
from gtrans.runtime.noise import noise_seeds, salt_of
from gtrans.runtime.watch import watch_drift

STEPWISE_RULES = ("windows", "checkpoint", "backsolve")
Tensors = list[torch.Tensor]

_FRESH = 8  # tensors that a draw depends on; some of them are weights or data


@dataclass(frozen=True)
class StepwiseLoop:
    """What an operator runs.

    Attributes:
        call: (carries, inputs) to (new carries, further results).
        pull: (carries, inputs, cotangents of the floating results) to (new carries, gradients of
            the carries, gradients of those inputs that are trained).
        steps: how many.
        carries: how many values are handed over.
        shared: for each input, whether all steps read the same tensor.
        trained: for each carry's start and each input, whether it gets a gradient.
        floating: for each result, whether it has a cotangent.
        read: the results that are read, as step * results + result.
        rule: one of `STEPWISE_RULES`.
        count: see the module.
        draws: how many windows get a gradient; 0 for all of them.
        ahead: steps of the first window that run before this loop.
    """

    call: fx.GraphModule
    pull: fx.GraphModule
    steps: int
    carries: int
    shared: tuple[bool, ...]
    trained: tuple[bool, ...]
    floating: tuple[bool, ...]
    read: tuple[int, ...]
    rule: str
    count: int
    draws: int
    ahead: int

    @property
    def key(self) -> str:
        """What the loop is known by inside of a compiled graph."""
        _, _, *rest = (getattr(self, f.name) for f in fields(self))
        return name_of(self.call.code, self.pull.code, *rest)


_LOOPS: dict[str, StepwiseLoop] = {}


def stepwise_loop(
    call: fx.GraphModule,
    starts: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor | Sequence[torch.Tensor]],
    steps: int,
    pull: fx.GraphModule,
    trained: Sequence[bool],
    floating: Sequence[bool],
    read: Sequence[int],
    rule: str,
    count: int = 1,
    draws: int = 0,
    ahead: int = 0,
) -> tuple[torch.Tensor | None, ...]:
    """The results of all steps, those of the first step first; None for those that nobody reads.

    Args:
        call: see `StepwiseLoop`, as for all that is not listed here.
        starts: the carries before the first step, [*s] each.
        inputs: what the steps read besides: one tensor for all of them, or one for each.
    """
    shared = tuple(isinstance(i, torch.Tensor) for i in inputs)
    loop = StepwiseLoop(
        call, pull, steps, len(starts), shared, tuple(trained), tuple(floating), tuple(read),
        rule, count, draws, ahead,
    )  # fmt: skip
    key = loop.key
    _LOOPS.setdefault(key, loop)
    flat = [t for i in inputs for t in ((i,) if isinstance(i, torch.Tensor) else i)]
    fresh = [t.detach() for t in (*starts, *flat) if t.is_floating_point()][:_FRESH]
    seeds = [*noise_seeds(fresh, [salt_of(key)])] if draws else []
    found = run_steps([*starts, *flat], seeds, key)
    results: list[torch.Tensor | None] = [None] * (steps * len(floating))
    for number, result in zip(read, found, strict=False):  # what is kept comes behind
        results[number] = result
    return tuple(results)


class _Run:
    """A loop on some tensors: the starts, then the inputs slot by slot."""

    def __init__(self, tensors: Sequence[torch.Tensor], key: str) -> None:
        self.loop = _LOOPS[key]
        self.starts = list(tensors[: self.loop.carries])
        self.slots = slots_of(tensors[self.loop.carries :], self.loop.shared, self.loop.steps)
        self.totals: list[torch.Tensor | None] = [None] * len(tensors)

    def inputs(self, t: int) -> Tensors:
        """What a step reads besides its carries."""
        return [slot[t % len(slot)] for slot in self.slots]

    def call(self, t: int, state: Tensors) -> Tensors:
        """The results of a step."""
        return list(self.loop.call(*state, *self.inputs(t)))

    def forward(self) -> Tensors:
        """The results that are read, then what the backward will need."""
        loop, width = self.loop, len(self.loop.floating)
        wanted = set(loop.read)
        state, found = self.starts, dict[int, torch.Tensor]()
        kept: Tensors = []
        for t in range(loop.steps):
            results = self.call(t, state)
            found |= {
                t * width + i: r for i, r in enumerate(results) if t * width + i in wanted
            }  # fmt: skip
            state = results[: loop.carries]
            last = t == loop.steps - 1
            if loop.rule == ("backsolve" if last else "checkpoint"):
                kept += [s.clone() for s in state]
        return [found[number].contiguous() for number in loop.read] + kept

    def backward(self, drives: Tensors, kept: Tensors, seeds: Tensors) -> list[torch.Tensor | None]:
        """The gradients of the tensors; None for those that have none."""
        given = dict(zip(self.loop.read, drives, strict=True))
        if self.loop.rule == "windows":
            self._windows(given, seeds)
        else:
            self._from_the_end(given, kept)
        return self.totals

    def _pull(
        self, t: int, state: Tensors, w: Tensors | None, given: dict[int, torch.Tensor],
        scale: float = 1.0,
    ) -> tuple[Tensors, Tensors]:  # fmt: skip
        """The new carries of a step, and the cotangents of the old; adds up those of inputs."""
        loop = self.loop
        width, cotangents = len(loop.floating), Tensors()
        for i, floating in enumerate(loop.floating):
            if not floating:
                continue
            sent = given.get(t * width + i)
            if sent is not None and scale != 1.0:
                sent = sent * scale
            if i < loop.carries and w is not None:
                sent = w[i] if sent is None else sent + w[i]
            if sent is None:  # a further result is read in some step, or it were none
                like = state[i] if i < loop.carries else _of_result(given, i, width)
                sent = torch.zeros_like(like)
            cotangents.append(sent)
        found = list(loop.pull(*state, *self.inputs(t), *cotangents))
        after, carried = found[: loop.carries], found[loop.carries : 2 * loop.carries]
        gradients = iter(found[2 * loop.carries :])
        place = loop.carries
        for slot, trained in zip(self.slots, loop.trained[loop.carries :], strict=True):
            if trained:
                self._add(place + t % len(slot), next(gradients))
            place += len(slot)
        return after, carried

    def _add(self, place: int, gradient: torch.Tensor) -> None:
        total = self.totals[place]
        if total is None:
            self.totals[place] = gradient.clone(memory_format=torch.contiguous_format)
        else:
            total += gradient

    def _windows(self, given: dict[int, torch.Tensor], seeds: Tensors) -> None:
        loop = self.loop
        firsts = [0, *range(loop.count - loop.ahead % loop.count, loop.steps, loop.count)]
        windows = [range(a, b) for a, b in pairwise([*firsts, loop.steps])]
        chosen, scale = set(range(len(windows))), 1.0
        if 0 < loop.draws < len(windows):
            words = seeds[0].tolist()
            draw = random.Random(words[0] * 2**32 + words[1])
            chosen = set(draw.sample(sorted(chosen), loop.draws))
            scale = len(windows) / loop.draws
        state = self.starts
        for number, window in enumerate(windows):
            w: Tensors | None = None  # that of the window before takes memory no longer
            if number not in chosen:
                for t in window:
                    state = self.call(t, state)[: loop.carries]
                continue
            states = [state]
            for t in window[:-1]:
                states.append(self.call(t, states[-1])[: loop.carries])
            state = states[-1]
            for t, start in zip(reversed(window), reversed(states), strict=True):
                after, w = self._pull(t, start, w, given, scale)
                if t == window[-1]:
                    state = after
            if number == 0:
                self._add_starts(w)

    def _from_the_end(self, given: dict[int, torch.Tensor], kept: Tensors) -> None:
        loop = self.loop
        w: Tensors | None = None
        after = kept  # of backsolve
        for t in reversed(range(loop.steps)):
            if loop.rule == "checkpoint":
                state = kept[(t - 1) * loop.carries : t * loop.carries] if t else self.starts
            else:
                state = self._before(t, after)
                if t == 0:
                    watch_drift(state, self.starts, loop.count)
                after = state
            _, w = self._pull(t, state, w, given)
        self._add_starts(w)

    def _add_starts(self, w: Tensors | None) -> None:
        for i, gradient in enumerate(w or []):
            if self.loop.trained[i]:
                self._add(i, gradient)

    def _before(self, t: int, after: Tensors) -> Tensors:
        """The state that a step added to, from the one it led to."""
        state = after
        for _ in range(self.loop.count):
            found = self.call(t, state)
            state = [a - (f - s) for a, f, s in zip(after, found, state, strict=False)]
        return state


def _of_result(given: dict[int, torch.Tensor], i: int, width: int) -> torch.Tensor:
    return next(drive for number, drive in given.items() if number % width == i)


@torch.library.custom_op("gtrans::run_steps", mutates_args=())
def run_steps(tensors: Tensors, seeds: Tensors, key: str) -> Tensors:
    """The results of a loop that are read, and what its backward will need."""
    return _Run(tensors, key).forward()


@torch.library.custom_op("gtrans::pull_steps", mutates_args=())
def pull_steps(
    drives: Tensors, kept: Tensors, tensors: Tensors, seeds: Tensors, key: str
) -> Tensors:
    """The gradients of the tensors that a loop reads; empty ones where there are none."""
    found = _Run(tensors, key).backward(drives, kept, seeds)
    gradients: Tensors = []
    for g, t, trained in zip(found, tensors, _has_gradient(_LOOPS[key]), strict=True):
        missing = torch.zeros_like(t) if trained else t.new_empty(0)
        gradients.append(missing if g is None else g)
    return gradients


def _has_gradient(loop: StepwiseLoop) -> list[bool]:
    """For each tensor that a loop reads, whether it gets a gradient."""
    trained = list(loop.trained[: loop.carries])
    for one, flag in zip(loop.shared, loop.trained[loop.carries :], strict=True):
        trained += [flag] * (1 if one else loop.steps)
    return trained


@run_steps.register_fake
def _(tensors: Tensors, seeds: Tensors, key: str) -> Tensors:
    run = _Run(tensors, key)
    loop, found = run.loop, run.call(0, run.starts)
    kept = {"windows": 0, "backsolve": 1, "checkpoint": loop.steps - 1}[loop.rule]
    results = [found[number % len(found)] for number in loop.read]
    return [r.new_empty(r.shape) for r in results + found[: loop.carries] * kept]


@pull_steps.register_fake
def _(drives: Tensors, kept: Tensors, tensors: Tensors, seeds: Tensors, key: str) -> Tensors:
    trained = _has_gradient(_LOOPS[key])
    return [t.new_empty(t.shape if g else (0,)) for t, g in zip(tensors, trained, strict=True)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    tensors, seeds, key = inputs
    loop = _LOOPS[key]
    kept = output[len(loop.read) :]
    ctx.save_for_backward(*kept, *seeds, *tensors)
    ctx.counts, ctx.key = (len(kept), len(seeds)), key
    ctx.shapes = [(o.shape, o.dtype, o.device) for o in output[: len(loop.read)]]


def _backward(ctx: Any, given: list[torch.Tensor | None]) -> tuple[Any, ...]:
    kept, seeds = ctx.counts
    saved = list(ctx.saved_tensors)
    drives = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(given, ctx.shapes, strict=False)
    ]
    tensors = saved[kept + seeds :]
    found = pull_steps(drives, saved[:kept], tensors, saved[kept : kept + seeds], ctx.key)
    trained = _has_gradient(_LOOPS[ctx.key])
    gradients = [g if flag else None for g, flag in zip(found, trained, strict=True)]
    return gradients, [None] * seeds, None


run_steps.register_autograd(_backward, setup_context=_remember)
