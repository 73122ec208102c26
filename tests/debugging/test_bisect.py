"""Bisection: the search itself, and that it finds rewrites that are wrong on purpose."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gtrans.backends.inductor import Inductor
from gtrans.debugging.bisect import bisect, minimal_failing
from gtrans.debugging.numbers import format_numbers, parse_numbers
from gtrans.debugging.recording import Recording
from gtrans.debugging.running import run
from gtrans.errors import OptionError, PassError
from gtrans.pipeline import Gate, Pipeline
from gtrans.registry import registered
from gtrans.verification import compare
from tests import wrong_passes as wrong
from tests.debugging.networks import joint_case


class Residual(nn.Module):
    """Some blocks with a GELU each, optionally dropout and a graph break."""

    def __init__(self, depth: int = 4, *, broken: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(8)
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:2]:
            x = x + self.dropout(nn.functional.gelu(block(x)))
        if self.broken:
            torch._dynamo.graph_break()
        for block in self.blocks[2:]:
            x = x + self.dropout(nn.functional.gelu(block(x)))
        normed: torch.Tensor = self.norm(x)
        return normed


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(
        wrong.WrongScale, wrong.WrongPair, wrong.WrongForward, wrong.WrongOffer, wrong.Raises
    ):
        yield


# torch looks at `.grad` of what enters the graph after a break, and warns about itself.
breaks_the_graph = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")


def search(model: nn.Module, text: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return bisect(model, (torch.randn(6, 8),), {}, Pipeline.parse(text), **options)


@given(st.integers(1, 40), st.data())
def test_a_single_culprit_is_found_by_halving(count: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(0, count - 1))
    asked: list[Sequence[int]] = []

    def fails(some: Sequence[int]) -> bool:
        asked.append(some)
        return culprit in some

    assert minimal_failing(range(count), fails) == (culprit,)
    assert len(asked) <= (count - 1).bit_length() + 1


@given(st.integers(1, 20), st.data())
def test_culprits_that_act_together_are_found(count: int, data: st.DataObject) -> None:
    culprits = data.draw(st.sets(st.integers(0, count - 1), min_size=1))

    found = minimal_failing(range(count), lambda some: culprits <= set(some))

    assert set(found) == culprits


@given(st.integers(1, 12), st.data())
def test_what_is_found_fails_and_is_minimal(count: int, data: st.DataObject) -> None:
    subsets = st.frozensets(st.integers(0, count - 1), min_size=1)
    failing = [*data.draw(st.lists(subsets, max_size=4)), frozenset(range(count))]

    def fails(some: Sequence[int]) -> bool:
        return any(f <= set(some) for f in failing)

    found = minimal_failing(range(count), fails)

    assert fails(found)
    assert not any(fails([f for f in found if f != left_out]) for left_out in found)


@given(st.frozensets(st.integers(1, 60)))
def test_numbers_round_trip_as_text(numbers: frozenset[int]) -> None:
    assert parse_numbers(format_numbers(numbers)) == numbers


def test_numbers_are_folded() -> None:
    assert format_numbers([18, *range(1, 17)]) == "1-16,18"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,x", "cannot read rewrite numbers '1,x' at 'x'; write '18' or '1-16,18'"),
        ("1-", "cannot read rewrite numbers '1-' at '1-'"),
        ("0", "rewrite numbers start at 1 and ranges go upwards; '0' in '0' does not"),
        ("2,5-3", "ranges go upwards; '5-3' in '2,5-3' does not"),
    ],
)
def test_unreadable_numbers_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match="rewrite numbers") as caught:
        parse_numbers(text)
    assert message in str(caught.value)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    found = search(Residual(), "wrong-scale{at=9},plan")

    assert found.verification.ok
    assert (found.culprits, found.complete, found.rewrites) == ((), True, 5)


@pytest.mark.parametrize("at", [0, 3])
def test_the_single_wrong_rewrite_is_found(at: int) -> None:
    found = search(Residual(), f"relu-mask,wrong-scale{{at={at}}},plan")

    assert found.passes == ["wrong-scale"]
    assert [r.number for c in found.culprits for r in c.rewrites] == [at + 1]
    assert found.numbers == format_numbers([at + 1, 5])  # the plan is performed in every check
    assert found.complete
    assert not found.verification.ok
    assert found.recaptured == 2  # with all rewrites, and with the culprit to confirm
    assert "test_bisect.py" in found.culprits[0].where[0]


def test_several_culprits_are_found_one_after_another() -> None:
    found = search(Residual(), "wrong-scale{at=1,also=3},plan")

    assert [c.rewrites[0].number for c in found.culprits] == [2, 4]
    assert found.complete


def test_the_search_stops_at_its_limit() -> None:
    found = search(Residual(), "wrong-scale{at=1,also=3},plan", most=1)

    assert len(found.culprits) == 1
    assert not found.complete
    with pytest.raises(OptionError, match="most must be at least 1, got 0"):
        search(Residual(), "plan", most=0)


def test_rewrites_that_break_it_only_together_are_one_culprit() -> None:
    found = search(Residual(), "wrong-pair{first=0,second=3},plan")

    assert [[r.number for r in c.rewrites] for c in found.culprits] == [[1, 4]]
    assert " together with " in str(found.culprits[0])


@breaks_the_graph
def test_culprits_are_found_across_graph_breaks_with_dropout() -> None:
    found = search(Residual(broken=True, dropout=0.5), "wrong-scale{at=1},plan")

    # Numbers go on from graph to graph: two activations and a cut in each.
    assert [c.rewrites[0].number for c in found.culprits] == [2, 5]
    assert found.recaptured == 2


def test_a_wrong_rewrite_of_the_forward_graph_is_found() -> None:
    found = search(Residual(), "wrong-forward{at=2},wrong-scale{at=9},plan")

    assert found.passes == ["wrong-forward"]
    assert found.numbers == "3,9"
    assert found.recaptured == 2


def test_a_wrong_offer_is_found_although_the_plan_must_take_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.GELU())))
    model.append(nn.Linear(8, 8))

    found = bisect(model, (torch.randn(6, 8),), {}, Pipeline.parse("wrong-offer{at=1},plan"))

    assert [str(r) for c in found.culprits for r in c.rewrites] == ["#2 wrong-offer at gelu_1"]
    assert found.background == (4,)


def test_a_fault_without_any_rewrite_is_no_culprit() -> None:
    class Counting(Residual):
        """Computes something else every time it is traced or run."""

        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            return super().forward(x) * float(type(self).calls)

    found = search(Counting(), "wrong-scale{at=9},plan")

    assert not found.verification.ok
    assert found.culprits == ()
    assert not found.complete


def test_a_pass_that_raises_is_named() -> None:
    with pytest.raises(PassError, match="pass 'raises' failed with ZeroDivisionError: on purpose"):
        search(Residual(), "raises,plan")


@breaks_the_graph
def test_a_recording_agrees_with_the_comparison_of_the_whole_model() -> None:
    torch.manual_seed(0)
    model, x = Residual(broken=True, dropout=0.3), torch.randn(6, 8)
    recording = Recording(model, (x,), {}, dtype=torch.float64)
    pipeline = Pipeline.parse("wrong-scale{at=0},plan")

    for numbers in ([], [1], [2], [1, 2, 3], [4], [5], [2, 5, 6]):
        whole = compare(model, (x,), {}, pipeline, gate=Gate(numbers), dtypes=(torch.float64,))
        assert recording.agrees(pipeline, Gate(numbers)) is whole.ok, numbers


def test_the_model_stays_as_it_was() -> None:
    model = Residual()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    search(model, "wrong-scale,plan")

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_shape_of_the_json() -> None:
    value = search(Residual(), "wrong-scale{at=2},plan").to_dict()

    assert value.keys() == {
        "ok",
        "pipeline",
        "rewrites",
        "background",
        "passes",
        "culprits",
        "only_rewrites",
        "complete",
        "checks",
        "recaptured",
        "seconds",
        "backend",
        "halves",
    }
    [[culprit]] = value["culprits"]
    assert culprit["number"] == 3
    assert culprit.keys() == {"number", "pass", "site", "where"}


@pytest.mark.inductor
def test_recorded_halves_are_lowered_without_their_model() -> None:
    """What the backend stage of a reduction does: Inductor on a graph out of a file."""
    case = joint_case("plan")
    expected = run(case.graph, case.values, 0)

    found = run(case.graph, case.values, 0, {"forward": Inductor(), "backward": Inductor()})

    for key, value in expected.items():
        other = found[key]
        assert (value is None) is (other is None)
        assert value is None or other is None or torch.allclose(value, other)
