"""Runs training steps of a model, rewritten or not, and records everything that laws compare."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gtrans.capture import Compiler, compiled_call
from gtrans.captured import Captured
from gtrans.contract import Contract, compose_all
from gtrans.errors import CaptureError, VerifyError
from gtrans.ir.half import Backend, Half, Runnable, boxed
from gtrans.pipeline import Observer, Pipeline
from gtrans.registry import load_backend

Values = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Record:
    """Everything one training step computed.

    Attributes:
        outputs: the tensors of the forward's result.
        gradients: by parameter path, and "input 0", ...; None where autograd left none.
        buffers: by path, after the step.
        saved_bytes: bytes of the distinct storages kept for the backward, less parameters and
            buffers.
    """

    outputs: Values
    gradients: Values
    buffers: Values
    saved_bytes: int


@dataclass
class Runner:
    """A private copy of a model that runs training steps, through a pipeline or as it is.

    Args:
        model: the model; it stays as it is.
        inputs: its positional inputs.
        pipeline: the passes to run through the eager backend; None runs plain autograd.
        dtype: of the run; None keeps the model's own.
        observers: called after each pass.
    """

    model: nn.Module
    inputs: Sequence[Any]
    pipeline: Pipeline | None = None
    dtype: torch.dtype | None = None
    observers: Sequence[Observer] = ()
    _compiler: Compiler | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        twin = copy.deepcopy(self.model)
        twin.zero_grad(set_to_none=True)
        self.model = twin if self.dtype is None else twin.to(self.dtype)
        self._buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        self._call: Callable[..., Any] = self.model
        self._meter = _Meter(self.model)
        if self.pipeline is not None:
            self._compiler = Compiler(
                self.pipeline, self._meter, skip_failures=False, observers=self.observers
            )
            self._meter.compiler = self._compiler
            self._call = compiled_call(self.model, self._compiler, dynamic=False)

    @property
    def captured(self) -> list[Captured]:
        """The graphs captured so far."""
        return [] if self._compiler is None else self._compiler.captured

    @property
    def contract(self) -> Contract:
        """What the passes that rewrote something promise together."""
        return compose_all([c.contract for c in self.captured])

    @property
    def rewritten(self) -> int:
        """How many places were rewritten, over all passes but the plan."""
        steps = [s for c in self.captured for s in (*c.forward_steps, *c.steps)]
        return sum(s.stats.rewritten for s in steps if s.name != "plan")

    def step(self, seed: int = 0, cotangents: "Cotangents | None" = None) -> Record:
        """Runs a forward and a backward from the model's first state.

        Args:
            seed: of the random state during the step.
            cotangents: what flows back into the outputs.

        Raises:
            VerifyError: no output depends on a parameter or input that requires a gradient.
            CaptureError: nothing was captured, so the pipeline never ran.
        """
        self._reset()
        arguments = in_dtype(tuple(self.inputs), self.dtype)
        self._meter.start()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            output = self._call(*arguments)
            if self._compiler is not None and not self._compiler.captured:
                raise CaptureError(f"nothing of {type(self.model).__name__} was captured")
            leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
            roots = [t for t in leaves if t.requires_grad]
            if not roots:
                raise VerifyError("no output of the model depends on anything trainable")
            torch.autograd.backward(roots, (cotangents or Cotangents()).of(roots))
        return Record(
            {f"output {i}": t.detach().clone() for i, t in enumerate(leaves)},
            self._gradients(arguments),
            {name: b.detach().clone() for name, b in self.model.named_buffers()},
            self._meter.bytes,
        )

    def _reset(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self._buffers[name])

    def _gradients(self, arguments: Sequence[Any]) -> Values:
        found = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        for i, value in enumerate(arguments):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found[f"input {i}"] = value.grad
        return found


@dataclass(frozen=True)
class Cotangents:
    """Fixed random cotangents; a sum of several draws tests linearity.

    Args:
        terms: pairs of a seed and a factor.
    """

    terms: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def of(self, roots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One cotangent for each root; of unit size whatever the shape."""
        made = []
        for i, root in enumerate(roots):
            total = torch.zeros(root.shape, dtype=torch.float64)
            for seed, factor in self.terms:
                generator = torch.Generator().manual_seed(1000 * seed + i)
                draw = torch.randn(root.shape, generator=generator, dtype=torch.float64)
                total += factor * draw / math.sqrt(max(1, root.numel()))
            made.append(total.to(root.dtype).to(root.device))
        return made


