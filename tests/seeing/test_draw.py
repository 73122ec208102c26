"""Pictures of joint graphs."""

import itertools
import re
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from gtrans.api import explain, graphs
from gtrans.ir.joint import JointGraph
from gtrans.seeing.draw import to_svg

SPACE = "{http://www.w3.org/2000/svg}"


class Deep(nn.Module):
    """Blocks of two layers, with a residual stream."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def joint(depth: int) -> JointGraph:
    [graph] = graphs(explain(Deep(depth), torch.randn(4, 8)))
    return graph


def boxes(svg: str, side: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return [r for r in root.iter(f"{SPACE}rect") if r.get("class") == side]


def titles(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [t.text or "" for t in root.iter(f"{SPACE}text") if t.get("class") == "head"]


def paths(svg: str, style: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return [p for p in root.iter(f"{SPACE}path") if p.get("class") == style]


def test_small_graphs_are_drawn_operator_by_operator() -> None:
    svg = to_svg(joint(1), title="a <model>")

    assert "a &lt;model&gt;" in svg
    assert {"gelu", "addmm", "gelu_backward"} <= set(titles(svg))
    assert paths(svg, "kept")


def test_the_forward_stands_left_of_the_backward_and_nothing_overlaps() -> None:
    svg = to_svg(joint(6))
    forward, backward = boxes(svg, "forward"), boxes(svg, "backward")

    edge = max(float(b.get("x", 0)) + float(b.get("width", 0)) for b in forward)
    assert edge < min(float(b.get("x", 0)) for b in backward)
    for column in (forward, backward):
        spans = sorted((float(b.get("y", 0)), float(b.get("height", 0))) for b in column)
        assert all(y + height <= below for (y, height), (below, _) in itertools.pairwise(spans))
    page = float(re.search(r'height="(\d+)"', svg)[1])  # type: ignore[index]
    assert max(float(b.get("y", 0)) + float(b.get("height", 0)) for b in forward) < page


@pytest.mark.parametrize(("depth", "rows"), [(12, 48), (24, 48)])
def test_large_graphs_are_folded_to_modules(depth: int, rows: int) -> None:
    svg = to_svg(joint(depth), most_rows=rows)

    assert len(boxes(svg, "forward")) <= rows
    assert "folded to modules of depth" in svg
    assert any(t.startswith("blocks") for t in titles(svg))


def test_only_what_the_plan_keeps_crosses_over() -> None:
    graph = joint(2)
    assert graph.cut is not None
    planned = to_svg(graph)
    graph.cut = None
    unplanned = to_svg(graph)

    assert "cross over (before the plan" in unplanned
    assert "cross over (before the plan" not in planned
    assert paths(planned, "rebuilt")  # GELU's output is computed again from what is kept
    assert not paths(unplanned, "rebuilt")
    kept = {n.name for n in joint(2).cut or ()}
    for path in [*paths(planned, "kept"), *paths(planned, "rebuilt")]:
        title = path.find(f"{SPACE}title")
        assert title is not None
        assert {line.split(" ")[0] for line in (title.text or "").splitlines()} <= kept
