"""`gtrans run`, `gtrans reduce`, `gtrans repro`: look at passes, and make their failures small."""

import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from gtrans.cli.checks import BackendOption, LimitOption, OnlyOption
from gtrans.cli.console import (
    CHECK_FAILED,
    console,
    examples,
    print_json,
    progress_shown,
    remark,
    reporting,
)
from gtrans.cli.options import JsonOption, Request, on_model
from gtrans.errors import GTransError, OptionError

if TYPE_CHECKING:
    from gtrans.debugging.case import Case
    from gtrans.debugging.look import Look
    from gtrans.debugging.reduce import Reduction
    from gtrans.pipeline import Pipeline, Step

RUN_EXAMPLES = examples(
    "gtrans run model.py:make --print-changed=diff",
    "gtrans run model.py:make --verify-each=grads --time-passes --stats",
    "gtrans run model.py:make --counter relu-mask=skip:1,count:1 --dump-dir passes",
)
REDUCE_EXAMPLES = examples(
    "gtrans reduce model.py:make --plugin my_passes.py --passes my-pass,plan -o small.py",
    "gtrans reduce case.py -o small.py --json",
)
REPRO_EXAMPLES = examples("gtrans repro small.py", "gtrans repro small.py --json")

_BARE = {"--print-changed": "full", "--verify-each": "structure"}


class RunCommand(TyperCommand):
    """Lets some options go without a value: `--print-changed` is `--print-changed=full`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Writes out what a bare option means."""
        return super().parse_args(ctx, [f"{a}={_BARE[a]}" if a in _BARE else a for a in args])


PrintChangedOption = Annotated[
    str,
    typer.Option(
        "--print-changed",
        metavar="[=full|diff|quiet]",
        help="After a pass that changed something print the graph, or the difference.",
        show_default=False,
    ),
]
PrintAfterAllOption = Annotated[
    bool, typer.Option("--print-after-all", help="Print the graph after every pass.")
]
VerifyEachOption = Annotated[
    str,
    typer.Option(
        "--verify-each",
        metavar="[=structure|shapes|grads]",
        help="Check the graph after every pass, or that it still computes the same.",
        show_default=False,
    ),
]
TimePassesOption = Annotated[
    bool, typer.Option("--time-passes", help="Add the time that each pass took.")
]
StatsOption = Annotated[
    bool, typer.Option("--stats", help="List each rewrite with its source line.")
]
StopAfterOption = Annotated[
    str, typer.Option("--stop-after", metavar="PASS", help="Leave out the passes after it.")
]
DisableOption = Annotated[
    list[str] | None,
    typer.Option("--disable", metavar="PASS", help="Leave a pass out, as --skip does."),
]
CounterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--counter",
        metavar="PASS=skip:N,count:M",
        help="Of one pass, perform only M rewrites after the first N.",
    ),
]
DumpDirOption = Annotated[
    Path | None,
    typer.Option("--dump-dir", metavar="DIR", help="Write each graph as Python that runs."),
]


@on_model
def run(
    request: Request,
    backend: BackendOption = "eager",
    print_changed: PrintChangedOption = "",
    print_after_all: PrintAfterAllOption = False,
    verify_each: VerifyEachOption = "",
    time_passes: TimePassesOption = False,
    stats: StatsOption = False,
    stop_after: StopAfterOption = "",
    disable: DisableOption = None,
    bisect_limit: LimitOption = None,
    only_rewrites: OnlyOption = None,
    counter: CounterOption = None,
    dump_dir: DumpDirOption = None,
) -> None:
    """Run one training step through the passes and look at what each does.

    Passes and rewrites are numbered over all graphs of the model, always in the same way.
    """
    from gtrans.debugging.look import Look

    look = Look(
        print_changed=print_changed,  # type: ignore[arg-type]  # it checks its options itself
        print_after_all=print_after_all,
        verify_each=verify_each,  # type: ignore[arg-type]  # the same
        time_passes=time_passes,
        stats=stats,
        stop_after=stop_after,
        disable=tuple(disable or ()),
        bisect_limit=bisect_limit,
        only_rewrites=only_rewrites,
        counter=tuple(counter or ()),
        dump_dir=dump_dir,
    )
    said: list[str] = []
    try:
        steps, seconds = _looked(request, look, backend, said)
    except GTransError as error:
        if isinstance(error, OptionError) or "replay: " in str(error):
            raise
        again = f"{request.command('run')}{_options(look, backend)}"
        find = f"find the rewrite: {request.command('bisect')}"
        raise type(error)(f"{error}\n  {find}\n  replay: {again}") from error
    if request.as_json:
        passes = [_described(step) for step in steps]
        print_json({"model": request.model, "passes": passes, "seconds": seconds, "said": said})
        return
    if look.time_passes:
        console().print(f"passes in all: {1000 * sum(s.seconds for s in steps):.1f} ms")
    wrote = f"; wrote {dump_dir}/index.html" if dump_dir else ""
    remark(f"one step on {backend} in {seconds:.1f} s{wrote}")


