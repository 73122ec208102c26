"""A loop as one operator, whose cotangents are found as one chooses.

What `gtrans.runtime.recurrence` is for the cells that torch knows, for any step f:

    h[t], y[t] = f(h[t-1], x[t])          t = 1 .. T, with h and x lists of tensors

The forward runs step by step, or finds all states by sweeps over all steps. The backward runs all
steps once more, side by side as one batch, and finds the cotangents of the states by a rule. K, the
cheap part of a step's Jacobian, is the way from its carry to the next through operators that work
element by element: the identity of a residual, the gate of a gated cell.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import fx
from torch.func import vjp, vmap

from gtrans.runtime.batch_rules import quiet_loops, with_rules
from gtrans.runtime.noise import fixed_signs
from gtrans.runtime.scan import Carry
from gtrans.runtime.solve import CarryOf, send_nothing, solve_backward, solve_forward
from gtrans.runtime.watch import watch_ratio

T = TypeVar("T")

LOOP_RULES = ("loop", "sweeps", "cut", "feedback", "linspace")
_ALL = slice(None)
_Key = torch._C.DispatchKey
_BATCHING = (
    _Key.FuncTorchDynamicLayerFrontMode,
    _Key.FuncTorchDynamicLayerBackMode,
    _Key.FuncTorchBatched,
    _Key.FuncTorchVmapMode,
    _Key.FuncTorchGradWrapper,
)


@dataclass(frozen=True)
class Step:
    """The step of a loop.

    Attributes:
        call: (carries, inputs) to (new carries, further results).
        gate: the same, but gradients flow only where values are worked on element by element.
        carries: how many values are handed over.
        shared: for each input, whether all steps read the same tensor.
    """

    call: fx.GraphModule
    gate: fx.GraphModule
    carries: int
    shared: tuple[bool, ...]

    @property
    def key(self) -> str:
        """What the step is known by inside of a compiled graph."""
        return name_of(self.call.code, self.gate.code, self.carries, self.shared)

    @cached_property
    def batched_call(self) -> fx.GraphModule:
        """The call, to be run for several steps."""
        return with_rules(self.call)

    @cached_property
    def batched_gate(self) -> fx.GraphModule:
        """The gate, to be run for several steps."""
        return with_rules(self.gate)


def name_of(*parts: object) -> str:
    """A short name, equal in every process, for things that differ in their text."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]


_STEPS: dict[str, Step] = {}


def rolled_loop(
    call: fx.GraphModule,
    starts: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor | Sequence[torch.Tensor]],
    steps: int,
    gate: fx.GraphModule,
    rule: str = "loop",
    count: int = 0,
    method: str = "gauss-seidel",
    tolerance: float = 0.0,
    max_sweeps: int = 0,
    block: int = 1,
) -> tuple[torch.Tensor, ...]:
    """The results of all steps of a loop, those of the first step first.

    Args:
        call: see `Step`; so is gate.
        starts: the carries before the first step, [*s] each.
        inputs: what the steps read besides: one tensor for all of them, or one for each.
        steps: how many.
        gate: see `Step`.
        rule: of the backward, one of `LOOP_RULES`; so is count, as of `cotangents`.
        method: of the forward, as of `Recurrence.solve`; so are tolerance, max_sweeps and block.
    """
    shared = tuple(isinstance(i, torch.Tensor) for i in inputs)
    step = Step(call, gate, len(starts), shared)
    key = step.key
    _STEPS.setdefault(key, step)
    flat = [t for i in inputs for t in ((i,) if isinstance(i, torch.Tensor) else i)]
    forward = (method, tolerance, max_sweeps, block)
    found = loop([*starts, *flat], key, steps, rule, count, *forward)
    return tuple(
        part for parts in zip(*(f.unbind(0) for f in found), strict=True) for part in parts
    )


def slots_of(inputs: Sequence[T], shared: Sequence[bool], steps: int) -> list[Sequence[T]]:
    """Inputs, or a property of each, slot by slot: one for all steps, or one for each."""
    slots, at = [], 0
    for one in shared:
        slots.append(inputs[at : at + (1 if one else steps)])
        at += len(slots[-1])
    return slots


