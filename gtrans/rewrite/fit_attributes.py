"""Finds values of size attributes with which a cut model computes what it should.

The model runs module by module. The first module that raises, or whose result differs in shape or
norm from the erased graph's, names the attributes to change; those of modules before it stand.
So the number of trials grows with the number of ambiguous attributes per module, not with depth.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from gtrans.ir.calling import captured_call
from gtrans.rewrite.erase_graph import GraphErasure, paths_of
from gtrans.rewrite.size_attributes import Attribute, Evidence

TRIALS = 400
"""How many forwards are run before giving up."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}

Kind = tuple[Any, ...]


class Inexpressible(Exception):
    """The model's own modules cannot express the erased model; the message says why."""


@dataclass(frozen=True)
class Expected:
    """What one tensor among a module's results must be: its shape and 2-norm."""

    shape: tuple[int, ...]
    norm: float
    dtype: torch.dtype

    def problem(self, value: Any) -> str:
        """How a value differs; empty if it does not."""
        first = ""
        for found in pytree.tree_leaves(value):
            if not isinstance(found, torch.Tensor):
                continue
            if tuple(found.shape) != self.shape:
                first = first or f"has the shape {tuple(found.shape)}, not {self.shape}"
                continue
            off = abs(_norm(found) - self.norm) / max(self.norm, 1e-30)
            if off <= _TOLERANCE.get(self.dtype, 5e-2):
                return ""
            first = first or f"differs by {off:.1e}"
        return first or "holds no tensor"


@dataclass
class Reference:
    """What the erased graph computes, at the exit of every module and as a whole."""

    exits: dict[str, Expected] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)


def record_reference(
    graph: GraphErasure, module: fx.GraphModule, args: Sequence[Any], kwargs: dict[str, Any]
) -> Reference:
    """Runs the erased graph once and notes what leaves each module."""
    reference = Reference()
    exits = _exits(graph)

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            for path in exits.get(n, ()):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    reference.exits[path] = Expected(tuple(value.shape), _norm(value), value.dtype)
            return value

    flat = pytree.tree_leaves((tuple(args), kwargs))
    with same_state(module):
        results = Recorder(module).run(*flat, enable_io_processing=False)
    reference.outputs = [t for t in pytree.tree_leaves(results) if isinstance(t, torch.Tensor)]
    return reference


@dataclass
class Fit:
    """The search.

    Args:
        model: the cut model; its attributes are set in place.
        reference: what it must compute.
        args: positional inputs.
        kwargs: keyword inputs.
    """

    model: nn.Module
    reference: Reference
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def run(
        self,
        attributes: list[Attribute],
        evidence: dict[str, Evidence],
        read: set[tuple[str, str]],
    ) -> None:
        """Sets the attributes.

        Raises:
            Inexpressible: no choice gives the right model.
        """
        usable = [a for a in attributes if a.options(evidence)]
        local: dict[str, list[Kind]] = {}
        sizes: dict[Kind, int] = {}
        for a in usable:
            if (a.path, a.name) in read:
                kind = (a.owner, a.name, a.index, a.value, *a.options(evidence))
                local.setdefault(a.path, []).append(kind)
                sizes[kind] = len(a.options(evidence)) + 1
        picked: dict[Kind, int] = dict.fromkeys(sizes, 0)
        odometers: dict[tuple[Kind, ...], Iterator[tuple[int, ...]]] = {}
        problem = ""
        for _ in range(TRIALS):
            for a in usable:
                kind = (a.owner, a.name, a.index, a.value, *a.options(evidence))
                a.choose(self.model, evidence, picked.get(kind, 0))
            path, problem = self._trial()
            if not problem:
                return
            if not _advance(path, local, sizes, picked, odometers):
                break
        raise Inexpressible(problem)

    def _trial(self) -> tuple[str, str]:
        """Runs the model; returns the module that goes wrong first, and how."""
        entered: list[str] = []
        wrong: list[tuple[str, str]] = []

        def enter(path: str) -> Callable[..., None]:
            return lambda *_: entered.append(path)

        def leave(path: str) -> Callable[..., None]:
            def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
                entered.pop()
                expected = self.reference.exits.get(path)
                if expected is not None and not wrong and (text := expected.problem(output)):
                    wrong.append((path, f"the result of {path or 'the model'} {text}"))

            return check

        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave(path)))
        try:
            with same_state(self.model), captured_call(self.model, self.args, self.kwargs):
                output = self.model(*self.args, **self.kwargs)
        except Exception as error:  # user code with a wrong size may raise anything
            path = entered[-1] if entered else ""
            text = str(error).splitlines()[0][:160] if str(error) else ""
            where = path or "the model"
            return wrong[0] if wrong else (path, f"{where}: {type(error).__name__}: {text}")
        finally:
            for handle in handles:
                handle.remove()
        return wrong[0] if wrong else ("", self._difference(output))

    def _difference(self, output: Any) -> str:
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        if len(leaves) != len(self.reference.outputs):
            return "the model returns another number of tensors"
        for i, (a, b) in enumerate(zip(self.reference.outputs, leaves, strict=True)):
            if a.shape != b.shape:
                return f"output {i} has the shape {tuple(b.shape)}, not {tuple(a.shape)}"
            error = float((a - b).double().norm() / a.double().norm().clamp(min=1e-30))
            if not error <= _TOLERANCE.get(a.dtype, 5e-2):
                return f"output {i} differs by {error:.1e}"
        return ""


def _advance(
    path: str,
    local: dict[str, list[Kind]],
    sizes: dict[Kind, int],
    picked: dict[Kind, int],
    odometers: dict[tuple[Kind, ...], Iterator[tuple[int, ...]]],
) -> bool:
    """Takes the next choice for the attributes of a module, or else of those around it."""
    while True:
        kinds = tuple(dict.fromkeys(local.get(path, ())))
        if kinds:
            if kinds not in odometers:
                odometers[kinds] = itertools.product(*(range(sizes[k]) for k in kinds))
            for choice in odometers[kinds]:
                if any(picked[k] != c for k, c in zip(kinds, choice, strict=True)):
                    picked.update(zip(kinds, choice, strict=True))
                    return True
        if not path:
            return False
        path = path.rpartition(".")[0]


def _exits(graph: GraphErasure) -> dict[fx.Node, list[str]]:
    """For nodes of the erased graph, the modules whose only result they are."""
    results: dict[str, list[fx.Node]] = {}
    repeated: set[str] = set()
    for node in graph.structure.program.graph.nodes:
        if node.op != "call_function":
            continue
        # Capture writes the second call of a module as "path@1", in the path or in its key.
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if "@" in str(path) or "@" in key:
                repeated.add(str(path).partition("@")[0])
        for path in paths_of(node):
            if any(path not in paths_of(user) for user in node.users):
                results.setdefault(path, []).append(node)
    found: dict[fx.Node, list[str]] = {}
    for path, nodes in results.items():
        made = graph.made.get(nodes[0])
        if len(nodes) == 1 and path not in repeated and isinstance(made, fx.Node):
            found.setdefault(made, []).append(path)
    return found


def _norm(value: torch.Tensor) -> float:
    return float(value.detach().double().norm())


@contextmanager
def same_state(model: nn.Module) -> Iterator[None]:
    """Runs without gradients and with a fixed seed; buffers and random state come back."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            yield
        finally:
            for name, b in model.named_buffers():
                if name in buffers and b.shape == buffers[name].shape:
                    b.copy_(buffers[name])
