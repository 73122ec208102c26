"""Where in the user's model a node comes from."""

import pytest
import torch

from gtrans.ir.source import Location, location, readable_path
from tests.ir.graphs import joint_with

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['encoder']._parameters['weight']", "encoder.weight"),
        ("L['x']", "x"),
        ("L['args'][0]", "args.0"),
        ("L['self']._buffers['mean']", "mean"),
        ("L['self']._modules['layers']._modules['0']._parameters['bias']", "layers.0.bias"),
    ],
)
def test_paths_of_dynamo_become_paths_of_the_model(source: str, path: str) -> None:
    assert readable_path(source) == path


def test_a_node_knows_its_line_and_module() -> None:
    joint = joint_with(torch.relu)
    place = location(joint.calls(aten.mm.default)[0])
    assert place.module == "first"
    assert place.kind == "Linear"
    assert place.line > 0
    relu = location(joint.calls(aten.relu.default)[0])
    assert relu.file.endswith("graphs.py")
    assert "self.function(self.first(x))" in relu.code
    assert str(relu).startswith("graphs.py:")


def test_an_unknown_place_says_so() -> None:
    assert str(Location()) == "unknown source"
    assert str(Location(module="encoder")) == "encoder"
