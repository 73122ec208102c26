"""A case: one graph with the values of one step, a pipeline, and what goes wrong with them.

A case is written as one Python file: the graph as a function that runs as it stands, and everything
else as one literal. `python FILE` and `gtrans repro FILE` run the pipeline on the graph again and
say whether the failure is still there; once the pass is mended, it is not.
"""

import ast
import inspect
import platform
import pprint
import sys
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import gtrans
from gtrans.core import Pass
from gtrans.debugging.running import StepGraph
from gtrans.debugging.values import describe, make
from gtrans.errors import ModelError, PassError
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.half import Backend
from gtrans.ir.joint import TAG, Input, JointGraph, Signature, tag
from gtrans.ir.python_text import (
    PREAMBLE,
    constants_as_inputs,
    number,
    read_function,
    write_function,
)
from gtrans.pipeline import Pipeline
from gtrans.registry import is_installed, load_backend
from gtrans.runtime import norms, tap

# Graphs in text name the operators that these modules define.
OPERATORS = (norms, tap)

_FUNCTION = {JointGraph: "joint", ForwardGraph: "forward"}


@dataclass(frozen=True)
class Failure:
    """What goes wrong. Two failures are the same if kind, cause and error agree.

    Attributes:
        kind: "raises", "differs", or "nan" where only the rewritten graph gives NaN.
        passes: the passes that it takes; empty where the backend is to blame.
        where: for "differs" and "nan", which kinds of tensor: "output", "gradient", "buffer".
        error: for "raises", the class of the error.
        text: the failure in words.
    """

    kind: str
    passes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    error: str = ""
    text: str = ""

    def same_as(self, other: "Failure | None") -> bool:
        """Whether another failure is of this kind, has this cause, and is in no other place."""
        if other is None:
            return False
        mine, theirs = (self.kind, self.passes, self.error), (other.kind, other.passes, other.error)
        return mine == theirs and set(other.where) <= set(self.where)

    def __str__(self) -> str:
        blamed = " with ".join(f"pass {p!r}" for p in self.passes) or "the backend"
        return f"{blamed}: {self.text}"


