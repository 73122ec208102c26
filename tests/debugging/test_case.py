"""Cases as Python files: what is written can be read, run, and fails in the same way."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from gtrans.debugging.case import Case, Failure, Written, home, write
from gtrans.debugging.check import Checker, failure_of
from gtrans.debugging.running import run
from gtrans.debugging.values import describe, make
from gtrans.errors import GraphError, ModelError, PassError
from gtrans.ir.joint import tag
from gtrans.ir.python_text import PREAMBLE, constants_as_inputs, read_function, write_function
from gtrans.passes.residual.relu_mask import ReluMask
from gtrans.registry import registered
from tests import wrong_passes as wrong
from tests.debugging.networks import joint_case


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(wrong.WrongScale, wrong.Raises):
        yield


def through_a_file(case: Case, folder: Path) -> Case:
    file = folder / "case.py"
    file.write_text(write(case, "a case"))
    return Written.read(file).case()


# ---------------------------------------------------------------------- graphs as text


def test_a_graph_reads_back_as_it_was_written() -> None:
    graph = joint_case("plan", dropout=0.5).graph

    again = read_function(PREAMBLE + write_function(graph.graph, "joint"), "joint")

    assert [(n.name, n.op, n.target, str(n.args), str(n.kwargs)) for n in again.nodes] == [
        (n.name, n.op, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes
    ]


def test_the_written_function_runs() -> None:
    case = joint_case("plan")
    names: dict[str, object] = {}
    exec(PREAMBLE + write_function(case.graph.graph, "joint"), names)

    found = names["joint"](**case.values)  # type: ignore[operator]

    inputs = [case.values[n.name] for n in case.graph.graph.find_nodes(op="placeholder")]
    expected = fx.Interpreter(case.graph.module).run(*inputs, enable_io_processing=False)
    for a, b in zip(found, expected, strict=True):
        assert a is b or torch.equal(a, b)


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([torch.float32, torch.device("cpu"), torch.strided, torch.channels_last, ...])
    | st.builds(slice, st.none() | st.integers(), st.integers()),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(literals)
def test_every_argument_reads_back(value: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output([graph.call_function(torch.add, (x, value), {"k": value})])

    again = read_function(write_function(graph, "f"), "f")

    [call] = again.find_nodes(op="call_function", target=torch.add)
    assert repr(call.args[1]) == repr(value)
    assert repr(call.kwargs["k"]) == repr(value)


def test_methods_items_and_constants_read_back() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Buffer(torch.ones(3))

        def forward(self, x: torch.Tensor) -> object:
            return x.view(2, 3)[0].add(self.shift)

    traced = fx.symbolic_trace(Net())
    graph, constants = constants_as_inputs(traced)
    again = fx.GraphModule({}, read_function(write_function(graph, "f"), "f"))

    assert list(constants) == ["shift"]
    x = torch.arange(6.0)
    assert torch.equal(again(x, constants["shift"]), Net()(x))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def g(x):\n return x", "defines no function 'f'"),
        ("def f(x):\n x += 1", "line 2 is neither a call nor a return"),
        ("def f(x):\n y = 1", "'y' is assigned something that is no call"),
        ("def f(x):\n x = torch.add(x)", "'x' is assigned twice"),
        ("def f(x):\n y = torch.no_such(x)", "there is no 'torch.no_such' here"),
        ("def f(x):\n y = torch.add(x, lambda: 0)", "cannot read 'lambda: 0'"),
    ],
)
def test_what_is_no_graph_is_refused(text: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        read_function(text, "f")


def test_what_has_no_text_is_refused() -> None:
    def local(x: object) -> object:
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(local, (x,))
    with pytest.raises(GraphError, match="which cannot be imported by a name"):
        write_function(graph, "f")
    odd: Any = object()
    call.target, call.args = torch.add, (x, odd)
    with pytest.raises(GraphError, match="has an argument of type object, which has no form"):
        write_function(graph, "f")
    call.op, call.target, call.args = "call_module", "layer", (x,)
    with pytest.raises(GraphError, match="is a call_module, no call"):
        write_function(graph, "f")
    module = fx.GraphModule({}, fx.Graph())
    module.add_submodule("inner", fx.GraphModule({}, fx.Graph()))
    module.graph.create_node("get_attr", "inner")
    with pytest.raises(GraphError, match="a graph that calls other graphs"):
        constants_as_inputs(module)


# ---------------------------------------------------------------------- values

dtypes = st.sampled_from(
    [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)


@given(dtypes, st.sampled_from([(), (3,), (5, 7), (0, 2), (2, 3, 4)]), st.booleans(), st.booleans())
def test_an_exact_description_makes_the_same_tensor(
    dtype: torch.dtype, shape: tuple[int, ...], special: bool, turned: bool
) -> None:
    value = (torch.randn(shape, dtype=torch.float64) * 5).to(dtype)
    if special and value.is_floating_point() and value.numel():
        value.view(-1)[0] = math.nan
        value.view(-1)[-1] = -math.inf
    value = value.mT if turned and value.dim() > 1 else value

    again = make(eval(repr(describe(value, exact=True))), 0)

    assert again.dtype is value.dtype
    assert again.stride() == value.stride() or not value.numel()
    assert torch.equal(again.nan_to_num(1e3), value.nan_to_num(1e3))


def test_a_generated_value_keeps_mean_deviation_and_what_is_not_finite() -> None:
    value = torch.randn(40, 50) * 3 + 2
    value[3, 4] = math.nan

    again = make(describe(value, exact=False), 7)

    assert torch.equal(again.nan_to_num(), make(describe(value, exact=False), 7).nan_to_num())
    assert again.isnan().nonzero().tolist() == [[3, 4]]
    assert abs(float(again.nanmean()) - 2) < 0.3
    assert make(describe(torch.arange(3, 90), exact=False), 0).unique().min() >= 3
    with pytest.raises(ValueError, match="no description of a value"):
        make({"shape": (2,), "dtype": "float32"}, 0)


# ---------------------------------------------------------------------- cases


def test_a_case_goes_through_a_file(tmp_path: Path) -> None:
    case = joint_case("wrong-scale{at=1},plan", dropout=0.5)
    case = replace(case, failure=failure_of(case), allowed=(1, 2), seed=3)

    again = through_a_file(case, tmp_path)

    assert again.failure == case.failure
    assert str(again.pipeline) == str(case.pipeline)
    assert (again.allowed, again.seed, again.terms) == (case.allowed, case.seed, case.terms)
    assert failure_of(again) is not None
    for a, b in zip(case.graph.nodes, again.graph.nodes, strict=True):
        if a.op != "output":
            assert tag(a) == tag(b)
            assert str(a.meta["val"]) == str(b.meta["val"])
    before, after = (run(c.graph, c.values, c.seed) for c in (case, again))
    assert before.keys() == after.keys()
    for key, expected in before.items():
        found = after[key]
        assert (expected is None) is (found is None)
        assert expected is None or found is None or torch.equal(expected, found)


def test_the_failure_says_who_is_to_blame() -> None:
    failure = failure_of(joint_case("relu-mask,wrong-scale{at=2},plan"))

    assert failure is not None
    assert failure.same_as(Failure("differs", ("wrong-scale",), ("gradient",)))
    assert "differs by 1.0e-03, allowed 1.0e-09" in failure.text
    assert failure_of(joint_case("wrong-scale{at=9},plan")) is None


def test_a_pass_that_raises_is_a_failure() -> None:
    failure = failure_of(joint_case("plan,raises"))

    assert failure is not None
    assert failure.same_as(Failure("raises", ("raises",), error="ZeroDivisionError"))


def test_a_failure_with_another_cause_is_another_failure() -> None:
    failure = Failure("differs", ("a",), ("gradient", "output"))
    assert failure.same_as(replace(failure, where=("gradient",), text="x"))
    assert not failure.same_as(replace(failure, passes=("b",)))
    assert not replace(failure, where=("output",)).same_as(failure)
    assert not failure.same_as(None)
    case = replace(joint_case("wrong-scale,plan"), failure=failure)
    assert failure_of(case) is None  # it is wrong without that pass, too


def test_the_reference_is_run_once() -> None:
    checker = Checker(joint_case("plan"))
    assert checker.outcome(checker.case.pipeline).ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "is no case: it assigns no CASE"),
        ("CASE = f()", "cannot read the case"),
        ("CASE = ", "cannot read the case"),
    ],
)
def test_what_is_no_case_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(ModelError, match=message):
        Written.read(tmp_path / "a.py")


def test_where_passes_are_imported_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert home(ReluMask) == ""
    assert home(wrong.WrongScale) == "tests.wrong_passes"
    monkeypatch.setattr(wrong.WrongScale, "__module__", "__main__")
    with pytest.raises(PassError, match="move it to a file of its own"):
        home(wrong.WrongScale)