@on_model
def reduce(
    request: Request,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the script.")
    ] = Path("reduced.py"),
    backend: BackendOption = "eager",
) -> None:
    """Reduce a failure to a small script that still shows it.

    MODEL is as everywhere, or a case: a file that gtrans wrote. The script holds the few nodes of
    the graph that matter, with their values; it runs by itself, and with `gtrans repro`.
    """
    from gtrans.cli.models import session
    from gtrans.debugging.case import Written, write
    from gtrans.debugging.reduce import failing_case

    start = time.perf_counter()
    if request.model.endswith(".py"):
        written = Written.read(Path(request.model))
        with session(_missing(written.plugins, request.plugin)):
            found = _reduced(written.case(), request.as_json)
            text = write(found.case, f"{found.case.failure}.")
    else:
        loaded = request.loaded
        case = failing_case(
            loaded.model,
            loaded.inputs,
            loaded.keyword_inputs,
            request.pipeline,
            backend=backend,
            seed=request.seed,
        )
        found = _reduced(case, request.as_json)
        text = write(found.case, f"{found.case.failure}.")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {str(output)!r}: {error.strerror}") from error
    seconds = time.perf_counter() - start
    replay = f"gtrans repro {shlex.quote(str(output))}"
    sizes = {"nodes_before": found.nodes_before, "nodes": found.case.size, "tries": found.tries}
    if request.as_json:
        failure = asdict(found.case.failure) if found.case.failure else None
        value = {"model": request.model, **sizes, "failure": failure, "seconds": seconds}
        print_json({**value, "file": str(output), "replay": replay})
        return
    out = console()
    out.print(f"{found.case.failure}", style="bold red", soft_wrap=True)
    out.print(
        f"{found.nodes_before} -> {found.case.size} nodes, inputs and output included; "
        f"{found.tries} tries in {seconds:.1f} s"
    )
    out.print(f"wrote {output}\n\nreplay: {replay}", soft_wrap=True)