@dataclass(frozen=True)
class Case:
    """A graph with the values of one step, and a pipeline to run on it.

    Attributes:
        graph: a joint or forward graph in normal form.
        values: by name of its placeholders.
        pipeline: the passes.
        allowed: numbers of the rewrites to perform; None performs all.
        backend: what to lower the halves with.
        seed: seed of the random state, and of generated values.
        terms: how many terms the longest sum of the step has, for the bounds of comparisons.
        failure: what went wrong.
        descriptions: how to write values that need not be kept to the last bit.
    """

    graph: StepGraph
    values: Mapping[str, Any]
    pipeline: Pipeline
    allowed: tuple[int, ...] | None = None
    backend: str = "eager"
    seed: int = 0
    terms: int = 1
    failure: Failure | None = None
    descriptions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many nodes the graph has, inputs and output included."""
        return len(self.graph.nodes)

    @property
    def plugins(self) -> tuple[str, ...]:
        """Files or modules of the passes that are not installed.

        Raises:
            PassError: a pass has no file of its own to import it from.
        """
        classes = [*map(type, self.pipeline.passes), type(load_backend(self.backend))]
        return tuple(dict.fromkeys(place for cls in classes if (place := home(cls))))


@dataclass(frozen=True)
class Written:
    """A case as text, before its plug-ins are registered and its graph is read."""

    text: str
    facts: Mapping[str, Any]

    @property
    def plugins(self) -> list[str]:
        """What to register before the case is read."""
        return list(self.facts["plugins"])

    @staticmethod
    def read(path: Path) -> "Written":
        """Reads a file without running it.

        Raises:
            ModelError: the file cannot be read, or holds no case.
        """
        try:
            text = path.read_text()
            for statement in ast.parse(text).body:
                match statement:
                    case ast.Assign(targets=[ast.Name(id="CASE")], value=literal):
                        return Written(text, ast.literal_eval(literal))
        except (OSError, ValueError, SyntaxError) as error:
            raise ModelError(f"cannot read the case {str(path)!r}: {error}") from error
        raise ModelError(
            f"{str(path)!r} is no case: it assigns no CASE. Cases are written by `gtrans reduce`, "
            "by `gtrans run --dump-dir`, and when a pass fails"
        )

    def case(self) -> Case:
        """The case itself. Its plug-ins must be registered.

        Raises:
            GraphError: the graph cannot be read, or names an operator that is not here.
            OptionError: the pipeline names a pass that is not here.
        """
        facts = self.facts
        kind = next(k for k, name in _FUNCTION.items() if name == facts["graph"])
        graph = read_function(self.text, facts["graph"])
        described = {name: entry[-1] for name, entry in facts["inputs"].items()}
        values = {n: made(n, d, facts["seed"]) for n, d in described.items()}
        _fill_in(graph, facts, values)
        module = fx.GraphModule({}, graph)
        joint = kind is JointGraph
        allowed, failure = facts["only_rewrites"], facts["failure"]
        return Case(
            graph=JointGraph(module, _signature(facts)) if joint else ForwardGraph(module),
            values=values,
            pipeline=Pipeline.parse(facts["pipeline"]),
            allowed=None if allowed is None else tuple(allowed),
            backend=facts["backend"],
            seed=facts["seed"],
            terms=facts["terms"],
            failure=None if failure is None else Failure(**failure),
            descriptions=described,
        )


def write(case: Case, title: str) -> str:
    """A case as the text of a Python file.

    Args:
        case: what to write.
        title: its first line.

    Raises:
        GraphError: the graph has no form as text.
        PassError: a pass cannot be imported from elsewhere.
    """
    graph, constants = constants_as_inputs(case.graph.module, _first_tangent(case.graph))
    values = {**case.values, **constants}
    name = _FUNCTION[type(case.graph)]
    inputs: dict[str, Any] = {}
    kinds = _kinds(case.graph)
    for node in graph.find_nodes(op="placeholder"):
        description = case.descriptions.get(node.name)
        if description is None:
            description = describe(values[node.name], exact=True)
        inputs[node.name] = (*kinds.get(node.name, ("input", node.name)), description)
    facts = {
        "graph": name,
        "inputs": inputs,
        **_structure(case.graph),
        "pipeline": str(case.pipeline),
        "plugins": list(case.plugins),
        "only_rewrites": None if case.allowed is None else list(case.allowed),
        "backend": case.backend,
        "seed": case.seed,
        "terms": case.terms,
        "failure": None if case.failure is None else asdict(case.failure),
        "versions": versions(),
    }
    nodes = f"{len(graph.nodes)} nodes, inputs and output included"
    return (
        f'"""{title}\n\n{nodes}. Run it: python FILE, or gtrans repro FILE.\n"""\n\n{PREAMBLE}\n\n'
        f"{write_function(graph, name)}\n\n"
        f"CASE = {pprint.pformat(facts, width=98, sort_dicts=False)}\n\n"
        'if __name__ == "__main__":\n'
        "    from gtrans.cli.main import app\n\n"
        '    app(["repro", __file__])\n'
    )


def versions() -> dict[str, str]:
    """What the outcome of a case may depend on."""
    return {
        "gtrans": gtrans.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def made(name: str, description: Any, seed: int) -> Any:
    """The value of one input of a case."""
    return make(description, seed + zlib.crc32(name.encode()))


def stand_ins(graph: StepGraph) -> dict[str, Any]:
    """Descriptions of values for a graph that was captured without any, from shapes and dtypes.

    Whole numbers are zero, which is an index into anything.
    """
    found: dict[str, Any] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        val = value(node)
        if not isinstance(val, torch.Tensor):
            found[node.name] = number(val)
            continue
        floating = val.dtype.is_floating_point
        form: dict[str, Any] = {"normal": (0.0, 1.0)} if floating else {"constant": 0}
        form |= {"shape": tuple(number(s) for s in val.shape)}
        form |= {"dtype": str(val.dtype).removeprefix("torch.")}
        if isinstance(graph, ForwardGraph) and val.requires_grad:
            form["requires_grad"] = True
        found[node.name] = form
    return found


def home(cls: type[Pass[Any]] | type[Backend]) -> str:
    """From where a pass or backend can be imported: "" if it is installed, a module, or a file.

    Raises:
        PassError: it is defined in the main program, or in no file at all.
    """
    if is_installed(cls):
        return ""
    module = sys.modules.get(cls.__module__)
    if module is not None and cls.__module__ != "__main__":
        if module.__package__:
            return cls.__module__
        file = inspect.getsourcefile(cls)
        if file is not None and Path(file).is_file():
            return str(Path(file).resolve())
    raise PassError(
        f"pass {cls.name!r} is defined in {cls.__module__}, from where no other process can import "
        "it: move it to a file of its own"
    )


def _first_tangent(graph: StepGraph) -> int | None:
    return len(graph.primals) if isinstance(graph, JointGraph) else None


def _kinds(graph: StepGraph) -> dict[str, tuple[str, str]]:
    if isinstance(graph, ForwardGraph):
        return {}
    kinds = {
        node.name: (info.kind, info.name)
        for node, info in zip(graph.primals, graph.signature.inputs, strict=True)
    }
    return kinds | {node.name: ("tangent", node.name) for node in graph.tangents}


def _structure(graph: StepGraph) -> dict[str, Any]:
    """What a joint graph is beyond its calls."""
    if isinstance(graph, ForwardGraph):
        return {}
    calls = [n for n in graph.nodes if n.op == "call_function"]
    regions = {n.name: tag(n).region for n in calls if tag(n).region is not None}
    return {
        "forward_outputs": graph.signature.num_forward_outputs,
        "regions": regions,
        "accumulations": [n.name for n in calls if tag(n).accumulates],
        "recompute": {n.name: n.meta["recompute"].value for n in calls if n.meta.get("recompute")},
    }


def _signature(facts: Mapping[str, Any]) -> Signature:
    inputs = [Input(name, kind) for kind, name, _ in facts["inputs"].values() if kind != "tangent"]
    return Signature(tuple(inputs), facts["forward_outputs"])


def _fill_in(graph: fx.Graph, facts: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Gives every node its fake value and what capture had noted about it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [values[n.name] for n in graph.find_nodes(op="placeholder")]
    fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in inputs]
    FakeTensorProp(fx.GraphModule({}, graph), mode).propagate_dont_convert_inputs(*fakes)
    accumulations = set(facts.get("accumulations", ()))
    policies = {p.value: p for p in torch.utils.checkpoint.CheckpointPolicy}
    for node in graph.nodes:
        if node.name in facts.get("regions", {}):
            node.meta["seq_nr"] = facts["regions"][node.name]
        if node.name in accumulations:
            node.meta["is_gradient_acc"] = True
        if node.name in facts.get("recompute", {}):
            node.meta["recompute"] = policies[facts["recompute"][node.name]]
        if facts["graph"] == _FUNCTION[ForwardGraph] and "val" in node.meta:
            node.meta["example_value"] = node.meta.pop("val")
        node.meta.pop(TAG, None)