class _Meter:
    """The eager backend, which also counts the distinct storages that forward halves hand over."""

    name = "metered eager"
    overwrites_saved = False
    slack = 0.0

    def __init__(self, model: nn.Module) -> None:
        self.inner: Backend = load_backend("eager")
        self.compiler: Compiler | None = None
        self.free = {_address(t) for t in (*model.parameters(), *model.buffers())}
        self.kept: dict[tuple[int, int], torch.Tensor] = {}

    def start(self) -> None:
        """Forgets what the last step kept."""
        self.kept = {}

    @property
    def bytes(self) -> int:
        """Bytes kept by the last step."""
        return sum(t.numel() * t.element_size() for t in self.kept.values())

    def unavailable(self) -> str | None:
        return self.inner.unavailable()

    def prepare(self, half: Half) -> Half:
        return self.inner.prepare(half)

    def compile(self, half: Half) -> Runnable:
        run = self.inner.compile(half)
        if half.role != "forward" or self.compiler is None:
            return run
        joint = self.compiler.captured[-1].rewritten
        first = 0 if joint is None else joint.signature.num_forward_outputs
        graph = len(self.compiler.captured)

        @boxed
        def counted(arguments: list[Any]) -> Sequence[Any]:
            results = run(arguments)
            self._count(graph, results[first:])
            return results

        return counted

    def _count(self, graph: int, values: Sequence[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and value.numel():
                where = _address(value)
                largest = self.kept.get((graph, where), value)
                if where not in self.free:
                    self.kept[graph, where] = value if value.numel() > largest.numel() else largest


def _address(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


def in_dtype(arguments: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Fresh leaves with the same values and strides."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        to = dtype if dtype is not None and value.is_floating_point() else value.dtype
        twin = torch.empty_strided(value.shape, value.stride(), dtype=to, device=value.device)
        twin.copy_(value.detach())
        return twin.requires_grad_(value.requires_grad)

    made: tuple[Any, ...] = pytree.tree_map(fresh, arguments)
    return made


def other_values(inputs: Sequence[Any], seed: int = 1) -> tuple[Any, ...]:
    """Inputs of the same shapes and types with other values in them."""
    generator = torch.Generator().manual_seed(seed)

    def changed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        (twin,) = in_dtype((value.detach(),), None)
        if twin.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            twin.copy_(noise.to(value.dtype))
        else:
            order = torch.randperm(value.numel(), generator=generator)
            twin.copy_(value.flatten()[order.to(value.device)].view(value.shape))
        return twin.requires_grad_(value.requires_grad)

    made: tuple[Any, ...] = pytree.tree_map(changed, tuple(inputs))
    return made


def with_special_values(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The same inputs with NaN, infinities, zeros and subnormals spread over the floating ones."""

    def changed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        (twin,) = in_dtype((value.detach(),), None)
        tiny = torch.finfo(value.dtype).smallest_normal / 4
        special = [math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny]
        count = value.numel()
        flat = twin.flatten().clone()  # of a contiguous tensor, flatten is a view
        # From the front and sparsely: later rows of a batch stay regular.
        for i, number in zip(range(0, count, max(2, count // 14)), special, strict=False):
            flat[i] = number
        twin.copy_(flat.view(value.shape))
        return twin.requires_grad_(value.requires_grad)

    made: tuple[Any, ...] = pytree.tree_map(changed, tuple(inputs))
    return made
