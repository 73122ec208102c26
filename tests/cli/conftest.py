"""A tiny model file, and a way to run the command line in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gtrans.cli.main import app

MODEL = '''
import torch
from torch import nn


class Net(nn.Module):
    """Two layers with a ReLU between, which an addition keeps from being saved for a product."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 64)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return torch.relu(self.up(x)) + self.scale


def make():
    return Net(), torch.randn(128, 4)


def make_keywords():
    return Net(), {"x": torch.randn(128, 4)}


def make_tuple():
    return Net(), (torch.randn(128, 4),)


def make_gelu():
    return nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU()), torch.randn(3, 4)


def frozen():
    return Net().requires_grad_(False), torch.randn(128, 4)


def wrong_shape():
    return Net(), torch.randn(128, 5)


def model_only():
    return Net()


def no_inputs():
    return Net(), None


def fails():
    raise KeyError("weights")


NUMBER = 3
'''

Run = Callable[..., Result]


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`model.py` in a fresh working directory."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return "model.py"


@pytest.fixture
def wrong_passes() -> str:
    """The plug-in file with passes that are wrong on purpose."""
    return str(Path(__file__).parents[1] / "wrong_passes.py")


@pytest.fixture
def run() -> Run:
    """Runs the command line."""

    def run_cli(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result

    return run_cli


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Runs the command line with `--json` and reads what it prints."""

    def run_cli(*arguments: str, code: int = 0) -> Any:
        return json.loads(run(*arguments, "--json", code=code).stdout)

    return run_cli
