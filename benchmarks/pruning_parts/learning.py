"""Two things to learn while pruning, on real data, and how the benchmark `sparsify` learns them."""

import ast
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.zoo import minilm_folder

PACKAGES = ("asyncio", "email", "unittest", "multiprocessing", "http", "logging", "importlib")

Batch = tuple[dict[str, Any], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        name: as printed.
        build: a new model, ready to train.
        train: batches of keyword inputs and labels; steps go through them again and again.
        test: the same, not trained on.
        steps: optimizer steps.
        rate: learning rate of AdamW.
        served: a model of the size that people serve, untrained, and its inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Sequence[Batch]
    test: Sequence[Batch]
    steps: int
    rate: float
    served: Callable[[], tuple[nn.Module, dict[str, Any]]]

    def learn(
        self,
        model: nn.Module,
        seed: int,
        first: int = 0,
        last: int | None = None,
        ready: Callable[[torch.optim.Optimizer], None] = lambda _: None,
    ) -> None:
        """Trains from one step to another.

        Args:
            model: trained in place.
            seed: of the order of the batches.
            first: the first step; the learning rate is that of this step.
            last: the step to stop before.
            ready: called with the optimizer.
        """
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.rate, weight_decay=0.01)
        ready(optimizer)
        order = random.Random(seed)
        picks = [order.randrange(len(self.train)) for _ in range(self.steps)]
        for step in range(first, self.steps if last is None else last):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, 2.0 * (1 - step / self.steps))
            inputs, labels = self.train[picks[step]]
            F.cross_entropy(model(**inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The share of the test labels that a model names."""
        model.eval()
        right = [(model(**inputs).argmax(-1) == labels) for inputs, labels in self.test]
        return float(torch.cat(right).float().mean())


# ---------------------------------------------------------------------------- digits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.short = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, inner, size, size]. Returns: [batch, outer, size/stride, ...]."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class ResNet18(nn.Module):
    """ResNet-18 for small grey images: four stages of two blocks, no pooling before them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                ResidualBlock(sizes[i] if first else sizes[i + 1], sizes[i + 1], stride)
                for i in range(4)
                for first, stride in ((True, 1 if i == 0 else 2), (False, 1))
            )
        )
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 1, size, size]. Returns: [batch, 10]."""
        result: torch.Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return result


def digits(quick: bool, device: str) -> Task:
    """The 1,797 scanned digits of scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].to(device), y[order].to(device)
    made = [({"x": a}, b) for a, b in zip(x.split(128), y.split(128), strict=True)]

    def served() -> tuple[nn.Module, dict[str, Any]]:
        return ResNet18(64).to(device), {"x": torch.randn(8, 1, 32, 32, device=device)}

    steps = 40 if quick else 120
    return Task(
        "digits", lambda: ResNet18(16).to(device), made[:11], made[11:], steps, 3e-3, served
    )


# ---------------------------------------------------------------------------- documentation


class Classifier(nn.Module):
    """A transformer, the mean of its token vectors, and a linear layer."""

    def __init__(self, transformer: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.transformer, self.head = transformer, nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Args: token numbers and mask, both [batch, length]. Returns: [batch, classes]."""
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        weight = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        mean = (output.last_hidden_state * weight).sum(1) / weight.sum(1)
        result: torch.Tensor = self.head(mean)
        return result


def docstrings(quick: bool, device: str) -> Task:
    """Documentation strings of Python's library, and the package that each is from."""
    folder = minilm_folder()
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [(text, i) for i, name in enumerate(PACKAGES) for text in _docs_of(name)]
    random.Random(0).shuffle(texts)
    made: list[Batch] = []
    for i in range(0, min(len(texts), 1280) - 15, 16):
        words, labels = zip(*texts[i : i + 16], strict=True)
        encoded = tokenizer(
            list(words), padding="max_length", truncation=True, max_length=24, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask")
        made.append(({n: encoded[n].to(device) for n in names}, torch.tensor(labels).to(device)))
    held_out = len(made) // 5

    def build() -> nn.Module:
        transformer = AutoModel.from_pretrained(
            folder,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        transformer.embeddings.requires_grad_(False)  # half of it, and few of its rows are read
        return Classifier(transformer, 384, len(PACKAGES)).to(device)

    def served() -> tuple[nn.Module, dict[str, Any]]:
        tokens = torch.randint(1000, 20000, (8, 96), device=device)
        return build(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    steps = 8 if quick else 80
    test = made[: 2 if quick else held_out]
    return Task("docs", build, made[held_out:], test, steps, 2e-4, served)


def _docs_of(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    found: list[str] = []
    for path in sorted(p for f in folders or () for p in Path(f).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 8 and "test" not in path.parts:
                    found.append(" ".join(text.split()[:40]).replace(package, "this"))
    return found
