"""Names of passes and backends, looked up in static tables and in installed plug-ins.

A plug-in distribution registers passes by an entry point of the group `gtrans.passes`
(`my-pass = "my_package.my_pass:MyPass"`). Two owners of one name are an error that names both.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from gtrans.backends import BACKENDS
from gtrans.core import Pass
from gtrans.errors import OptionError, PassError, did_you_mean
from gtrans.ir.half import Backend, Configurable
from gtrans.passes import PASSES

T = TypeVar("T")

_BUILT_IN_PLAN = {"plan": "gtrans.plan.planner:Plan"}

_for_now: dict[str, type[Pass[Any]]] = {}
_backends_for_now: dict[str, type[Backend]] = {}


def pass_table() -> dict[str, str]:
    """All known passes: name to "module:Class".

    Raises:
        PassError: two distributions register the same name.
    """
    table = _merged({**PASSES, **_BUILT_IN_PLAN}, "gtrans.passes")
    return table | {name: _reference(cls) for name, cls in _for_now.items()}


def is_installed(cls: type[Pass[Any]] | type[Backend]) -> bool:
    """Whether every process finds this pass or backend by its name, not only this one."""
    if issubclass(cls, Pass):
        table = _merged({**PASSES, **_BUILT_IN_PLAN}, "gtrans.passes")
    else:
        table = _merged(dict(BACKENDS), "gtrans.backends")
    return table.get(cls.name) == _reference(cls)


@contextmanager
def registered(*classes: type[Pass[Any]] | type[Backend]) -> Iterator[None]:
    """Makes passes and backends known by their names while the block runs, without a plug-in.

    Raises:
        PassError: a name is taken, by another of them or by one that is known already.
    """
    with ExitStack() as stack:
        for cls in classes:
            if issubclass(cls, Pass):
                stack.enter_context(_known("pass", cls.name, cls, pass_table(), _for_now))
            else:
                table = backend_table()
                stack.enter_context(_known("backend", cls.name, cls, table, _backends_for_now))
        yield


@contextmanager
def _known(
    kind: str, name: str, cls: type[T], table: Mapping[str, str], added: dict[str, type[T]]
) -> Iterator[None]:
    if name in table:
        raise PassError(
            f"two owners of {kind} {name!r}: {table[name]} and {_reference(cls)}; rename one"
        )
    added[name] = cls
    try:
        yield
    finally:
        del added[name]


def backend_table() -> dict[str, str]:
    """All known backends: name to "module:Class".

    Raises:
        PassError: two distributions register the same name.
    """
    table = _merged(dict(BACKENDS), "gtrans.backends")
    return table | {name: _reference(cls) for name, cls in _backends_for_now.items()}


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
    backend: Any = (_backends_for_now.get(name) or _load(table[name]))()
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