def repro(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A case that gtrans wrote.")],
    as_json: JsonOption = False,
) -> None:
    """Run a case again and say whether it still fails.

    The exit code is 1 while it does. A case without a failure, as `run --dump-dir` writes it, is
    run, and what it computes is listed.
    """
    with reporting(as_json):
        from gtrans.cli.models import session
        from gtrans.debugging.case import Written, versions
        from gtrans.debugging.check import failure_of

        written = Written.read(file)
        then, now = written.facts["versions"], versions()
        other = [f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
        with session(written.plugins):
            case = written.case()
            if case.failure is None:
                _print_results(case, as_json)
                return
            found = failure_of(case)
        same = case.failure.same_as(found)
        verdict = "still fails" if same else "fails in another way" if found else "is right now"
        if as_json:
            failure = asdict(found) if found else None
            print_json({"file": str(file), "verdict": verdict, "failure": failure, "other": other})
        else:
            out = console()
            style = "bold red" if found else "bold green"
            now_text = f": {found}" if found else ""
            out.print(f"{verdict}{now_text}", style=style, soft_wrap=True)
            if not same:
                out.print(f"it was: {case.failure}", soft_wrap=True)
            for line in other:
                remark(f"written with {line}")
            if found:
                out.print(f"\nreplay: gtrans repro {shlex.quote(str(file))}", soft_wrap=True)
        if found:
            raise typer.Exit(CHECK_FAILED)


def _looked(
    request: Request, look: "Look", backend: str, said: list[str]
) -> "tuple[list[Step], float]":
    """Runs one step on a copy of the model; prints or collects what the passes do."""
    from gtrans.api import install
    from gtrans.capture import Compiler, capture_always
    from gtrans.captured import Resident
    from gtrans.debugging.crash import write_repro
    from gtrans.registry import load_backend
    from gtrans.verification import in_dtype, private_copy, training_step

    load_backend(backend)
    pipeline, loaded = look.pipeline(request.pipeline), request.loaded
    out = console()

    def say(text: str) -> None:
        said.append(text)
        if not request.as_json:
            for line in text.splitlines():
                out.print(line, style=_STYLES.get(line[:1]), soft_wrap=True)

    values = _recorded(request, pipeline) if look.verify_each == "grads" else None
    values_of = None if values is None else lambda index, graph: values[index, type(graph)]
    compiler = Compiler(
        pipeline,
        backend,
        skip_failures=False,
        gate=look.gate(),
        observers=look.observers(pipeline, say, values_of),
        on_failure=write_repro,
    )
    twin = private_copy(loaded.model, None)
    compiler.resident = Resident.of(twin)
    install(twin, compiler)
    arguments = in_dtype((loaded.inputs, loaded.keyword_inputs), None)
    start = time.perf_counter()
    with capture_always():
        training_step(twin, arguments, None, request.seed)
    steps = [s for c in compiler.captured for s in (*c.forward_steps, *c.steps)]
    return steps, time.perf_counter() - start


_STYLES = {"+": "green", "-": "red", "@": "cyan", "p": "bold"}


def _recorded(
    request: Request, pipeline: "Pipeline"
) -> "Mapping[tuple[int, type[Any]], Mapping[str, Any]]":
    """The values of one step by number and kind of graph."""
    from gtrans.debugging.recording import Recording
    from gtrans.ir.forward import ForwardGraph
    from gtrans.ir.joint import JointGraph

    loaded = request.loaded
    recording = Recording(
        loaded.model,
        loaded.inputs,
        loaded.keyword_inputs,
        seed=request.seed,
        forward=pipeline,
    )
    found: dict[tuple[int, type[Any]], Mapping[str, Any]] = {
        (index, JointGraph): case.values
        for index, case in zip(recording.indices, recording.joints, strict=True)
    }
    if pipeline.on(ForwardGraph).passes:
        found |= {
            (index, ForwardGraph): case.values
            for index, case in zip(recording.indices, recording.forwards, strict=True)
        }
    return found


def _options(look: "Look", backend: str) -> str:
    """The own options of `gtrans run`, to be copied."""
    words = [] if backend == "eager" else ["--backend", backend]
    for name, value in asdict(look).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [word for text in value for word in (option, text)]
        elif value not in ("", None, False):
            words.append(f"{option}={value}")
    return "".join(f" {shlex.quote(word)}" for word in words)


def _described(step: "Step") -> dict[str, Any]:
    return {
        "number": step.number,
        "graph": step.graph,
        "pass": step.text,
        "matched": step.stats.matched,
        "rewritten": step.stats.rewritten,
        "skipped": dict(step.stats.skipped),
        "rewrites": [
            {"number": r.number, "site": r.site, "performed": r.performed} for r in step.rewrites
        ],
        "nodes_before": step.nodes_before,
        "nodes_after": step.nodes_after,
        "op_changes": step.op_changes,
        "seconds": step.seconds,
    }


def _missing(wanted: list[str], given: list[str] | None) -> list[str]:
    """Plug-ins of a case that are not registered by options already."""
    known = {str(Path(text).resolve()) if text.endswith(".py") else text for text in given or ()}
    return [text for text in wanted if text not in known]


def _reduced(case: "Case", as_json: bool) -> "Reduction":
    """Reduces, with a line of progress for people."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from gtrans.debugging.reduce import reduce as shrink

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console(stderr=True), disable=not progress_shown(as_json)
    ) as progress:
        task = progress.add_task(f"{case.size} nodes", total=None)

        def on_try(number: int, nodes: int, fails: bool) -> None:
            verdict = "fails" if fails else "does not fail"
            progress.update(task, description=f"try {number}: {nodes} nodes, {verdict}")

        return shrink(case, on_try)


def _print_results(case: "Case", as_json: bool) -> None:
    """What a graph without a failure computes."""
    from gtrans.debugging.running import run as run_graph
    from gtrans.ir.sizes import shape_text

    results = run_graph(case.graph, case.values, case.seed)
    rows = [
        {"kind": kind, "name": name, "type": shape_text(v), "norm": float(v.double().norm())}
        for (kind, name), v in results.items()
        if v is not None
    ]
    if as_json:
        print_json({"results": rows})
        return
    for row in rows:
        line = f"{row['kind']:9} {row['name']:40} {row['type']:20} norm {row['norm']:.6g}"
        console().print(line, soft_wrap=True)
