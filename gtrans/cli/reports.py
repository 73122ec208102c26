"""`gtrans explain` and `gtrans time`: what the passes do, and how long they take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtrans.cli.console import CHECK_FAILED, console, examples, print_json, remark, working
from gtrans.cli.options import Request, on_model

if TYPE_CHECKING:
    from gtrans.explanation import Explanation

EXPLAIN_EXAMPLES = examples(
    "gtrans explain model.py:make",
    "gtrans explain 'hf:gpt2?n_layer=2&n_embd=64&n_head=4' --skip relu-mask",
    "gtrans explain model.py:make --memory 40%",
    "gtrans explain model.py:make --passes reversible --missed",
    "gtrans explain model.py:make --passes 'plan{price=1}' --json",
)
REPORT_EXAMPLES = examples(
    "gtrans report model.py:make -o report.html",
    "gtrans report 'hf:gpt2?n_layer=2&n_embd=64&n_head=4' --memory 60% -o report.html",
)
BENCH_EXAMPLES = examples(
    "gtrans bench model.py:make",
    "gtrans bench model.py:make --memory 60% --backend eager --rounds 20",
)
TIME_EXAMPLES = examples(
    "gtrans time model.py:make", "gtrans time 'hf:gpt2?n_embd=64&n_head=4' --passes plan"
)


@on_model
def explain(
    request: Request,
    missed: Annotated[
        bool, typer.Option("--missed", help="Only what was not done, why, and where.")
    ] = False,
) -> None:
    """Say what each pass would do to a model.

    Prints what was matched and rewritten, why the rest was not, and what is kept for the backward.
    No training step is run.
    """
    explanation, seconds = request.explained()
    if request.as_json:
        print_json({"model": request.model, **explanation.to_dict()})
        return
    if missed:
        _print_missed(explanation)
    else:
        console().print(explanation)
    remark(f"captured and rewritten in {seconds:.1f} s; check it: {request.command('verify')}")


@on_model
def report(
    request: Request,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write the page.")
    ] = Path("report.html"),
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare gradients, which runs two steps.")
    ] = True,
    float64: Annotated[
        bool, typer.Option("--float64", help="Compare them in float64, too; takes longer.")
    ] = False,
) -> None:
    """Write one page about a step: passes, graphs, memory, gradients, plans.

    A single file that needs no network. The exit code is 1 where a gradient differs by more than
    the contract of the passes admits.
    """
    from gtrans.seeing.page import page_of

    pipeline, loaded = request.pipeline, request.loaded
    with working(request.as_json) as told:
        page = page_of(
            loaded.model,
            loaded.inputs,
            loaded.keyword_inputs,
            pipeline,
            title=request.model,
            command=request.command("report"),
            seed=request.seed,
            check=check,
            float64=float64,
            told=told,
        )
        told("writing the page")
        path = page.save(out)
    verification, size = page.verification, path.stat().st_size
    ok = verification is None or verification.ok
    if request.as_json:
        value = {"model": request.model, "file": str(path), "bytes": size, "ok": ok}
        print_json({**value, "seconds": page.seconds})
    else:
        size_text = f"{size / 1024:.0f} KiB"
        remark(f"wrote {path} ({size_text}) in {page.seconds:.1f} s; open it in a browser")
    if not ok:
        remark(f"gradients differ; find the rewrite: {request.command('bisect')}")
        raise typer.Exit(CHECK_FAILED)


@on_model
def bench(
    request: Request,
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="inductor or eager; torch.compile lowers alike.")
    ] = "inductor",
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Measured calls of each.")
    ] = 10,
) -> None:
    """Time a step as written, under torch.compile, and with gtrans.

    The three run in turn; time is the median of a call with its quartiles, memory the measured
    peak of a step above what was allocated before it.
    """
    from gtrans.bench import bench

    pipeline, loaded = request.pipeline, request.loaded
    with working(request.as_json) as told:
        found = bench(
            loaded.model,
            loaded.inputs,
            loaded.keyword_inputs,
            pipeline,
            backend=backend,
            rounds=rounds,
            told=told,
        )
    if request.as_json:
        print_json({"model": request.model, "pipeline": str(pipeline), **found.to_dict()})
        return
    console().print(str(found), soft_wrap=True)
    remark(f"forward and backward, backend {backend}; predicted: {request.command('timeline')}")


@on_model
def time_passes(request: Request) -> None:
    """Time each pass, and all against tracing."""
    explanation, seconds = request.explained()
    value = _times(explanation, seconds)
    if request.as_json:
        print_json({"model": request.model, **value})
    else:
        _print_times(value)


def _times(explanation: "Explanation", seconds: float) -> dict[str, Any]:
    steps = [
        {
            "graph": index,
            "pass": step.text,
            "seconds": step.seconds,
            "nodes_before": step.nodes_before,
            "nodes_after": step.nodes_after,
            "op_changes": step.op_changes,
            "matched": step.stats.matched,
            "rewritten": step.stats.rewritten,
        }
        for index, step in explanation.steps()
    ]
    own = explanation.own_seconds
    lowering = sum(c.lower_seconds for c in explanation.captured)
    return {
        "pipeline": str(explanation.pipeline),
        "passes": steps,
        "pass_seconds": sum(step.seconds for _, step in explanation.steps()),
        "own_seconds": own,
        "lower_seconds": lowering,
        "tracing_seconds": seconds - own - lowering,
        "seconds": seconds,
        "own_share": own / seconds if seconds else 0.0,
    }


def _print_times(value: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, side in (
        ("graph", "right"),
        ("pass", "left"),
        ("ms", "right"),
        ("nodes", "right"),
        ("rewrote", "right"),
        ("operators added and removed", "left"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]  # a literal of rich
    for p in value["passes"]:
        changes = ", ".join(f"{n:+d} {op}" for op, n in p["op_changes"].items()) or "none"
        nodes = f"{p['nodes_before']} -> {p['nodes_after']}"
        rewrote = f"{p['rewritten']} of {p['matched']}"
        milliseconds = f"{1000 * p['seconds']:.1f}"
        table.add_row(str(p["graph"]), p["pass"], milliseconds, nodes, rewrote, changes)
    out = console()
    out.print(table)
    out.print(f"\npasses            {value['pass_seconds']:8.3f} s")
    out.print(f"gtrans in all     {value['own_seconds']:8.3f} s  with planning and splitting")
    out.print(f"lowering (eager)  {value['lower_seconds']:8.3f} s")
    out.print(
        f"tracing           {value['tracing_seconds']:8.3f} s  Dynamo, AOTAutograd, a forward"
    )
    out.print(
        f"total             {value['seconds']:8.3f} s  gtrans' share {value['own_share']:.0%}"
    )


def _print_missed(explanation: "Explanation") -> None:
    from gtrans.registry import pass_table
    from gtrans.seeing.listings import missed_listing

    ran = {p.name for p in explanation.pipeline.passes}
    others = sorted(set(pass_table()) - ran)
    out = console()
    out.print(missed_listing(explanation.missed))
    if others:
        out.print(f"\nnot asked for: {', '.join(others)} (what each does: gtrans passes NAME)")
