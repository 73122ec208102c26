"""The report: what is on it, and that a browser can use it without network, by keyboard."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gtrans.errors import OptionError
from gtrans.pipeline import Pipeline
from gtrans.seeing.change import hunks
from gtrans.seeing.page import Page, page_of
from tests.wrong_passes import Scaled

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome is installed (apt install chromium)"
)


class Tiny(nn.Module):
    """Three equal blocks, a dropout, an unused parameter and a title that needs escaping."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return x.square().mean()


def made(pipeline: Pipeline | str, **options: Any) -> Page:
    torch.manual_seed(0)
    inputs = (torch.randn(96, 16),)
    return page_of(Tiny(), inputs, {}, Pipeline.parse(pipeline), title="<Tiny> & co", **options)


@pytest.fixture(scope="module")
def page() -> Page:
    return made("relu-mask,bit-masks,plan", command="gtrans report model.py:make")


@pytest.fixture(scope="module")
def html(page: Page) -> str:
    return page.html()


def test_everything_is_on_it(page: Page, html: str) -> None:
    assert "&lt;Tiny&gt; &amp; co" in html
    assert "<Tiny>" not in html
    for part in ("passes", "memory", "gradients", "saved", "plan"):
        assert f'<section id="{part}"' in html
        assert f'<a href="#{part}">' in html
    assert "blocks.*.0.weight" in html
    assert "no larger than what it would be computed from" in html
    assert "found nothing to rewrite" in html
    assert "gtrans report model.py:make" in html
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert [v.text for v in page.passes] == ["relu-mask", "bit-masks", "plan"]


def test_it_needs_no_network(html: str) -> None:
    assert "default-src 'none'" in html
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.findall(r"@import|url\(|fetch\(|XMLHttpRequest", html)


def test_equal_changes_of_equal_layers_are_one(page: Page) -> None:
    plan = page.passes[-1]
    assert any(hunk.count >= 2 for _, hunk in plan.changes)
    lines = [line for _, hunk in plan.changes for line in hunk.lines]
    assert {sign for sign, _ in lines} == {"+", "-", " "} or {"+"} <= {s for s, _ in lines}


def test_the_chosen_plan_is_compared_with_others(page: Page) -> None:
    [plans] = page.plans
    assert plans.chosen.peak == page.explanation.peak
    assert len(plans.others) >= 2
    fastest = [p.seconds for p in plans.others]
    assert fastest == sorted(fastest)
    peaks = [p.peak for p in plans.others]
    assert peaks == sorted(peaks, reverse=True)


def test_gradients_are_folded_with_the_worst_first(page: Page) -> None:
    groups = page.gradients()
    assert {g.names for g in groups} == {3}
    assert len(groups) == 4
    assert [g.worst.relative for g in groups] == sorted(
        (g.worst.relative for g in groups), reverse=True
    )


@pytest.mark.parametrize("float64", [False, True])
def test_float64_is_compared_on_request(float64: bool) -> None:
    verification = made("plan", float64=float64).verification
    assert verification is not None
    found = {c.dtype for c in verification.comparisons}
    assert found == ({torch.float32, torch.float64} if float64 else {torch.float32})


def test_a_wrong_gradient_is_seen() -> None:
    page = made(Pipeline((Scaled(),)))
    html = page.html()

    assert page.verification is not None
    assert not page.verification.ok
    assert '<b class="bad">differ</b>' in html
    assert 'class="bar bad"' in html


def test_without_a_check_there_is_no_gradient_table(tmp_path: Path) -> None:
    told: list[str] = []
    page = made("plan", check=False, told=told.append)
    path = page.save(tmp_path / "report.html")

    text = path.read_text()
    assert "not compared" in text
    assert '<section id="gradients"' not in text
    assert "comparing gradients with the untouched model" not in told
    with pytest.raises(OptionError, match=r"cannot write .*: No such file or directory"):
        page.save(tmp_path / "none" / "report.html")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["a", "b"], ["a", "b"], []),
        (["a_1", *"xxxx", "a_2"], ["b_1", *"xxxx", "b_2"], [("- a_1", "+ b_1", "  x")]),
    ],
)
def test_hunks(before: list[str], after: list[str], expected: list[tuple[str, ...]]) -> None:
    found = hunks(before, after)
    shown = [tuple(f"{sign} {text}" for sign, text in h.lines) for h in found]
    assert shown[: len(expected)] == expected
    assert bool(found) is bool(expected)


@pytest.mark.parametrize(
    ("second", "count"),
    [
        ("< mm_9 = aten.mm.default(t_2, add[0])  # f32[4]  <- plan", 2),
        ("< mm_9 = aten.mm.default(t_2, add[1])  # f32[4]  <- plan", 1),  # another constant
        ("< mm_9 = aten.bmm.default(t_2, add[0])  # f32[4]  <- plan", 1),  # another operator
        ("< mm_9 = aten.mm.default(t_2, add[0])  # f32[8]  <- plan", 1),  # another shape
    ],
)
def test_changes_are_equal_but_for_names(second: str, count: int) -> None:
    first = "< x = aten.mm.default(y_1, mul_3[0])  # f32[4]  <- plan"
    around = [f"| {letter}" for letter in "abcdef"]
    found = hunks(around, [around[0], first, *around[1:5], second, around[5]], context=0)
    assert [h.count for h in found] == ([2] if count == 2 else [1, 1])


# ---------------------------------------------------------------------------- in a browser

ACTIONS = Path(__file__).with_name("page_actions.js").read_text()


@pytest.fixture
def opened(html: str, tmp_path: Path) -> Callable[..., str]:
    """Opens the page in a headless browser, acts on it, and returns what became of it."""

    def open_page(*flags: str, actions: str = "") -> str:
        file = tmp_path / "report.html"
        file.write_text(
            html.replace("</body>", f"<script>{actions}</script></body>"), encoding="utf-8"
        )
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/user",
        ]
        command = [str(BROWSER), *options, *flags, "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    return open_page


@needs_browser
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_it_can_be_used_by_keyboard_on_a_desk_and_on_a_phone(
    opened: Callable[..., str], size: str
) -> None:
    found = re.search(r'data-seen="([^"]*)"', opened(f"--window-size={size}", actions=ACTIONS))
    assert found is not None
    assert found[1].split(";") == [
        "panels 1",
        "open 3. plan",
        "home 0 true 1",
        "right 1",
        "end true",
        "stops 1",
        "memory forward of graph 0 | backward of graph 0",
        "filter search",
        "rows 1 of 4 rows",
        "fold 0 true",
        "theme true",
        "page true",  # nothing makes the page itself scroll sideways
    ]


@needs_browser
def test_it_is_ready_at_once(opened: Callable[..., str]) -> None:
    ready = re.search(r'data-ready-ms="(\d+)"', opened())
    assert ready is not None
    assert int(ready[1]) < 1000
