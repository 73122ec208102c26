"""The checker, tested on passes that are wrong on purpose: each must be caught, and by its law."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import gtrans.testing as kit
from gtrans.core import Pass
from gtrans.errors import GTransError, OptionError, VerifyError
from gtrans.pipeline import Pipeline
from gtrans.testing import laws
from tests import wrong_passes as wrong

SPEC = kit.ModelSpec(
    layers=("relu", "linear", "tanh", "residual(linear,gelu)", "dropout", "linear"), width=5
)
# ReLU between two products: one backward reads its output for the mask, one for the weight.
PLAIN = kit.ModelSpec(layers=("relu",), width=5)
# ReLU whose output only its own backward reads.
ALONE = kit.ModelSpec(layers=("relu", "scale"), width=5)


def caught(p: Pass[Any], spec: kit.ModelSpec = SPEC, law: str | None = None) -> str:
    chosen = laws.LAWS if law is None else [getattr(laws, law)]
    model, inputs = spec.build()
    with pytest.raises(GTransError) as error:
        kit.check_pass(p, model, inputs, laws=chosen)
    return str(error.value)


@pytest.mark.parametrize(
    ("p", "law"),
    [
        (wrong.Scaled(), "gradient_keeps_the_contract"),
        (wrong.Rounded(), "gradient_keeps_the_contract"),
        (wrong.TooClose(), "gradient_keeps_the_contract"),
        (wrong.DroppedTerm(), "gradient_keeps_the_contract"),
        (wrong.StaleResidual(), "gradient_keeps_the_contract"),
        (wrong.Swapped(), "gradient_keeps_the_contract"),
        (wrong.RedrawnDropout(), "gradient_keeps_the_contract"),
        (wrong.ChangedForward(), "forward_is_unchanged"),
        (wrong.InfiniteIteration(), "gradient_keeps_the_contract"),
        (wrong.FinishedIteration(), "gradient_keeps_the_contract"),
        (wrong.Rectified(), "linear_in_the_cotangent"),
        (wrong.NotIdempotent(), "running_twice_changes_nothing"),
        (wrong.Silent(), "reports_what_it_does"),
        (wrong.Unasked(), "reports_what_it_does"),
        (wrong.Counting(), "graph_does_not_depend_on_values"),
    ],
    ids=lambda value: value.name if isinstance(value, Pass) else "",
)
def test_a_wrong_pass_is_caught_by_its_law(p: Pass[Any], law: str) -> None:
    message = caught(p)
    assert f"law {law!r} is broken" in message
    assert p.name in message


def test_a_wrong_rule_for_nan_is_caught() -> None:
    assert "special_values_pass_alike" in caught(wrong.WrongNaN(), ALONE)


def test_a_pass_that_keeps_more_is_caught() -> None:
    assert "keeps" in caught(wrong.Hoarder(), PLAIN, "saves_no_more")


def test_a_gradient_of_another_dtype_is_refused_by_the_pipeline() -> None:
    assert "wrong-type" in caught(wrong.WrongType())
    assert "changed from f32" in caught(wrong.WrongType())


SMALL = kit.ModelSpec(layers=("tanh",), width=2, batch=2)


def test_a_biased_pass_is_caught() -> None:
    message = caught(wrong.Noisy(bias=0.05), SMALL, "gradient_keeps_the_contract")
    assert "standard errors away" in message


def test_an_unbiased_pass_without_variance_is_refused() -> None:
    message = caught(wrong.Noisy(noise=0.0), SMALL, "gradient_keeps_the_contract")
    assert "gave the same gradient" in message


@pytest.mark.parametrize(
    "p", [wrong.Noisy(), wrong.HonestlyClose(), wrong.HonestlyRectified()], ids=lambda p: p.name
)
def test_correct_relatives_pass_every_law(p: Pass[Any]) -> None:
    model, inputs = SMALL.build()
    assert kit.check_pass(p, model, inputs) > 0


def test_an_unbiased_pass_is_compared_under_the_same_dropout_mask() -> None:
    spec = kit.ModelSpec(layers=("dropout", "tanh"), width=2, batch=2)
    model, inputs = spec.build()
    law = [laws.gradient_keeps_the_contract]
    assert kit.check_pass(wrong.Noisy(), model, inputs, laws=law) > 0


def test_a_wrong_prediction_of_saved_bytes_is_caught() -> None:
    model, inputs = PLAIN.build()
    case = kit.Case(Pipeline.parse("relu-mask{min_numel=1}"), model, inputs)
    laws.saved_bytes_are_as_predicted(case)
    case.candidate.captured[0].saved_bytes += 4
    with pytest.raises(VerifyError, match="bytes are kept for the backward, the forward handed"):
        laws.saved_bytes_are_as_predicted(case)


def test_a_model_without_anything_trainable_is_refused() -> None:
    with pytest.raises(VerifyError, match="anything trainable"):
        kit.check_pass("none", nn.Linear(2, 2).requires_grad_(False), (torch.ones(1, 2),))


def test_checking_leaves_the_model_and_the_random_state_alone() -> None:
    spec = kit.ModelSpec(layers=("batch_norm", "centre", "dropout"))
    model, inputs = spec.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    kit.check_pass("plan", model, inputs)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_pass_that_rewrites_nothing_has_not_been_tested() -> None:
    choice = kit.Choice(families=["vector"], most_layers=0)
    with pytest.raises(VerifyError, match="rewrites nothing in any of"):
        kit.pass_tests(wrong.WrongNothing(), choice=choice, max_examples=1)()


def test_the_one_line_test_names_the_model_it_failed_on() -> None:
    with pytest.raises(VerifyError) as error:
        kit.pass_tests(wrong.Scaled(), max_examples=1)()
    assert any("ModelSpec(" in note for note in error.value.__notes__)


def test_thresholds_are_lowered_for_small_models() -> None:
    assert str(kit.at_any_size("relu-mask")) == "relu-mask{min_numel=1}"


@given(kit.models())
@settings(max_examples=60)
def test_every_random_model_trains_and_its_description_can_be_pasted(spec: kit.ModelSpec) -> None:
    again = eval(repr(spec), {"ModelSpec": kit.ModelSpec, "torch": torch})
    assert again == spec
    model, inputs = again.build()
    record = kit.Runner(model, inputs).step()
    assert any(g is not None for g in record.gradients.values())
    twin, _ = spec.build()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_layer_offers_near_names() -> None:
    with pytest.raises(OptionError, match="unknown layer 'gelo' of vector models; did you mean"):
        kit.ModelSpec(layers=("gelo",)).build()
