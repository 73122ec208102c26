"""One name, one file, one class."""

import re
from importlib import metadata
from pathlib import Path

import pytest

import gtrans.passes
from gtrans.core import Knob
from gtrans.errors import OptionError, PassError
from gtrans.ir.half import Backend
from gtrans.passes import PASSES
from gtrans.registry import backend_table, load_backend, load_pass, pass_table

FOLDERS = {
    "residual": Knob.RESIDUAL,
    "rule": Knob.RULE,
    "wire": Knob.WIRE,
    "schedule": Knob.SCHEDULE,
    "operator": Knob.OPERATOR,
    "structure": Knob.PARAMETERS,
}
ROOT = Path(str(gtrans.passes.__file__)).resolve().parent


def files() -> set[str]:
    # `gtrans.prune` is a function of the package: it plans, and takes its time over training.
    return {
        f"gtrans.passes.{p.parent.name}.{p.stem}"
        for p in ROOT.glob("*/*.py")
        if p.stem != "__init__" and p.stem != "prune"
    }


def test_every_pass_file_is_registered_and_every_entry_has_a_file() -> None:
    assert {reference.partition(":")[0] for reference in PASSES.values()} == files()


@pytest.mark.parametrize("name", sorted(PASSES))
def test_name_file_class_and_knob_agree(name: str) -> None:
    module, _, cls = PASSES[name].partition(":")
    assert module.rsplit(".", 1)[1] == name.replace("-", "_")
    assert cls.lower() == name.replace("-", "")  # GuidedReLU keeps its capitals
    loaded = load_pass(name)
    assert loaded.name == name
    assert loaded.knob is FOLDERS[module.split(".")[2]]


@pytest.mark.parametrize("name", sorted(pass_table()))
def test_every_pass_documents_itself(name: str) -> None:
    loaded = load_pass(name)
    module = __import__(loaded.__module__, fromlist=["x"])
    saves = ["Saves:"] if loaded.knob is Knob.RESIDUAL else []
    for heading in (*saves, "Contract:", "Source:"):
        assert heading in (module.__doc__ or ""), f"{name} lacks {heading}"
    assert re.match(r"[A-Z].*\.\n", (module.__doc__ or "").lstrip())


def test_unknown_names_offer_near_ones() -> None:
    with pytest.raises(OptionError, match="unknown pass 'relu-msk'; did you mean 'relu-mask'"):
        load_pass("relu-msk")
    with pytest.raises(OptionError, match="unknown backend 'inductr'; did you mean 'inductor'"):
        load_backend("inductr")


@pytest.mark.parametrize("name", sorted(backend_table()))
def test_every_backend_loads(name: str) -> None:
    backend: Backend = load_backend(name)
    assert backend.name == name
    assert backend.unavailable() is None or isinstance(backend.unavailable(), str)


def plug_in(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Pretends that an installed distribution registers a pass."""
    point = metadata.EntryPoint(name, value, "gtrans.passes")
    monkeypatch.setattr("gtrans.registry.entry_points", lambda group: [point])


def test_a_plug_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "scaled", "tests.wrong_passes:Scaled")
    assert load_pass("scaled").name == "scaled"


def test_two_owners_of_a_name_are_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "relu-mask", "tests.wrong_passes:Scaled")
    with pytest.raises(PassError, match=r"two owners of 'relu-mask'.*ReluMask and tests.wrong"):
        pass_table()


def test_something_that_is_no_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "nonsense", "pathlib:Path")
    with pytest.raises(PassError, match=r"registered as pass 'nonsense', is not a gtrans\.Pass"):
        load_pass("nonsense")
