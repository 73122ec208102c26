"""The wheel holds the whole package, importing it is quick, and the README runs."""

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENDINGS = (".py", ".jinja", ".css", ".js")
REAL = {"passes": "gtrans/passes", "backends": "gtrans/backends"}  # folder -> where it installs

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the source tree"
)


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def files_on_disk() -> set[str]:
    """What an installed package should hold; the two links are read through the real folders."""
    found = {
        str(p.relative_to(ROOT))
        for ending in ENDINGS
        for p in (ROOT / "gtrans").rglob(f"*{ending}")
        if p.relative_to(ROOT).parts[1] not in REAL
    }
    for folder, target in REAL.items():
        found |= {f"{target}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")}
    return found | {"gtrans/py.typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Builds from a copy, so that no build folder of earlier days gets into the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("gtrans", *REAL):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    built = run("-m", "pip", "wheel", *options, str(source))
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("gtrans-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_once(wheel: zipfile.ZipFile) -> None:
    held = [n for n in wheel.namelist() if ".dist-info/" not in n]
    assert len(held) == len(set(held))
    assert set(held) == files_on_disk()
    assert {"gtrans/passes/residual/relu_mask.py", "gtrans/backends/inductor.py"} <= set(held)


def test_every_folder_of_the_package_is_importable(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    folders = {str(Path(n).parent) for n in held if n.endswith(".py")}
    assert {f"{folder}/__init__.py" for folder in folders} <= held


def test_wheel_declares_the_command_and_the_backend(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    declared = ConfigParser()
    declared.read_string(wheel.read(name).decode())
    assert declared["console_scripts"]["gtrans"] == "gtrans.cli.main:main"
    assert declared["torch_dynamo_backends"]["gtrans"] == "gtrans.dynamo:backend"


@pytest.mark.parametrize("group", ["console_scripts", "torch_dynamo_backends"])
def test_what_the_installed_package_declares_exists(group: str) -> None:
    (point,) = entry_points(group=group, name="gtrans")
    assert callable(point.load())


@pytest.mark.parametrize("folder", REAL)
def test_a_folder_is_not_imported_under_its_bare_name(folder: str) -> None:
    result = run("-c", f"import {folder}")
    assert result.returncode == 1
    assert f"ImportError: import 'gtrans.{folder}', not '{folder}'" in result.stderr


@pytest.mark.parametrize("folder", REAL)
def test_the_links_are_committed_as_links(folder: str) -> None:
    link = ROOT / "gtrans" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


def test_import_costs_little_more_than_torch() -> None:
    code = (
        "import torch, time; start = time.process_time(); import gtrans; "
        "print(time.process_time() - start)"
    )
    best_s = min(float(run("-c", code).stdout) for _ in range(2))
    assert best_s < 0.150


def test_help_needs_no_torch() -> None:
    code = "import sys, gtrans; print('torch' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.inductor
def test_readme_code_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    result = run(str(script), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
