"""The options that commands share, declared once, and what a MODEL command was asked to do.

A command that takes a MODEL is written as a function of a `Request` and its own options; `on_model`
gives it the shared ones. Nothing here imports torch, so that `gtrans --help` answers at once.
"""

import inspect
import shlex
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtrans.cli.console import reporting

if TYPE_CHECKING:
    from gtrans.cli.models import Loaded
    from gtrans.explanation import Explanation
    from gtrans.pipeline import Pipeline

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:function or file.py:function returning (model, inputs), or "
        "hf:CONFIG, such as 'hf:gpt2?n_layer=2' or hf:path/to/config.json.",
        show_default=False,
    ),
]
PassesOption = Annotated[
    str,
    typer.Option("--passes", "-p", metavar="TEXT", help="Pipeline, as 'relu-mask,plan{price=1}'."),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="NAME", help="Leave a pass out; may be given several times."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Budget of the step's peak: '6GiB', or '40%' of the plain peak.",
        show_default=False,
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE|FILE",
        help="Register the passes of a module or file for this run; may be given several times.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed for building the model and for its step.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@dataclass(frozen=True)
class Request:
    """What every command on a MODEL is asked: the model, the pipeline, and how to answer."""

    model: str
    passes: str = "default"
    skip: list[str] | None = None
    memory: str | None = None
    plugin: list[str] | None = None
    seed: int = 0
    as_json: bool = False

    @cached_property
    def pipeline(self) -> "Pipeline":
        """The passes to run, under the budget if there is one.

        Raises:
            OptionError: a pass or option is unknown, or the budget cannot be read.
        """
        from gtrans.api import planned

        return planned(self.passes, self.skip or (), self.memory)

    @cached_property
    def loaded(self) -> "Loaded":
        """The model and its inputs.

        Raises:
            ModelError: there is no such model, or nothing of it can be trained.
        """
        from gtrans.api import require_trainable
        from gtrans.cli.models import load

        loaded = load(self.model, seed=self.seed)
        require_trainable(loaded.model)
        return loaded

    def explained(self) -> "tuple[Explanation, float]":
        """What the passes would do, and the seconds it took without building the model."""
        from gtrans.api import explained

        pipeline, loaded = self.pipeline, self.loaded
        start = time.perf_counter()
        found = explained(loaded.model, loaded.inputs, loaded.keyword_inputs, pipeline)
        return found, time.perf_counter() - start

    @property
    def options(self) -> str:
        """The options that another command needs to do the same, with a space in front of each."""
        words: list[str] = []
        for text in self.plugin or ():
            words += ["--plugin", text]
        if self.passes != "default":
            words += ["--passes", self.passes]
        for name in self.skip or ():
            words += ["--skip", name]
        if self.memory is not None:
            words += ["--memory", self.memory]
        if self.seed:
            words += ["--seed", str(self.seed)]
        return "".join(" " + shlex.quote(word) for word in words)

    def command(self, name: str) -> str:
        """Another command on the same model with the same options, to be copied."""
        return f"gtrans {name} {shlex.quote(self.model)}{self.options}"


_KINDS = {
    "model": ModelArgument,
    "passes": PassesOption,
    "skip": SkipOption,
    "memory": MemoryOption,
    "plugin": PluginOption,
    "seed": SeedOption,
    "as_json": JsonOption,
}
_SHARED = [
    inspect.Parameter(
        f.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if f.default is MISSING else f.default,
        annotation=_KINDS[f.name],
    )
    for f in fields(Request)
]


def on_model(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a `Request`, which it takes as its first argument.

    The command runs with plug-ins registered and errors turned into messages and exit codes.
    """
    own = list(inspect.signature(command).parameters.values())[1:]

    def run(**given: Any) -> None:
        request = Request(**{p.name: given.pop(p.name) for p in _SHARED})
        with reporting(request.as_json):
            from gtrans.cli.models import session

            with session(request.plugin):
                command(request, **given)

    model, *shared = _SHARED
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (model, *own, *shared)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, __name__
    return run
