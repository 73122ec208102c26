"""The laws of passes on parameters find passes that break them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from gtrans.analysis.erasable import find_structure
from gtrans.contract import Exact
from gtrans.core import GraphKind, Knob, Pass, Permission, Stats
from gtrans.errors import GraphError, OptionError, VerifyError
from gtrans.ir.program import Program
from gtrans.pipeline import Pipeline
from gtrans.registry import registered
from gtrans.rewrite.erase_graph import GraphErasure
from gtrans.testing import ModelSpec, check_pass

aten = torch.ops.aten


@dataclass(frozen=True)
class OnParameters(Pass[Program]):
    """Does nothing; the base of passes that do something wrong."""

    name: ClassVar[str] = "on-parameters"
    knob: ClassVar[Knob] = Knob.PARAMETERS
    works_on: ClassVar[GraphKind] = Program

    @property
    def contract(self) -> Exact:
        """Exact up to rounding."""
        return Exact(bitwise=False)

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Does nothing."""
        return Stats()


class ErasesTheFirstUnit(OnParameters):
    """Erases the first index of every class, zero or not."""

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Erases it."""
        structure = find_structure(program)
        erased = {c.atom: torch.arange(c.size) < 1 for c in structure.classes if permitted(c.name)}
        GraphErasure(structure, erased).apply()
        return Stats(matched=len(structure.classes), rewritten=len(erased))


class AsksNobody(ErasesTheFirstUnit):
    """The same without permission."""

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Erases it."""
        return super().run(program, lambda site: True)


class WritesIntoTheModel(OnParameters):
    """Scales the model's own parameters."""

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Scales them."""
        with torch.no_grad():
            for tensor in program.tensors.values():
                tensor.mul_(2)
        return Stats()


class Miscounts(OnParameters):
    """Reports rewrites of places it did not match."""

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Reports them."""
        return Stats(rewritten=int(permitted("here")))


class DoublesABias(OnParameters):
    """Reads a bias twice as large: invisible in the value of a bias that is zero."""

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Scales it, once."""
        bias = program.parameters()["first.bias"]
        (reader,) = bias.users
        if reader.target is aten.mul.Tensor or not permitted(reader.name):
            return Stats(matched=1)
        with program.graph.inserting_before(reader):
            twice = program.graph.call_function(aten.mul.Tensor, (bias, 2))
        twice.meta = dict(bias.meta)
        reader.replace_input_with(bias, twice)
        return Stats(matched=1, rewritten=1)


class CutsOnlyTheTensor(OnParameters):
    """Leaves the recorded values as they were."""

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Cuts every tensor."""
        program.tensors = {n: t[1:] for n, t in program.tensors.items()}
        return Stats(matched=1, rewritten=int(permitted("all")))


SPEC = ModelSpec("vector", ("tanh",), width=8, zeros=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (AsksNobody, "law 'nothing_without_permission' is broken.*rewrites although it may not"),
        (WritesIntoTheModel, "law 'the_model_is_left_alone' is broken"),
        (Miscounts, "law 'nothing_without_permission' is broken.*miscounts"),
        (ErasesTheFirstUnit, "law 'running_again_changes_nothing' is broken"),
    ],
)
def test_a_wrong_pass_is_found(wrong: type[OnParameters], message: str) -> None:
    model, inputs = SPEC.build()
    with pytest.raises(VerifyError, match=message):
        check_pass(wrong(), model, inputs)


def test_a_wrong_value_and_a_wrong_gradient_are_found() -> None:
    model, inputs = ModelSpec("vector", width=8).build()
    with pytest.raises(VerifyError, match=r"'it_computes_the_same' is broken.*output 0 differs"):
        check_pass(DoublesABias(), model, inputs)
    assert isinstance(model.first, nn.Linear)
    nn.init.zeros_(model.first.bias)
    with pytest.raises(VerifyError, match=r"gradient of first\.bias"):
        check_pass(DoublesABias(), model, inputs)


def test_an_unsound_program_is_refused_by_the_pipeline() -> None:
    model, inputs = SPEC.build()
    with pytest.raises(GraphError, match=r"first\.weight is \(7, 8\), but the graph reads it as"):
        check_pass(CutsOnlyTheTensor(), model, inputs)


def test_kinds_of_passes_do_not_mix() -> None:
    model, inputs = SPEC.build()
    with registered(OnParameters), pytest.raises(OptionError, match="mixes passes on parameters"):
        check_pass(Pipeline.parse("on-parameters,plan"), model, inputs)
