"""Makes a test of a pass: every law, on the models it rewrites and on random ones."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings

from gtrans.core import Pass
from gtrans.errors import CaptureError, OptionError, VerifyError
from gtrans.ir.joint import JointGraph
from gtrans.ir.program import Program, export_program
from gtrans.pipeline import Pipeline
from gtrans.testing.laws import as_pipeline, check_pass
from gtrans.testing.measure import Runner
from gtrans.testing.strategies import LAYERS, Choice, Ending, Family, ModelSpec, models

_DEFAULT_EXAMPLES = 10
# Models with more layers take longer to compile than they add to the test.
_MOST_LAYERS_AT_ONCE = 9


def at_any_size(passes: "str | Pass[Any] | Pipeline") -> Pipeline:
    """The same passes with options `min_...` as small as they admit and `only_...` off.

    Small models are below the one, and where others are faster on a machine is no matter of laws.
    """
    return Pipeline(tuple(_smallest(p) for p in as_pipeline(passes).passes))


def _smallest(p: Pass[Any]) -> Pass[Any]:
    for f in fields(p):  # type: ignore[arg-type]  # every pass is a dataclass
        if f.name.startswith("only_"):
            p = replace(p, **{f.name: False})  # type: ignore[type-var]
        if f.name.startswith("min_"):
            for least in (1, 2):
                try:
                    p = replace(p, **{f.name: least})  # type: ignore[type-var]
                    break
                except OptionError:
                    continue
    return p


def single_layer_models() -> list[ModelSpec]:
    """One small model for each layer of each family, between two products."""
    endings: dict[Family, Ending] = {
        "vector": "plain",
        "sequence": "several",
        "tokens": "classify",
        "image": "dictionary",
    }
    seen: set[str] = set()
    found = []
    for family, layers in LAYERS.items():
        names = [""] if family == "tokens" else [n for n in layers if n not in seen]
        seen.update(names if family != "image" else [])
        for name in names:
            chosen = (name, "scale", _product(family)) if name else ()
            # Eight features: some passes want sizes that fill a byte with bits.
            found.append(ModelSpec(family, chosen, width=8, ending=endings[family]))
    # Some passes want a loss whose logits nobody else reads.
    found.append(ModelSpec("tokens", ("tanh",), width=8, ending="loss"))
    return found


def models_it_rewrites(passes: "str | Pass[Any] | Pipeline") -> list[ModelSpec]:
    """The single-layer models in which the passes rewrite something."""
    pipeline = at_any_size(passes)
    if pipeline.on(Program).passes:
        zeroed = [replace(spec, zeros=True) for spec in single_layer_models()]
        return [spec for spec in zeroed if _rewrites_program(pipeline, spec)]
    if any(p.works_on is not JointGraph or type(p).mark is not Pass.mark for p in pipeline.passes):
        captured = [s for s in single_layer_models() if _rewrites_when_captured(pipeline, s)]
        return captured or [s for s in deep_models() if _rewrites_when_captured(pipeline, s)]
    found = [s for s in single_layer_models() if _rewrites(pipeline, s)]
    return found or [s for s in deep_models() if _rewrites(pipeline, s)]


def _rewrites(pipeline: Pipeline, spec: ModelSpec) -> bool:
    steps = [s for graph in _originals(spec) for s in pipeline.run(graph)[1]]
    return any(s.stats.rewritten for s in steps)


def _rewrites_program(pipeline: Pipeline, spec: ModelSpec) -> bool:
    model, inputs = spec.build()
    try:
        _, steps = pipeline.run(export_program(model, inputs, {}))
    except CaptureError:
        return False
    return any(s.stats.rewritten for s in steps)


def deep_models() -> list[ModelSpec]:
    """Models for passes that look for many layers in a row: streams, couplings, recurrences."""
    return [
        ModelSpec("vector", ("residual(layer_norm,linear,gelu)",) * 9, width=8),
        ModelSpec("vector", ("coupling(linear,tanh)",) * 5, width=8),
        ModelSpec("sequence", ("loop", "linear_without_bias"), width=8),
    ]


def pass_tests(
    passes: "str | Pass[Any] | Pipeline",
    *,
    max_examples: int = _DEFAULT_EXAMPLES,
    max_matching: int = 4,
    choice: Choice | None = None,
    must_rewrite: bool = True,
) -> Callable[[], None]:
    """Makes a test function that checks every law of some passes.

        test_my_pass = gtrans.testing.pass_tests("my-pass")

    Args:
        passes: a pass, a pipeline, or pipeline text.
        max_examples: how many random models to try besides those that the passes rewrite.
        max_matching: how many models to make of the layers that they rewrite.
        choice: narrows the random models.
        must_rewrite: fail if the passes rewrite nothing in any model; switch it off for a pass
            whose pattern only its own marker operators make.

    Raises:
        VerifyError: (the test) a law is broken, or nothing was ever rewritten.
    """

    def test() -> None:
        pipeline = at_any_size(passes)
        built_to_match = models_it_rewrites(pipeline)
        if must_rewrite and not built_to_match:
            raise VerifyError(
                f"{pipeline} rewrites nothing in any of {len(single_layer_models())} models with "
                f"one layer each, nor in {len(deep_models())} deep ones, so no law was tested; see "
                "gtrans.testing.LAYERS for what they hold"
            )
        for spec in _few(built_to_match, max_matching):
            _check(pipeline, spec)
        around = given(models(choice))(lambda spec: _check(pipeline, spec))
        settings(
            max_examples=max_examples,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(around)()

    return test


def _check(pipeline: Pipeline, spec: ModelSpec) -> None:
    structural = bool(pipeline.on(Program).passes)
    # Passes on parameters are looking for those that do nothing.
    model, inputs = replace(spec, zeros=structural or spec.zeros).build()
    try:
        check_pass(pipeline, model, inputs)
    except CaptureError:
        if not structural:
            raise  # a model with graph breaks is no single program
    except Exception as error:
        error.add_note(f"  on {spec!r}")
        raise


def _few(specs: list[ModelSpec], most: int) -> list[ModelSpec]:
    """Some models with several of the layers each: it is compilation that takes the time."""
    merged: dict[Family, ModelSpec] = {}
    for spec in specs:
        into = merged.get(spec.family)
        if into is None:
            merged[spec.family] = spec
        elif len(into.layers) + len(spec.layers) <= _MOST_LAYERS_AT_ONCE:
            merged[spec.family] = replace(into, layers=into.layers + spec.layers)
    return list(merged.values())[:most]


def _product(family: Family) -> str:
    return "pointwise_conv2d" if family == "image" else "linear_without_bias"


@cache
def _originals(spec: ModelSpec) -> tuple[JointGraph, ...]:
    torch.compiler.reset()
    model, inputs = spec.build()
    runner = Runner(model, inputs, Pipeline())
    runner.step()
    return tuple(c.original for c in runner.captured if c.original is not None)


def _rewrites_when_captured(pipeline: Pipeline, spec: ModelSpec) -> bool:
    torch.compiler.reset()
    model, inputs = spec.build()
    runner = Runner(model, inputs, pipeline)
    runner.step()
    return runner.rewritten > 0
