"""Every registered pass keeps the laws of its knob and contract, on random models.

A pass is tested here by being in the registry; nothing has to be added.
"""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gtrans.testing as kit
from gtrans.contract import Exact
from gtrans.ir.program import Program
from gtrans.pipeline import Pipeline
from gtrans.registry import pass_table
from gtrans.testing import laws

# Passes whose pattern random models do not hold: 16-bit copies of values of 32 bits, and layers
# that the reference keeps whole as well.
NEEDS_MARKERS = frozenset({"memory-share", "fused-lstm"})

NAMES = sorted(pass_table())


# Passes that rewrite what others have made of the graph.
AFTER = {"pareprop": "reversible,plan"}


@pytest.mark.parametrize("name", NAMES)
def test_laws(name: str) -> None:
    passes = f"{AFTER[name]},{name}" if name in AFTER else name
    kit.pass_tests(passes, max_examples=1, max_matching=2, must_rewrite=name not in NEEDS_MARKERS)()


def exact_pipelines() -> st.SearchStrategy[Pipeline]:
    """Several exact passes in any order, the plan last."""
    exact = [n for n in NAMES if n != "plan" and is_exact(n) and not on_parameters(n)]
    return st.permutations(exact).map(lambda names: kit.at_any_size(",".join([*names, "plan"])))


def on_parameters(name: str) -> bool:
    return bool(Pipeline.parse(name).on(Program).passes)


def is_exact(name: str) -> bool:
    pipeline = Pipeline.parse(name)
    return isinstance(pipeline.contract, Exact)


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(exact_pipelines(), kit.models())
@example(
    Pipeline.parse("relu-mask{min_numel=1},plan"),
    # A mask on top of a value that the plan can compute again would only cost bytes.
    kit.ModelSpec(layers=("both_activations", "linear", "batch_norm")),
)
@example(
    Pipeline.parse("plan"),
    # The loss is part of a tuple that is too dear to compute again.
    kit.ModelSpec(width=1, batch=1, length=2, ending="classify"),
)
def test_exact_passes_in_any_order_change_no_bit(pipeline: Pipeline, spec: kit.ModelSpec) -> None:
    model, inputs = spec.build()
    chosen = [
        laws.forward_is_unchanged,
        laws.gradient_keeps_the_contract,
        laws.saved_bytes_are_as_predicted,
        laws.saves_no_more,
        laws.any_cut_gives_the_same,
    ]
    kit.check_pass(pipeline, model, inputs, laws=chosen)
