"""`gtrans passes` and `gtrans doctor`: what there is, and what this machine can do."""

import inspect
import platform
import re
from dataclasses import MISSING, fields
from importlib import import_module
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from gtrans import __version__
from gtrans.cli.console import CHECK_FAILED, console, examples, print_json, reporting
from gtrans.cli.options import JsonOption, PluginOption
from gtrans.errors import PassError

if TYPE_CHECKING:
    from gtrans.core import Pass

PASSES_EXAMPLES = examples(
    "gtrans passes", "gtrans passes relu-mask", "gtrans passes --json --plugin my_passes.py"
)
DOCTOR_EXAMPLES = examples("gtrans doctor")

OLDEST_TORCH = (2, 11)


def passes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A pass to describe in full.", show_default=False),
    ] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the passes, or describe one in full.

    A description has the rewrite, what it saves and costs, options, contract, law and source.
    """
    with reporting(as_json):
        from gtrans.cli.models import session
        from gtrans.registry import load_pass, pass_table

        with session(plugin):
            if name is not None:
                entry = described(load_pass(name))
                print_json(entry) if as_json else _print_one(entry)
                return
            entries = [_entry(known) for known in sorted(pass_table())]
            if as_json:
                print_json({"passes": entries})
            else:
                _print_all(entries)


def doctor(as_json: JsonOption = False) -> None:
    """Check what this machine offers.

    Looks for a supported torch, a compiler, CUDA and transformers. The exit code is 1 if something
    is missing without which nothing runs.
    """
    with reporting(as_json):
        rows = [_python(), _torch(), *_backends(), _cuda(), _transformers()]
        healthy = all(row["ok"] or not row["needed"] for row in rows)
        if as_json:
            print_json({"ok": healthy, "gtrans": __version__, "checks": rows})
        else:
            _print_checks(rows)
        if not healthy:
            raise typer.Exit(CHECK_FAILED)


def _entry(name: str) -> dict[str, Any]:
    """A pass of the list. One that cannot be loaded must not hide the others."""
    from gtrans.registry import load_pass

    try:
        return described(load_pass(name))
    except PassError as error:
        return {"name": name, "error": str(error)}


def described(cls: "type[Pass[Any]]") -> dict[str, Any]:
    """Everything known about a pass, as plain strings."""
    module = inspect.getmodule(cls)
    documentation = inspect.cleandoc((module.__doc__ if module else None) or cls.__doc__ or "")
    hints = get_type_hints(cls)
    about = _argument_docs(cls.__doc__ or "")
    options = [
        {
            "name": f.name,
            "type": type_text(hints[f.name]),
            "default": _default(f),
            "required": f.default is MISSING and f.default_factory is MISSING,
            "doc": about.get(f.name, ""),
        }
        for f in fields(cls)  # type: ignore[arg-type]  # every pass is a dataclass
    ]
    required = any(o["required"] for o in options)
    return {
        "name": cls.name,
        "summary": inspect.cleandoc(cls.__doc__ or "").partition("\n")[0],
        "knob": cls.knob.value,
        "knob_name": cls.knob.name.lower(),
        "law": cls.knob.law,
        "contract": "depends on its options" if required else str(cls().contract),
        "works_on": "joint graph" if cls.works_on.__name__ == "JointGraph" else "forward graph",
        "options": options,
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "documentation": documentation,
    }


def type_text(kind: Any) -> str:
    """A type as a person would write the choice: ``int``, ``cheap | none``, ``float or None``."""
    if get_origin(kind) is Literal:
        return " | ".join(str(a) for a in get_args(kind))
    if isinstance(kind, UnionType):
        return " or ".join("None" if k is type(None) else type_text(k) for k in get_args(kind))
    return getattr(kind, "__name__", str(kind))


def _default(field: Any) -> str | None:
    if field.default is not MISSING:
        return str(field.default)
    return str(field.default_factory()) if field.default_factory is not MISSING else None


_ARGUMENT = re.compile(r"^ {4}(?P<name>\w+): (?P<text>.*(?:\n {8,}.*)*)", re.MULTILINE)


def _argument_docs(docstring: str) -> dict[str, str]:
    """The `Args:` section of a Google-style docstring."""
    _, _, arguments = inspect.cleandoc(docstring).partition("Args:\n")
    return {m["name"]: " ".join(m["text"].split()) for m in _ARGUMENT.finditer(arguments)}


def _print_all(entries: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("pass", "knob", "contract", "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    for e in entries:
        if "error" in e:
            table.add_row(e["name"], "", "", e["error"])
            continue
        table.add_row(e["name"], f"{e['knob']} {e['knob_name']}", e["contract"], e["summary"])
    out = console()
    out.print(table)
    out.print("\nOne in full: gtrans passes NAME")


def _print_one(entry: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    out.print(f"{entry['name']}   ({entry['class']})\n", style="bold", soft_wrap=True)
    out.print(entry["documentation"] + "\n", soft_wrap=True)
    out.print(f"knob       {entry['knob']} {entry['knob_name']}, on the {entry['works_on']}")
    out.print(f"law        {entry['law']}")
    out.print(f"contract   {entry['contract']}")
    if not entry["options"]:
        out.print("options    none")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("option", "type", "default", ""):
        table.add_column(column)
    for o in entry["options"]:
        table.add_row(o["name"], o["type"], "required" if o["required"] else o["default"], o["doc"])
    out.print()
    out.print(table)


def _row(name: str, ok: bool, text: str, *, needed: bool = False) -> dict[str, Any]:
    return {"name": name, "ok": ok, "needed": needed, "text": text}


def _python() -> dict[str, Any]:
    return _row("python", True, platform.python_version(), needed=True)


def _torch() -> dict[str, Any]:
    from importlib import metadata

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return _row("torch", False, "not installed: pip install torch", needed=True)
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    oldest = ".".join(map(str, OLDEST_TORCH))
    if numbers < OLDEST_TORCH:
        return _row("torch", False, f"{version}, older than {oldest}: upgrade torch", needed=True)
    return _row("torch", True, f"{version} ({oldest} or newer is supported)", needed=True)


def _backends() -> list[dict[str, Any]]:
    from gtrans.registry import backend_table, load_backend

    rows = []
    for name in sorted(backend_table()):
        reason = load_backend(name).unavailable()
        text = "can run" if reason is None else f"{reason}; 'eager' is used instead"
        rows.append(_row(f"backend {name}", reason is None, text, needed=name == "eager"))
    return rows


def _cuda() -> dict[str, Any]:
    cuda = import_module("torch").cuda
    found = cuda.is_available()
    return _row("cuda", found, cuda.get_device_name(0) if found else "none; runs on the CPU")


def _transformers() -> dict[str, Any]:
    from importlib import metadata

    try:
        return _row("transformers", True, metadata.version("transformers"))
    except metadata.PackageNotFoundError:
        text = "not installed; needed for hf: models only: pip install 'gtrans[hf]'"
        return _row("transformers", False, text)


def _print_checks(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        mark = "ok" if row["ok"] else "MISSING" if row["needed"] else "-"
        table.add_row(row["name"], mark, row["text"])
    console().print(table)
