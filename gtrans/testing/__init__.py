"""The public kit for testing passes: random models, the laws, and one line that runs them.

    import gtrans.testing

    test_my_pass = gtrans.testing.pass_tests("my-pass")

It needs hypothesis (`pip install gtrans[test]`).
"""

from gtrans.testing.laws import LAWS, Case, check_pass
from gtrans.testing.measure import Record, Runner
from gtrans.testing.placement import RandomPlacement, graph_text
from gtrans.testing.strategies import LAYERS, Choice, ModelSpec, layer_lists, models
from gtrans.testing.suite import at_any_size, models_it_rewrites, pass_tests, single_layer_models

__all__ = [
    "LAWS",
    "LAYERS",
    "Case",
    "Choice",
    "ModelSpec",
    "RandomPlacement",
    "Record",
    "Runner",
    "at_any_size",
    "check_pass",
    "graph_text",
    "layer_lists",
    "models",
    "models_it_rewrites",
    "pass_tests",
    "single_layer_models",
]