def side_by_side(
    step: Callable[..., Any], carries: int, shared: Sequence[bool]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Several steps as one batch; shared inputs have no dimension for it."""
    dims = (0,) * carries + tuple(None if one else 0 for one in shared)
    found: Callable[..., Any] = vmap(lambda *a: tuple(step(*a)), in_dims=dims)
    return found


@contextmanager
def _batching() -> Iterator[None]:
    """Lets `vmap` and `vjp` work in the forward of a compiled function, where torch bars them."""
    with quiet_loops(), ExitStack() as stack:
        for key in _BATCHING:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


class _Run:
    """A loop on some tensors: the starts, then the inputs slot by slot."""

    def __init__(self, tensors: Sequence[torch.Tensor], key: str, steps: int) -> None:
        self.step, self.steps = _STEPS[key], steps
        self.starts = list(tensors[: self.step.carries])
        self.slots = slots_of(tensors[self.step.carries :], self.step.shared, steps)
        self.shapes = [s.shape for s in self.starts]

    @cached_property
    def inputs(self) -> list[torch.Tensor]:
        """Shared inputs as they are, others with the steps as the first dimension."""
        pairs = zip(self.slots, self.step.shared, strict=True)
        return [slot[0] if one else torch.stack(list(slot)) for slot, one in pairs]

    def single(self, t: int, carries: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results of one step."""
        return list(self.step.call(*carries, *(slot[t % len(slot)] for slot in self.slots)))

    def several(self, *, gate: bool = False) -> Callable[..., tuple[torch.Tensor, ...]]:
        """From carries, [n, *s] each, and the inputs of n steps to the results of these steps."""
        module = self.step.batched_gate if gate else self.step.batched_call
        return side_by_side(module, self.step.carries, self.step.shared)

    def pack(self, carries: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, *s] each as one [n, N]."""
        return torch.cat([c.reshape(len(c), -1) for c in carries], 1)

    def unpack(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `pack`."""
        parts = flat.split([s.numel() for s in self.shapes], 1)
        return [p.reshape(len(p), *s) for p, s in zip(parts, self.shapes, strict=True)]

    def before(self, states: torch.Tensor) -> torch.Tensor:
        """What the steps start from, [T, N]."""
        start = self.pack([s[None] for s in self.starts])
        return torch.cat([start, states[:-1]])

    def at(self, states: torch.Tensor, part: slice) -> tuple[list[torch.Tensor], ...]:
        """What the steps of a slice read: their carries and their inputs."""
        pairs = zip(self.inputs, self.step.shared, strict=True)
        inputs = [given if one else given[part] for given, one in pairs]
        return self.unpack(self.before(states)[part]), inputs

    def pulled(
        self, states: torch.Tensor, trained: Sequence[bool]
    ) -> Callable[..., list[torch.Tensor | None]]:
        """From cotangents of all results to those of carries and inputs, at the given states.

        Inputs that are not trained have none.
        """
        run, every = self.several(), self.inputs
        given = [i for i, one in enumerate(trained) if one]
        carries = self.unpack(self.before(states))
        count = len(carries)

        def results(*a: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inputs = list(every)
            for i, t in zip(given, a[count:], strict=True):
                inputs[i] = t
            return run(*a[:count], *inputs)

        pull = vjp(results, *carries, *(every[i] for i in given))[1]

        def pulled(cotangents: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
            found = pull(cotangents)
            rest = dict(zip(given, found[count:], strict=True))
            return [*found[:count], *(rest.get(i) for i in range(len(every)))]

        return pulled

    def gates(self, states: torch.Tensor, part: slice = _ALL) -> torch.Tensor:
        """K of the steps of a slice, [n, N]: the gradients of ones."""
        carries, inputs = self.at(states, part)
        run = self.several(gate=True)
        rows = []
        for i in range(self.step.carries):

            def new(own: torch.Tensor, i: int = i) -> torch.Tensor:
                return run(*carries[:i], own, *carries[i + 1 :], *inputs)[i]

            pull = vjp(new, carries[i])[1]
            rows.append(pull(torch.ones_like(carries[i]))[0])
        return self.pack(rows)

    def sequential(self) -> list[torch.Tensor]:
        """The results of all steps, one after another, [T, *s] each."""
        state, rows = self.starts, []
        for t in range(self.steps):
            rows.append(self.single(t, state))
            state = rows[-1][: self.step.carries]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def swept(
        self, method: str, tolerance: float, max_sweeps: int, block: int
    ) -> list[torch.Tensor]:
        """The results of all steps, [T, *s] each, by sweeps over all of them."""
        run, count = self.several(), self.step.carries

        def evaluate(states: torch.Tensor, part: slice) -> torch.Tensor:
            carries, inputs = self.at(states, part)
            return self.pack(run(*carries, *inputs)[:count])

        found = solve_forward(
            evaluate,
            self.pack([s[None] for s in self.starts]).expand(self.steps, -1),
            carry=self._carry(method),
            tolerance=tolerance,
            max_sweeps=max_sweeps or None,
            window=block if method == "gs-jacobi" else None,
            block=block if method == "jacobi-gs" else 1,
        )
        carries, inputs = self.at(found.states, _ALL)
        results = [*self.unpack(found.states), *run(*carries, *inputs)[count:]]
        return [r.clone(memory_format=torch.contiguous_format) for r in results]

    def _carry(self, method: str) -> Carry | CarryOf:
        """What a sweep carries on from step to step."""
        derived: dict[str, CarryOf] = {
            "gate": self.gates,
            "newton": self._jacobians,
            "quasi-newton": lambda h, part: self._jacobians(h, part).diagonal(dim1=1, dim2=2),
        }
        return derived.get(method, 1.0 if method == "picard" else 0.0)

    def _jacobians(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """The Jacobians of the steps of a slice, [n, N, N]."""
        carries, inputs = self.at(states, part)
        run, count = self.several(), self.step.carries
        pull = vjp(lambda *a: run(*a, *inputs)[:count], *carries)[1]

        def row(one: torch.Tensor) -> torch.Tensor:
            return self.pack(pull(tuple(self.unpack(one.expand(len(carries[0]), -1)))))

        size = sum(s.numel() for s in self.shapes)
        return vmap(row, out_dims=1)(torch.eye(size, dtype=states.dtype, device=states.device))

    def gradients(
        self,
        states: torch.Tensor,
        drives: list[torch.Tensor],
        wanted: Sequence[bool],
        rule: str,
        count: int,
    ) -> list[torch.Tensor | None]:
        """The gradients of starts and inputs, from the cotangents of all results.

        Inputs have one if any of their tensors wants one.
        Those of the starts and of the inputs of each step have the steps as first dimension.
        """
        carries = self.step.carries
        slots = slots_of(wanted[carries:], self.step.shared, self.steps)
        pull, further = self.pulled(states, [any(slot) for slot in slots]), drives[carries:]
        nothing = [torch.zeros_like(f) for f in further]

        def sent(w: torch.Tensor, more: list[torch.Tensor] = nothing) -> torch.Tensor:
            found = pull((*self.unpack(w), *more))[: self.step.carries]
            return self.pack([g for g in found if g is not None])

        drive = self.pack(drives[: self.step.carries])
        if further:  # what a result sends to the state that it was made from
            local = sent(torch.zeros_like(drive), further)
            if rule == "cut":
                local[::count] = 0
            drive = drive + torch.cat([local[1:], torch.zeros_like(local[:1])])
        keep = None
        if rule == "sweeps":
            w = self._swept(self.gates(states), drive, sent, count)
        elif rule in ("feedback", "linspace"):
            keep = self._constant(drive, sent, rule)
            w = solve_backward(send_nothing, drive, keep=keep, sweeps=0).states
        else:
            w = self._step_by_step(states, drive, count if rule == "cut" else self.steps)
        found = pull((*self.unpack(w), *further))
        if keep is not None:
            found[: self.step.carries] = self.unpack(keep * w)
        return found

    def _swept(
        self,
        keep: torch.Tensor,
        drive: torch.Tensor,
        sent: Callable[[torch.Tensor], torch.Tensor],
        count: int,
    ) -> torch.Tensor:
        """Highway-BP."""

        def rest(w: torch.Tensor, part: slice) -> torch.Tensor:
            ahead = torch.zeros_like(drive[: self.steps - len(w)])
            return sent(torch.cat([ahead, w]))[part] - keep[part] * w

        solved = solve_backward(rest, drive, keep=keep, sweeps=count)
        watch_ratio(solved.states, solved.before, "a loop", count)
        return solved.states

    def _constant(
        self, drive: torch.Tensor, sent: Callable[[torch.Tensor], torch.Tensor], rule: str
    ) -> torch.Tensor:
        """A diagonal that is the same at all times: the mean of the true ones, or a ramp."""
        if rule == "linspace":
            ramps = [
                torch.linspace(0, 1, s[-1] if s else 1, dtype=drive.dtype, device=drive.device)
                .expand(*s) for s in self.shapes
            ]  # fmt: skip
            return self.pack([r[None] for r in ramps]).expand_as(drive)
        signs = fixed_signs(drive)  # a product with them twice keeps the diagonal
        return (sent(signs) * signs).mean(0).expand_as(drive)

    def _carried(self, t: int, *carries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What one step hands over."""
        return tuple(self.single(t, carries)[: len(carries)])

    def _step_by_step(self, states: torch.Tensor, drive: torch.Tensor, every: int) -> torch.Tensor:
        """Exact, but that nothing crosses from step m * every to the one before."""
        before = self.before(states)
        w = [drive[-1:]]
        for t in range(self.steps - 1, 0, -1):
            if t % every == 0:
                w.append(drive[t - 1 : t])
                continue
            at = [c[0] for c in self.unpack(before[t : t + 1])]
            pull = vjp(partial(self._carried, t), *at)[1]
            given = tuple(c[0] for c in self.unpack(w[-1]))
            w.append(drive[t - 1 : t] + self.pack([g[None] for g in pull(given)]))
        return torch.cat(w[::-1])


@torch.library.custom_op("gtrans::loop", mutates_args=())
def loop(
    tensors: list[torch.Tensor],
    key: str,
    steps: int,
    rule: str,
    count: int,
    method: str,
    tolerance: float,
    max_sweeps: int,
    block: int,
) -> list[torch.Tensor]:
    """The results of a loop, [T, *s] each: the states, then what else the steps return."""
    run = _Run(tensors, key, steps)
    if method == "gauss-seidel":
        return run.sequential()
    with _batching():
        return run.swept(method, tolerance, max_sweeps, block)


@torch.library.custom_op("gtrans::loop_backward", mutates_args=())
def loop_backward(
    drives: list[torch.Tensor],
    states: list[torch.Tensor],
    tensors: list[torch.Tensor],
    wanted: list[bool],
    key: str,
    steps: int,
    rule: str,
    count: int,
) -> list[torch.Tensor]:
    """The gradients of the tensors that a loop reads; empty ones where none is wanted."""
    run = _Run(tensors, key, steps)
    with quiet_loops():
        found = run.gradients(run.pack(states), drives, wanted, rule, count)
    gradients: list[torch.Tensor | None] = []
    shared = (*(False for _ in run.starts), *run.step.shared)
    sizes = [*(1 for _ in run.starts), *(len(slot) for slot in run.slots)]
    for g, one, size in zip(found, shared, sizes, strict=True):
        gradients += [g] if g is None or one else list(g.unbind(0)[:size])
        gradients += [None] * (size - 1 if g is None else 0)
    return [
        t.new_empty(0) if g is None or not one else g.clone(memory_format=torch.contiguous_format)
        for g, t, one in zip(gradients, tensors, wanted, strict=True)
    ]


@loop.register_fake
def _(tensors: list[torch.Tensor], key: str, steps: int, *rest: Any) -> list[torch.Tensor]:
    run = _Run(tensors, key, steps)
    return [f.new_empty(steps, *f.shape) for f in run.single(0, run.starts)]


@loop_backward.register_fake
def _(
    drives: list[torch.Tensor],
    states: list[torch.Tensor],
    tensors: list[torch.Tensor],
    wanted: list[bool],
    *rest: Any,
) -> list[torch.Tensor]:
    pairs = zip(tensors, wanted, strict=True)
    return [t.new_empty(t.shape if one else (0,)) for t, one in pairs]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, key, steps, rule, count, *_ = inputs
    carries = _STEPS[key].carries
    ctx.save_for_backward(*output[:carries], *tensors)
    ctx.carries, ctx.options = carries, (key, steps, rule, count)
    ctx.further = [(o.shape, o.dtype, o.device) for o in output[carries:]]


def _backward(ctx: Any, given: list[torch.Tensor | None]) -> tuple[Any, ...]:
    states, tensors = list(ctx.saved_tensors[: ctx.carries]), list(ctx.saved_tensors[ctx.carries :])
    kinds = [(s.shape, s.dtype, s.device) for s in states] + ctx.further
    drives = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(given, kinds, strict=True)
    ]
    wanted = [t.requires_grad for t in tensors]
    found = loop_backward(drives, states, tensors, wanted, *ctx.options)
    gradients = [g if one else None for g, one in zip(found, wanted, strict=True)]
    return gradients, *[None] * 8


loop.register_autograd(_backward, setup_context=_remember)
