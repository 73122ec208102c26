"""MODEL on the command line: from text to a model and its inputs; and plug-ins from files."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gtrans.cli.hub import build
from gtrans.core import Pass
from gtrans.errors import GTransError, ModelError, OptionError, did_you_mean
from gtrans.ir.half import Backend
from gtrans.registry import registered

_FORMS = "MODEL is package.module:function, file.py:function or hf:CONFIG"


@dataclass(frozen=True)
class Loaded:
    """A model and the inputs of one step."""

    text: str
    model: nn.Module
    inputs: tuple[Any, ...]
    keyword_inputs: dict[str, Any]


@contextmanager
def session(plugins: Sequence[str] | None = None) -> Iterator[None]:
    """Lets modules of the working directory be imported, and registers plug-in passes meanwhile.

    Raises:
        OptionError: a plug-in cannot be loaded or holds no pass.
        PassError: the name of a pass is taken.
    """
    with ExitStack() as stack:
        stack.enter_context(_importable(Path.cwd()))
        for text in plugins or ():
            stack.enter_context(registered(*plugin_classes(text)))
        yield


def load(text: str, *, seed: int = 0) -> Loaded:
    """Makes the model that a MODEL text names.

    Args:
        text: see the module's first line.
        seed: seed of the random state while the model is built.

    Raises:
        ModelError: there is no such model, or what the function returns is none.
    """
    torch.manual_seed(seed)
    if text.startswith("hf:"):
        model, keywords = build(text)
        return Loaded(text, model, (), keywords)
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name:
        raise ModelError(f"cannot read MODEL {text!r}: {_FORMS}")
    try:
        module = _module(source)
    except _LoadError as error:
        raise ModelError(f"MODEL {text!r}: {error}") from error.__cause__
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v) and n[0] != "_"]
        raise ModelError(
            f"MODEL {text!r}: {source} has no function {name!r}{did_you_mean(name, known)}"
        )
    return _checked(text, _called(text, function))


def plugin_classes(text: str) -> list[type[Pass[Any]] | type[Backend]]:
    """The classes of passes and backends that a module or file defines.

    Raises:
        OptionError: it cannot be loaded, or defines none.
    """
    try:
        module = _module(text)
    except _LoadError as error:
        raise OptionError(f"plug-in {text!r}: {error}") from error.__cause__
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and (issubclass(value, Pass) or _is_backend(value))
        and isinstance(getattr(value, "name", None), str)  # without a name it is a base class
    ]
    if not found:
        raise OptionError(
            f"plug-in {text!r} defines no pass; a pass is a class that derives from gtrans.Pass"
        )
    return found


def _is_backend(cls: type) -> bool:
    return all(callable(getattr(cls, m, None)) for m in ("unavailable", "prepare", "compile"))


class _LoadError(Exception):
    """A module could not be imported; the message says why."""


def _module(source: str) -> ModuleType:
    try:
        if source.endswith(".py"):
            return _of_file(Path(source))
        return importlib.import_module(source)
    except _LoadError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (source == error.name or source.startswith(error.name + ".")):
            raise _LoadError(
                f"no module named {error.name!r}; it is looked up in the working directory "
                f"({Path.cwd()}) and in the installed packages. For a file write FILE.py"
            ) from error
        raise _LoadError(f"importing {source} failed: {error}") from error
    except Exception as error:
        raise _LoadError(f"importing {source} failed: {_where(error)}") from error


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise _LoadError(f"there is no file {str(path)!r}{did_you_mean(path.name, near)}")
    name = f"gtrans_loaded_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise _LoadError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and Dynamo look modules up by name
    try:
        with _importable(path.resolve().parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _called(text: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except GTransError:
        raise
    except Exception as error:
        raise ModelError(f"MODEL {text!r}: the function failed: {_where(error)}") from error


def _checked(text: str, result: Any) -> Loaded:
    expected = "it must return (model, inputs), inputs a tensor, a tuple or a dict of keywords"
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        raise ModelError(f"MODEL {text!r}: the function returned {_described(result)}; {expected}")
    model, inputs = result
    if isinstance(inputs, torch.Tensor):
        return Loaded(text, model, (inputs,), {})
    if isinstance(inputs, (tuple, list)):
        return Loaded(text, model, tuple(inputs), {})
    if isinstance(inputs, dict) and all(isinstance(k, str) for k in inputs):
        return Loaded(text, model, (), inputs)
    raise ModelError(f"MODEL {text!r}: the inputs are {_described(inputs)}; {expected}")


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(v).__name__ for v in value)})"
    return f"a {type(value).__name__}"


def _where(error: Exception) -> str:
    """The error and the last line of the user's code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if not f.filename.startswith("<")]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    path = str(folder)
    if path in sys.path:
        yield
        return
    sys.path.insert(0, path)
    try:
        yield
    finally:
        if path in sys.path:
            sys.path.remove(path)
