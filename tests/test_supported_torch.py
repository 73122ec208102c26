"""Old torch is refused in words; where versions differ, both ways are taken."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._functorch.partitioners import _extract_fwd_bwd_modules

import gtrans
from gtrans import capture
from gtrans.capture import require_supported_torch
from gtrans.errors import CaptureError
from gtrans.ir.joint import Input

PACKAGE = Path(str(gtrans.__file__)).parent
PAGE = Path(__file__).parents[1] / "docs" / "design" / "0003-torch-versions.md"
PRIVATE = ("torch._", "torch.compiler.config", "torch.fx.experimental")


@pytest.mark.parametrize("version", ["2.10.1+cu128", "2.9.0", "1.13.1"])
def test_old_torch_is_refused_before_anything_is_captured(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    message = f"needs torch 2.11 or newer, and this is {version.replace('+', '.')}: pip install"
    for use in (gtrans.optimize, lambda m: gtrans.explain(m, torch.ones(1, 2))):
        with pytest.raises(CaptureError, match=message):
            use(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.13.0+cpu", "2.16.0a0+git1234567", "2.15.0.dev20261101", "3.0.0"]
)
def test_newer_torch_is_not_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    require_supported_torch()


# ------------------------------------------------------------------------- where versions differ


@pytest.mark.parametrize("known", [True, False])
def test_compile_is_told_to_isolate_recompilations_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Torch 2.11 and 2.12 have no such parameter."""
    asked: list[dict[str, Any]] = []

    def older(model: Any, *, backend: Any, dynamic: Any, fullgraph: Any) -> Any:
        asked.append({})
        return model

    def newer(
        model: Any, *, backend: Any, dynamic: Any, fullgraph: Any, isolate_recompiles: bool = False
    ) -> Any:
        asked.append({"isolate_recompiles": isolate_recompiles})
        return model

    monkeypatch.setattr(torch, "compile", newer if known else older)
    model = gtrans.optimize(nn.Linear(2, 2), backend="eager")

    assert model(torch.ones(1, 2)).shape == (1, 2)
    assert asked == [{"isolate_recompiles": True} if known else {}]


def test_buffers_are_known_by_their_source_and_inputs_may_have_none() -> None:
    graph = fx.Graph()
    for number, name in enumerate(["L['self']._buffers['mean']", "L['x']"]):
        node = graph.placeholder(f"p{number}")
        argument = SimpleNamespace(source=SimpleNamespace(name=name))
        node.meta = {"example_value": torch.ones(1), "grapharg": argument}
    without = graph.placeholder("without")
    without.meta = {"example_value": torch.ones(1), "grapharg": SimpleNamespace(source=None)}
    graph.output(())

    assert capture._inputs_of(fx.GraphModule({}, graph)) == [
        Input("mean", "buffer"),
        Input("x", "input"),
        Input("without", "input"),
    ]


def test_the_split_passes_what_every_version_takes() -> None:
    parameters = inspect.signature(_extract_fwd_bwd_modules).parameters
    assert list(parameters)[:3] == ["joint_module", "saved_values", "saved_sym_nodes"]
    needed = {n for n, p in parameters.items() if p.default is p.empty}
    assert needed == {"joint_module", "saved_values", "saved_sym_nodes", "num_fwd_outputs"}


# ------------------------------------------------------------------------------------ the page


def is_private(name: str) -> bool:
    return name.startswith(PRIVATE) or name.rpartition(".")[2].startswith("_")


def private_names() -> set[str]:
    """What capture and the backends import from places that torch does not promise to keep."""
    files = [PACKAGE / "capture.py", *(PACKAGE / "backends").glob("*.py")]
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                continue
            found |= {n for n in names if n.startswith("torch.") and is_private(n)}
    return found


def test_the_page_lists_every_private_name_and_no_other() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `torch.")]
    assert {line.split("`")[1] for line in rows} == private_names()
