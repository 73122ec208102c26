"""Regions as optics: their wires, and their picture."""

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from gtrans.api import explain, graphs
from gtrans.errors import OptionError
from gtrans.ir.joint import JointGraph, Side, runs_in
from gtrans.seeing.optic import Optic, first_optic, optic_of, optic_svg

SPACE = "{http://www.w3.org/2000/svg}"


class Deep(nn.Module):
    """Two blocks on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(scope="module")
def joint() -> JointGraph:
    [graph] = graphs(explain(Deep(), torch.randn(16, 8)))
    return graph


@pytest.fixture(scope="module")
def block(joint: JointGraph) -> Optic:
    return optic_of(joint, "blocks.1")


def test_a_block_takes_x_and_gives_y_and_dx(joint: JointGraph, block: Optic) -> None:
    assert len(block.x) == 1  # the stream
    assert len(block.y) == 1  # what is added to it
    assert len(block.dy) == 1
    assert len(block.dx) == 1
    assert len(block.parameters) == 4
    assert set(joint.gradients) >= set(block.gradients)
    assert len(block.gradients) == 4


def test_the_residual_is_what_the_plan_keeps_for_it(joint: JointGraph, block: Optic) -> None:
    assert joint.cut is not None
    assert block.r
    assert set(block.r) <= set(joint.cut)
    assert block.residual_bytes == sum(n.meta["val"].nbytes for n in block.r)
    again = [n for n in block.backward if runs_in(n) is Side.BACKWARD and not joint.is_backward(n)]
    assert any("gelu" in str(n.target) for n in again)


def test_halves_do_not_overlap_and_wires_come_from_outside(block: Optic) -> None:
    inside = {*block.forward, *block.backward}
    assert not set(block.forward) & set(block.backward)
    assert not inside & {*block.x, *block.dy, *block.parameters}
    assert {*block.y, *block.dx, *block.gradients} <= inside


def test_one_node_and_patterns(joint: JointGraph) -> None:
    every = optic_of(joint, "blocks.*")
    assert len(every.forward) > len(optic_of(joint, "blocks.0").forward)
    gelu = next(n for n in joint.nodes if "gelu" in str(n.target))
    single = optic_of(joint, gelu.name)
    assert gelu in single.forward
    assert any("gelu_backward" in str(n.target) for n in single.backward)


def test_the_picture_has_two_boxes_and_labelled_wires(block: Optic) -> None:
    svg = optic_svg(block)
    root = ElementTree.fromstring(svg)
    assert [r.get("class") for r in root.iter(f"{SPACE}rect")] == ["page", "forward", "backward"]
    texts = [t.text or "" for t in root.iter(f"{SPACE}text")]
    for wire in ("x: ", "y: ", "r: ", "dy: ", "dx: ", "parameters: ", "gradients: "):
        assert any(t.startswith(wire) for t in texts), wire
    assert any("gelu, again" in t for t in texts)
    assert block._repr_svg_() == svg
    assert "r          " in str(block)
    assert block.to_dict()["wires"].keys() == block.wires.keys()


def test_unknown_regions_offer_near_names(joint: JointGraph) -> None:
    with pytest.raises(OptionError, match=r"is called 'blocs\.1'; did you mean 'blocks\.[01]"):
        optic_of(joint, "blocs.1")
    with pytest.raises(OptionError, match="no graph with a backward was captured"):
        first_optic([], "blocks.1")
    assert first_optic([joint], "blocks.1") == optic_of(joint, "blocks.1")
