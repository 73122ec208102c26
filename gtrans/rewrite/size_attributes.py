"""Integer attributes of modules that repeat a size of a tensor (`num_heads`, `split_size`).

Which attribute means which axis is written nowhere. What is known is which sizes occur inside a
module and what becomes of them, and which attributes its forward reads. From that follow, for
every attribute, a few candidate values; `erase_modules` tries them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import fx, nn

from gtrans.analysis.axes import Axis, atoms, factors, find
from gtrans.rewrite.erase_graph import GraphErasure, owner_path


@dataclass
class Evidence:
    """What becomes of the sizes that occur inside one module: old value to new values.

    Attributes:
        stated: sizes that the module's code passes to operators.
        seen: sizes of the axes of its values, and of their factors.
    """

    stated: dict[int, set[int]] = field(default_factory=dict)
    seen: dict[int, set[int]] = field(default_factory=dict)

    def options(self, value: int) -> list[int]:
        """The values an attribute may have to take, most likely first; without the old one."""
        stated = sorted(self.stated.get(value, set()) - {value})
        return stated + sorted(self.seen.get(value, set()) - {value} - set(stated))


@dataclass(frozen=True)
class Attribute:
    """An integer attribute (or an integer within a list or tuple) of one module."""

    path: str
    owner: str
    name: str
    index: int | None
    value: int

    def options(self, evidence: dict[str, Evidence]) -> list[int]:
        """The new values that the evidence suggests."""
        found = evidence.get(self.path)
        return found.options(self.value) if found else []

    def choose(self, model: nn.Module, evidence: dict[str, Evidence], choice: int) -> None:
        """Sets the attribute to one of its options, or back to its old value."""
        options = [*self.options(evidence), self.value]
        value = options[min(choice, len(options) - 1)]
        module = model.get_submodule(self.path)
        if not hasattr(module, self.name):
            return  # a norm that has been replaced
        if self.index is None:
            setattr(module, self.name, value)
            return
        items = list(getattr(module, self.name))
        items[self.index] = value
        setattr(module, self.name, type(getattr(module, self.name))(items))


def find_attributes(model: nn.Module) -> list[Attribute]:
    """The integer attributes of all modules that are not torch's own."""
    found: list[Attribute] = []
    for path, module in model.named_modules():
        owner = f"{type(module).__module__}.{type(module).__qualname__}"
        if owner.startswith("torch.nn.modules."):
            continue
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if type(value) is int and value > 1:
                found.append(Attribute(path, owner, name, None, value))
            elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                found += [Attribute(path, owner, name, i, v) for i, v in enumerate(value) if v > 1]
    return found


def attributes_read(model: nn.Module, run: Callable[[nn.Module], Any]) -> set[tuple[str, str]]:
    """The (module path, attribute) pairs that a forward reads."""
    found: set[tuple[str, str]] = set()
    paths = {id(module): path for path, module in model.named_modules()}
    with _recording(model, lambda module, name: found.add((paths.get(id(module), ""), name))):
        run(model)
    return found


@contextmanager
def _recording(model: nn.Module, note: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Lets every module report its plain attributes as they are read."""
    originals = {module: type(module) for module in model.modules()}
    recorders: dict[type[nn.Module], type[nn.Module]] = {}
    for module, cls in originals.items():
        if cls not in recorders:
            recorders[cls] = _recorder(cls, note)
        module.__class__ = recorders[cls]
    try:
        yield
    finally:
        for module, cls in originals.items():
            module.__class__ = cls


def _recorder(cls: type[nn.Module], note: Callable[[nn.Module, str], None]) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = super(recorder, self).__getattribute__(name)
        if type(value) in (int, list, tuple):
            note(self, name)
        return value

    recorder: type[nn.Module] = type(cls.__name__, (cls,), {"__getattribute__": read})
    recorder.__module__ = cls.__module__
    return recorder


def collect_evidence(graph: GraphErasure) -> dict[str, Evidence]:
    """For each module path, what becomes of the sizes inside it."""
    found: dict[str, Evidence] = {}
    context = graph.structure.analysis.context
    for node in graph.structure.program.graph.nodes:
        path = _custom_owner(node)
        if path is None or node not in context.axes:
            continue
        here = found.setdefault(path, Evidence())
        if node in context.edits:
            for axis in _stated(context.edits[node].arguments.values()):
                here.stated.setdefault(axis.size, set()).add(graph.size(axis))
            for axis in context.edits[node].pieces:
                here.stated.setdefault(axis.size, set()).add(graph.size(axis))
        for value in (node, *node.all_input_nodes):
            for axis in _axes_of(context.axes.get(value, [])):
                for part in (axis, *_runs(axis)):
                    here.seen.setdefault(part.size, set()).add(graph.size(part))
    return found


def _custom_owner(node: fx.Node) -> str | None:
    """The innermost module around a node that is not one of torch's own layers."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    for path, kind in reversed(stack):
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if not name.startswith("torch.nn.modules."):
            return str(path).partition("@")[0]
    return None if not stack else owner_path(node)


def _stated(values: Any) -> list[Axis]:
    found: list[Axis] = []
    for value in values:
        if isinstance(value, Axis):
            found.append(value)
        elif isinstance(value, list):
            found += _stated(value)
    return found


def _axes_of(found: Any) -> list[Axis]:
    return [a for item in found for a in (item if isinstance(item, list) else [item])]


def _runs(axis: Axis) -> list[Axis]:
    """The atoms of an axis, and products of neighbouring factors."""
    parts = factors(axis)
    inner = [a for a in atoms(axis) if a is not find(axis)]
    runs = [
        Axis(prod(p.size for p in parts[i:j]), kind="prod", parts=tuple(parts[i:j]))
        for i in range(len(parts))
        for j in range(i + 2, len(parts) + 1)
        if j - i < len(parts)
    ]
    return inner + runs
