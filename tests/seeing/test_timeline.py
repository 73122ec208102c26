"""Memory over a step: its figures, and its three pictures."""

import builtins
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import gtrans
from gtrans.errors import ModelError, OptionError
from gtrans.explanation import Explanation
from gtrans.pipeline import Pipeline
from gtrans.seeing.charts import resampled, spread
from gtrans.seeing.timeline import Part, Timeline, timeline_of

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]


class Deep(nn.Module):
    """Blocks on a residual stream, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x.square().mean()


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    return gtrans.explain(Deep(), torch.randn(256, 16), memory=0.9).timeline()


class Broken(nn.Module):
    """Two graphs, with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return torch.tanh(self.second(x)).sum()


def test_the_peaks_are_those_of_the_explanation(build: Build) -> None:
    for name in ("conv", "gpt"):
        model, inputs = build(name)
        explanation = gtrans.explain(model, *inputs)
        drawn = explanation.timeline()
        assert drawn.peak_after == explanation.peak == drawn.why.peak
        assert drawn.peak_before == explanation.plain_peak
        assert [p.half for p in drawn.parts] == ["forward", "backward"]


def test_graphs_run_forward_in_order_and_backward_in_reverse() -> None:
    drawn = gtrans.explain(Broken(), torch.randn(16, 8)).timeline()

    order = [(p.half, p.graph) for p in drawn.parts]
    assert order == [("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0)]
    # While the second graph runs, the first one still holds what it saved.
    assert drawn.parts[1].before[0] > drawn.parts[0].before[0]


def test_a_budget_bounds_every_moment(timeline: Timeline) -> None:
    assert timeline.budget is not None
    assert timeline.peak_after <= timeline.budget < timeline.peak_before
    assert "budget" in timeline.summary


def test_the_terminal_shows_both_versions_and_the_peak(timeline: Timeline) -> None:
    lines = timeline.text(width=60, height=8).splitlines()

    assert len(lines) == 11
    assert all(len(line) <= 72 for line in lines[:10])
    assert {"█", "░"} <= set("".join(lines[:8]))
    assert "┄" in "".join(lines[:8])
    peak = lines[8].index("^")
    column = [line[peak] if len(line) > peak else " " for line in lines[:8]]
    heights = [
        sum(len(line) > at and line[at] in "▁▂▃▄▅▆▇█" for line in lines[:8]) for at in range(12, 72)
    ]
    assert sum(c in "▁▂▃▄▅▆▇█" for c in column) == max(heights)
    assert "|forward" in lines[9]
    assert "|backward" in lines[9]
    assert "what" in str(timeline)


def test_the_svg_is_well_formed_and_names_the_tensors_at_the_peak(timeline: Timeline) -> None:
    svg = timeline.svg()
    root = ElementTree.fromstring(svg)
    classes = {e.get("class") for e in root.iter()}
    assert {"forward", "backward", "before", "after", "budget", "peak"} <= classes
    assert timeline._repr_svg_() == svg
    texts = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("test_timeline.py" in t for t in texts)
    assert any("of parameters, buffers and inputs" in t for t in texts)


@pytest.mark.parametrize(
    ("ending", "magic"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("txt", b"peak")]
)
def test_saving(timeline: Timeline, tmp_path: Path, ending: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = timeline.save(tmp_path / f"a.{ending}")
    assert path.read_bytes().startswith(magic)


def test_what_cannot_be_saved_says_why(
    timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=r"a timeline is drawn as \.svg, \.png or \.txt"):
        timeline.save(tmp_path / "a.pdf")
    with pytest.raises(OptionError, match="No such file or directory"):
        timeline.save(tmp_path / "none" / "a.svg")
    real = builtins.__import__

    def without_matplotlib(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(OptionError, match=r"pip install 'gtrans\[plot\]', or write a \.svg"):
        timeline.save(tmp_path / "a.png")


def test_without_a_training_graph_there_is_nothing_to_draw() -> None:
    with pytest.raises(ModelError, match="there is no memory to draw"):
        timeline_of(Explanation(Pipeline(), []))


@pytest.mark.parametrize(
    ("values", "columns", "expected"),
    [
        ([], 3, [0, 0, 0]),
        ([5], 3, [5, 5, 5]),
        ([1, 9, 2, 3], 2, [9, 3]),
        ([1, 2], 4, [1, 1, 2, 2]),
        ([1, 7, 1], 2, [7, 7]),
    ],
)
def test_resampling_keeps_peaks(values: list[int], columns: int, expected: list[int]) -> None:
    assert resampled(values, columns) == expected


def test_parts_are_as_wide_as_their_operators(timeline: Timeline) -> None:
    spans = spread(timeline.parts, 100.0)
    assert spans[0][0] == 0.0
    assert spans[-1][1] == pytest.approx(100.0)
    widths = [b - a for a, b in spans]
    assert widths[0] / widths[1] == pytest.approx(timeline.parts[0].width / timeline.parts[1].width)


def test_a_graph_of_few_operators_has_a_column(timeline: Timeline) -> None:
    long, short = timeline.parts[0], Part("forward", 1, (9,), (timeline.peak_after * 2,))
    lines = replace(timeline, parts=(long, short, *[long] * 8)).text(width=12).splitlines()
    assert "█" in lines[0]  # the peak is in the short part
    assert replace(timeline, parts=(long, short, *[long] * 30)).text(width=12)
