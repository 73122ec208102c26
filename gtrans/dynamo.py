"""The backend behind `torch.compile(model, backend="gtrans")`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from gtrans.capture import Compiler
from gtrans.debugging.crash import write_repro
from gtrans.debugging.look import Look, to_stderr
from gtrans.pipeline import Gate, Observer, Pipeline


@dataclass
class _Watch:
    """What environment variables ask for, with the numbers of graphs and rewrites so far.

    Dynamo hands over one graph after another and does not say which model it is of, so they are
    numbered in the order in which this process compiles them.
    """

    gate: Gate
    observers: Sequence[Observer]
    graphs: int = 0


_watches: dict[tuple[Look, str], _Watch] = {}


def _watch(look: Look, pipeline: Pipeline) -> _Watch:
    key = (look, str(pipeline))
    if key not in _watches:
        observers = look.observers(pipeline, to_stderr) if look.wanted else ()
        _watches[key] = _Watch(look.gate(), observers)
    return _watches[key]


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles one graph that Dynamo captured.

    `GTRANS_PRINT_CHANGED` and its relatives act as under `gtrans.optimize`, counting over all
    graphs of the process.

    Args:
        module: what Dynamo captured.
        example_inputs: its inputs.
        mode: a mode of the backend that lowers the halves.
        options: `passes` (pipeline text) and `backend`, as for `gtrans.optimize`; all others are
            that backend's own.

    Raises:
        OptionError: a pass, backend, mode or option is unknown, or a variable cannot be read.
    """
    chosen = dict(options or {})
    passes, lowering = chosen.pop("passes", "default"), chosen.pop("backend", "inductor")
    look = Look.from_environment()
    pipeline = look.pipeline(Pipeline.parse(passes))
    watch = _watch(look, pipeline)
    compiler = Compiler(
        pipeline,
        lowering,
        gate=watch.gate,
        observers=watch.observers,
        mode=mode,
        options=chosen or None,
        on_failure=write_repro,
        first_index=watch.graphs,
    )
    watch.graphs += 1
    return compiler(module, example_inputs)
