"""Who may import whom, checked on the syntax trees of every file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

import gtrans

PACKAGE = Path(str(gtrans.__file__)).parent

# A module may import modules of a lower number, and of its own where that is not forbidden below.
LAYERS = {
    "gtrans.errors": 0,
    "gtrans.listing": 1,
    "gtrans.memory": 1,
    "gtrans.ir": 1,
    "gtrans.contract": 2,
    "gtrans.core": 2,
    "gtrans.analysis": 2,
    "gtrans.rewrite": 2,
    "gtrans.runtime": 2,
    "gtrans.passes": 3,
    "gtrans.backends": 3,
    "gtrans.plan": 3,
    "gtrans.registry": 4,
    "gtrans.pipeline": 4,
}
TOP = 5
PRIVATE = ("torch._dynamo", "torch._functorch", "torch._inductor", "torch._guards")
MAY_IMPORT_PRIVATE = ("gtrans.capture", "gtrans.backends")


def modules() -> dict[str, Path]:
    found = {}
    for folder in (PACKAGE, PACKAGE / "passes", PACKAGE / "backends"):
        for path in folder.rglob("*.py"):
            name = ".".join(("gtrans", *path.relative_to(PACKAGE).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Imported modules of a file, and whether only type checkers see the import."""
    tree = ast.parse(path.read_text())
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in hidden
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module), node in hidden


def layer(name: str) -> int:
    parts = name.split(".")
    return LAYERS.get(".".join(parts[:2]), TOP)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    for target, hidden in imports(MODULES[name]):
        if target.split(".")[0] == "gtrans" and target != "gtrans" and not hidden:
            assert layer(target) <= layer(name), f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("gtrans.passes.")))
def test_no_pass_imports_another_or_a_backend(name: str) -> None:
    for target, _ in imports(MODULES[name]):
        assert not target.startswith(("gtrans.passes", "gtrans.backends")), f"{name}: {target}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("gtrans.backends.")))
def test_no_backend_imports_a_pass(name: str) -> None:
    for target, _ in imports(MODULES[name]):
        assert not target.startswith("gtrans.passes"), f"{name}: {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_torch_stays_in_two_places(name: str) -> None:
    if not name.startswith(MAY_IMPORT_PRIVATE):
        for target, _ in imports(MODULES[name]):
            assert not target.startswith(PRIVATE), f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_kit_imports_test_tools(name: str) -> None:
    if not name.startswith("gtrans.testing"):
        for target, _ in imports(MODULES[name]):
            assert target.split(".")[0] not in ("hypothesis", "pytest"), f"{name}: {target}"
            assert not target.startswith("gtrans.testing"), f"{name}: {target}"


def test_there_are_no_cycles() -> None:
    graph = networkx.DiGraph(
        (name, target)
        for name, path in MODULES.items()
        for target, hidden in imports(path)
        if target in MODULES and not hidden and target != name
    )
    cycles = [c for c in networkx.strongly_connected_components(graph) if len(c) > 1]
    assert cycles == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_stay_small(name: str) -> None:
    path = MODULES[name]
    assert path.stem not in ("utils", "helpers", "misc", "common")
    lines = path.read_text().splitlines()
    one_pass = name.startswith("gtrans.passes.") and path.stem != "__init__"
    assert len(lines) <= (250 if one_pass else 600)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            doc = ast.get_docstring(node, clean=False)
            length -= len(doc.splitlines()) if doc else 0
            assert length <= 60, f"{name}.{node.name} has {length} lines"


def test_the_folders_of_passes_and_backends_have_one_name_only() -> None:
    for folder in ("passes", "backends"):
        source = (PACKAGE / folder / "__init__.py").read_text()
        assert f'if __name__ != "gtrans.{folder}"' in source
