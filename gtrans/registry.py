"""Names of passes and backends, looked up in static tables and in installed plug-ins.

A plug-in distribution registers passes by an entry point of the group `gtrans.passes`
(`my-pass = "my_package.my_pass:MyPass"`). Two owners of one name are an error that names both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from gtrans.backends import BACKENDS
from gtrans.core import Pass
from gtrans.errors import OptionError, PassError, did_you_mean
from gtrans.ir.half import Configurable
from gtrans.passes import PASSES

_BUILT_IN_PLAN = {"plan": "gtrans.plan.planner:Plan"}

_for_now: dict[str, type[Pass[Any]]] = {}


def pass_table() -> dict[str, str]:
    """All known passes: name to "module:Class".

    Raises:
        PassError: two distributions register the same name.
    """
    table = _merged({**PASSES, **_BUILT_IN_PLAN}, "gtrans.passes")
    return table | {name: _reference(cls) for name, cls in _for_now.items()}


@contextmanager
def registered(*classes: type[Pass[Any]]) -> Iterator[None]:
    """Makes passes known by their names while the block runs, without an installed plug-in.

    Raises:
        PassError: a name is taken, by another of them or by a pass that is known already.
    """
    added: list[str] = []
    try:
        for cls in classes:
            owner = pass_table().get(cls.name)
            if owner is not None:
                raise PassError(
                    f"two owners of pass {cls.name!r}: {owner} and {_reference(cls)}; rename one"
                )
            _for_now[cls.name] = cls
            added.append(cls.name)
        yield
    finally:
        for name in added:
            del _for_now[name]


def backend_table() -> dict[str, str]:
    """All known backends: name to "module:Class".

    Raises:
        PassError: two distributions register the same name.
    """
    return _merged(dict(BACKENDS), "gtrans.backends")


def load_pass(name: str) -> type[Pass[Any]]:
    """The class of a pass.

    Raises:
        OptionError: no pass has this name; near names are offered.
        PassError: it is registered but cannot be loaded, or is no pass.
    """
    table = pass_table()
    if name not in table:
        raise OptionError(f"unknown pass {name!r}{did_you_mean(name, table)}")
    found = _for_now.get(name) or _load(table[name])
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PassError(f"{table[name]}, registered as pass {name!r}, is not a gtrans.Pass")
    return found


def load_backend(
    name: str, *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """An instance of a backend.

    Args:
        name: its name in `backend_table`.
        mode: one of its modes; "default" and None are the same.
        options: options of its own.

    Raises:
        OptionError: no backend has this name, or it has no such mode or option; near names are
            offered.
        PassError: it is registered but cannot be loaded.
    """
    table = backend_table()
    if name not in table:
        raise OptionError(f"unknown backend {name!r}{did_you_mean(name, table)}")
    backend = _load(table[name])()
    if isinstance(backend, Configurable):
        return backend.configured(mode, options)
    if options or mode not in (None, "default"):
        asked = f"options {sorted(options)}" if options else f"mode {mode!r}"
        raise OptionError(
            f"unknown {asked}: backend {name!r} has neither modes nor options of its own; leave "
            "them out, or use backend='inductor'"
        )
    return backend


def _merged(table: dict[str, str], group: str) -> dict[str, str]:
    for point in entry_points(group=group):
        if table.get(point.name, point.value) != point.value:
            raise PassError(
                f"two owners of {point.name!r} in {group}: {table[point.name]} and {point.value}; "
                "uninstall one or rename its entry point"
            )
        table[point.name] = point.value
    return table


def _reference(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PassError(f"{reference} is registered but cannot be loaded: {error}") from error
