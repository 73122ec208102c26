"""Reduction: few nodes are left, and they fail in the same way."""

from collections.abc import Iterator

import pytest
import torch

from gtrans.debugging.case import Case
from gtrans.debugging.check import failure_of
from gtrans.debugging.reduce import failing_case, reduce
from gtrans.errors import ModelError
from gtrans.pipeline import Pipeline
from gtrans.registry import registered
from tests import wrong_passes as wrong
from tests.debugging.networks import joint_case, layers


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(
        wrong.WrongScale, wrong.WrongPair, wrong.WrongForward, wrong.WrongOffer, wrong.Raises,
        wrong.DroppedTerm, wrong.RedrawnDropout, wrong.Swapped,
    ):  # fmt: skip
        yield


@pytest.mark.parametrize(
    ("passes", "most"),
    [
        ("relu-mask,wrong-scale{at=0},plan", 8),
        ("wrong-pair{first=0,second=2},plan", 14),
        ("dropped-term,plan", 9),
        ("redrawn-dropout,plan", 9),
        ("wrong-offer{at=1},plan", 20),
        ("swapped,plan", 12),
        ("plan,raises", 9),
    ],
)
def test_few_nodes_are_left_that_fail_in_the_same_way(passes: str, most: int) -> None:
    case = joint_case(passes, dropout=0.5 if "dropout" in passes else 0.0)
    failure = failure_of(case)
    told: list[bool] = []

    found = reduce(case, lambda number, nodes, fails: told.append(fails))

    assert failure is not None
    assert failure.same_as(failure_of(found.case))
    assert found.case.size <= most < found.nodes_before == case.size
    assert len(told) == found.tries
    assert set(found.case.descriptions) == set(found.case.values)  # no recorded data is needed
    assert "relu-mask" not in str(found.case.pipeline)


def test_a_forward_graph_is_reduced() -> None:
    model, x = layers()
    pipeline = Pipeline.parse("wrong-forward{at=0},plan")

    found = reduce(failing_case(model, (x,), {}, pipeline))

    assert found.case.size <= 5
    assert "gelu" in str(found.case.graph.graph)


def test_what_does_not_fail_is_not_reduced() -> None:
    model, x = layers()
    with pytest.raises(ModelError, match="there is nothing to reduce: with these values"):
        reduce(joint_case("plan"))
    with pytest.raises(ModelError, match="there is nothing to reduce: on no graph of Layers"):
        failing_case(model, (x,), {}, Pipeline.parse("plan"))
    with pytest.raises(ModelError, match="the model does not accept these inputs"):
        failing_case(model, (torch.zeros(3, 5),), {}, Pipeline.parse("plan"))


def test_a_value_that_matters_is_kept() -> None:
    """A rule that goes wrong at NaN only: generated values hold it where it was."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    x = torch.randn(4, 8)
    x[1, 2] = torch.nan
    with registered(wrong.WrongNaN):
        case: Case = failing_case(model, (x,), {}, Pipeline.parse("wrong-nan,plan"))
        found = reduce(case)
        assert found.case.size <= 7
        again = failure_of(found.case)
        assert again is not None
        assert again.same_as(found.case.failure)
