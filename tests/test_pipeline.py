"""Pipelines: text form, private copies, failures, numbering of rewrites."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gtrans.api import install
from gtrans.capture import Compiler
from gtrans.contract import Close, Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, format_option
from gtrans.errors import ContractError, GraphError, OptionError, PassError
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Gate, Pipeline, make_pass, parse_option
from gtrans.plan.planner import Plan
from gtrans.registry import registered
from gtrans.testing import graph_text
from tests import wrong_passes as wrong
from tests.ir.graphs import Written, joint_with

aten = torch.ops.aten


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Options(Pass[JointGraph]):
    """A pass with an option of each kind, which does nothing."""

    name: ClassVar[str] = "options"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    needed: int
    flag: bool = False
    rate: float = 0.5
    way: Literal["up", "down"] = "up"
    bits: int | None = None
    text: str = "x"
    colour: Colour = Colour.RED

    @property
    def contract(self) -> Contract:
        return Close(0.1)

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        return Stats()


@pytest.fixture(autouse=True, scope="module")
def _options_is_registered() -> Iterator[None]:
    with registered(Options):
        yield


# ---------------------------------------------------------------------------------- text form

options = st.builds(
    Options,
    needed=st.integers(-5, 5),
    flag=st.booleans(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    way=st.sampled_from(["up", "down"]),
    bits=st.none() | st.integers(1, 8),
    text=st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=5),
)
plans = st.builds(Plan, st.sampled_from(["cheap", "none"]), st.floats(1e-6, 1e6))


@given(st.lists(options | plans, max_size=3).map(tuple))
def test_a_pipeline_reads_back_as_it_prints(passes: tuple[Pass[Any], ...]) -> None:
    pipeline = Pipeline(passes)
    assert Pipeline.parse(str(pipeline)) == pipeline


@given(st.integers() | st.floats(allow_nan=False) | st.booleans())
def test_an_option_reads_back_as_it_prints(value: int | float | bool) -> None:
    assert parse_option(format_option(value), type(value), "x") == value


def test_spaces_dashes_and_aliases() -> None:
    assert Pipeline.parse(" relu-mask { min-numel = 7 } , plan ") == Pipeline.parse(
        "relu-mask{min_numel=7},plan"
    )
    assert Pipeline.parse("none").passes == ()
    assert Pipeline.parse("none,plan") == Pipeline.parse("plan")
    assert isinstance(Pipeline.parse("default").passes[-1], Plan)
    assert isinstance(Pipeline.parse("default").contract, Exact)
    assert parse_option("red", Colour, "x") is Colour.RED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan{", r"cannot read pipeline 'plan\{' at 'plan\{'; expected pass names like"),
        ("Plan", "cannot read pipeline 'Plan'"),
        ("plan plan", "cannot read pipeline"),
        ("plann", "unknown pass 'plann'; did you mean 'plan'"),
        ("plan{prize=1}", "pass 'plan' has no option 'prize'; did you mean 'price'"),
        ("plan{price}", "option 'price' of 'plan' has no value"),
        ("plan{price=cheap}", r"plan\{price\} must be a number, got 'cheap'"),
        ("plan{price=0}", "plan: price must be positive"),
        ("plan{recompute=chep}", r"plan\{recompute\}: 'chep'; did you mean 'cheap'"),
        ("relu-mask{min_numel=many}", "must be a whole number, got 'many'"),
        ("options{flag=true}", "pass 'options' needs the option 'needed'"),
        ("options{needed=1,flag=yes}", r"options\{flag\} must be true or false, got 'yes'"),
    ],
)
def test_what_cannot_be_read_is_explained(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Pipeline.parse(text)


def test_without_leaves_passes_out_and_knows_their_names() -> None:
    pipeline = Pipeline.parse("relu-mask,plan").without(["relu-mask"])
    assert str(pipeline) == "plan"
    with pytest.raises(OptionError, match="unknown pass 'relu-msk'; did you mean"):
        pipeline.without(["relu-msk"])


def test_a_weaker_pass_than_admitted_is_named() -> None:
    pipeline = Pipeline((Options(1), Plan()))
    pipeline.require("close")
    with pytest.raises(
        ContractError, match=r"pass 'options' is close \(0.1\), weaker than .*allow"
    ):
        pipeline.require("exact")
    assert pipeline.contract == Close(0.1)


def test_make_pass_needs_known_options() -> None:
    assert make_pass("options", {"needed": "3", "bits": "None"}) == Options(3)


# ------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (wrong.Raises(), PassError, "pass 'raises' failed with ZeroDivisionError: on purpose"),
        (wrong.Breaks(), GraphError, "pass 'breaks' failed: forward output"),
        (wrong.WrongType(), GraphError, "pass 'wrong-type' failed: output 1 changed from"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_failing_pass_is_named_and_the_graph_stays(
    p: Pass[Any], error: type[Exception], message: str
) -> None:
    joint = joint_with(torch.relu)
    before = graph_text(joint)
    with pytest.raises(error, match=message):
        Pipeline((p,)).run(joint)
    assert graph_text(joint) == before
    result, (step,) = Pipeline((p,)).run(joint, skip_failures=True)
    assert result is joint
    assert step.error
    assert graph_text(joint) == before


@pytest.mark.parametrize("p", [wrong.Raises(), wrong.Breaks()], ids=lambda p: p.name)
def test_a_model_trains_on_without_a_pass_that_fails(
    p: Pass[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Written(torch.relu), torch.randn(2, 4)
    model(x).sum().backward()
    expected = [q.grad.clone() for q in model.parameters() if q.grad is not None]
    model.zero_grad()
    install(model, Compiler(Pipeline((p,)), "eager", skip_failures=True))
    with caplog.at_level(logging.WARNING, logger="gtrans"):
        model(x).sum().backward()
    assert f"gtrans left out pass {p.name!r}" in caplog.text
    for q, g in zip(model.parameters(), expected, strict=True):
        assert q.grad is not None
        assert torch.equal(q.grad, g)


@pytest.mark.parametrize("p", [wrong.Raises(), wrong.Breaks()], ids=lambda p: p.name)
def test_a_pass_that_fails_can_be_an_error(p: Pass[Any]) -> None:
    model = Written(torch.relu)
    install(model, Compiler(Pipeline((p,)), "eager", skip_failures=False))
    with pytest.raises((PassError, GraphError), match=f"pass {p.name!r} failed"):
        model(torch.randn(2, 4))


# ---------------------------------------------------------------------------------- numbering


def test_rewrites_are_numbered_and_can_be_held_back_one_by_one() -> None:
    joint = joint_with(torch.relu)
    everything = Gate()
    pipeline = Pipeline((wrong.Scaled(),))
    pipeline.run(joint, gate=everything)
    assert [r.number for r in everything.seen] == [1, 2]
    assert str(everything.seen[0]).startswith("#1 scaled at mm")
    only_second = Gate({2})
    rewritten, (step,) = pipeline.run(joint, gate=only_second)
    assert (step.stats.rewritten, step.stats.skipped[HELD_BACK]) == (1, 1)
    assert [r.site for r in only_second.seen] == [r.site for r in everything.seen]
    assert isinstance(rewritten, JointGraph)
    assert len(rewritten.calls(aten.mul.Tensor)) == 1


def test_a_step_counts_what_changed_and_observers_see_both_graphs() -> None:
    seen: list[tuple[str, int, int]] = []
    joint = joint_with(torch.relu)
    rewritten, (step,) = Pipeline.parse("relu-mask{min_numel=1}").run(
        joint, observers=[lambda s, a, b: seen.append((s.name, len(a.nodes), len(b.nodes)))]
    )
    assert seen == [("relu-mask", len(joint.nodes), len(rewritten.nodes))]
    assert step.nodes_before == len(joint.nodes)
    assert step.stats.matched == step.stats.rewritten + step.stats.skipped.total()
    assert bool(step.op_changes) == bool(step.stats.rewritten)
    assert step.seconds > 0


def test_passes_go_to_the_graphs_they_work_on() -> None:
    pipeline = Pipeline.parse("relu-mask,plan")
    assert pipeline.on(JointGraph) == pipeline
    assert pipeline.on(ForwardGraph).passes == ()
