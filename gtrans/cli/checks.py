"""`gtrans verify` and `gtrans bisect`: is the gradient right, and which rewrite broke it if not."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtrans.cli.console import (
    CHECK_FAILED,
    console,
    examples,
    print_json,
    progress_shown,
    remark,
)
from gtrans.cli.options import Request, on_model

if TYPE_CHECKING:
    from gtrans.debugging.bisect import Bisection
    from gtrans.verification import Verification

VERIFY_EXAMPLES = examples(
    "gtrans verify model.py:make",
    "gtrans verify model.py:make --passes relu-mask,plan --backend inductor",
    "gtrans verify model.py:make --only-rewrites 1-16,18",
)
BISECT_EXAMPLES = examples(
    "gtrans bisect model.py:make",
    "gtrans bisect model.py:make --plugin my_passes.py --passes my-pass,plan --json",
)

OnlyOption = Annotated[
    str | None,
    typer.Option(
        "--only-rewrites",
        metavar="NUMBERS",
        help="Perform only these rewrites, as 1-16,18; 'none' performs none.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--bisect-limit",
        metavar="N",
        min=0,
        help="Perform only the first N rewrites.",
        show_default=False,
    ),
]


BackendOption = Annotated[
    str, typer.Option("--backend", "-b", help="eager checks the graph, inductor its code.")
]


@on_model
def verify(
    request: Request,
    backend: BackendOption = "eager",
    only_rewrites: OnlyOption = None,
    bisect_limit: LimitOption = None,
) -> None:
    """Compare the gradients with the untouched model's.

    Outputs, gradients and buffers of one step are compared, in float64 and in the model's own
    dtype. The exit code is 1 where one differs by more than the contract of the passes admits.
    """
    from gtrans.debugging.look import Look
    from gtrans.registry import load_backend
    from gtrans.verification import compare

    gate = Look(only_rewrites=only_rewrites, bisect_limit=bisect_limit).gate()
    pipeline = request.pipeline
    load_backend(backend)
    loaded = request.loaded
    start = time.perf_counter()
    result = compare(
        loaded.model,
        loaded.inputs,
        loaded.keyword_inputs,
        pipeline,
        backend=backend,
        seed=request.seed,
        gate=gate,
    )
    seconds = time.perf_counter() - start
    allowed = gate.allowed
    performed = [r for r in gate.seen if allowed is None or r.number in allowed]
    if request.as_json:
        value = {"model": request.model, "rewrites": [_rewrite(r) for r in performed]}
        print_json({**value, "seconds": seconds, **result.to_dict()})
    else:
        _print_verification(result, len(performed), len(gate.seen))
        lowered = "" if backend == "eager" else f" --backend {backend}"
        advice = f"; find the rewrite: {request.command('bisect')}{lowered}"
        remark(f"compared in {seconds:.1f} s{'' if result.ok else advice}")
    if not result.ok:
        raise typer.Exit(CHECK_FAILED)


@on_model
def bisect(
    request: Request,
    backend: BackendOption = "eager",
    most: Annotated[
        int, typer.Option("--most", metavar="N", help="Stop after so many culprits.")
    ] = 5,
) -> None:
    """Find the rewrites that break the gradient.

    First the pass is found, then the single rewrites within it, and the command that replays them.
    With a backend, un-lowered graphs are searched first; if they are right, it is to blame. The
    exit code is 1 if anything is.
    """
    from gtrans.registry import load_backend

    load_backend(backend)
    found = _searched(request, backend, most)
    replay = ""
    if found.culprits or found.backend:
        lowered = f" --backend {found.backend}" if found.backend else ""
        numbers = found.numbers or "none"
        replay = f"{request.command('verify')}{lowered} --only-rewrites {numbers}"
    if request.as_json:
        print_json({"model": request.model, **found.to_dict(), "replay": replay})
    else:
        _print_bisection(found, replay)
    if not found.verification.ok:
        raise typer.Exit(CHECK_FAILED)


def _searched(request: Request, backend: str, most: int) -> "Bisection":
    """Bisects, with a line of progress for people."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from gtrans.debugging.bisect import bisect as search

    pipeline, loaded = request.pipeline, request.loaded
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = progress_shown(request.as_json)
    with Progress(*columns, console=console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("comparing with all rewrites", total=None)
        checks = 0

        def on_check(count: int, wrong: bool) -> None:
            nonlocal checks
            checks += 1
            verdict = "wrong" if wrong else "right"
            progress.update(task, description=f"check {checks}: {count} rewrites, {verdict}")

        return search(
            loaded.model,
            loaded.inputs,
            loaded.keyword_inputs,
            pipeline,
            backend=backend,
            seed=request.seed,
            most=most,
            on_check=on_check,
        )


def _rewrite(rewrite: Any) -> dict[str, Any]:
    return {"number": rewrite.number, "pass": rewrite.pass_name, "site": rewrite.site}


def _print_verification(result: "Verification", performed: int, known: int) -> None:
    from rich.table import Table

    out = console()
    wrong = [c for c in result.comparisons if not c.ok]
    count = len(result.comparisons)
    verdict = (
        f"{len(wrong)} of {count} tensors differ by more than the contract admits"
        if wrong
        else f"all {count} tensors agree within the contract"
    )
    out.print(f"{verdict} ({result.contract})", style="bold red" if wrong else "bold green")
    out.print(f"pipeline {result.explanation.pipeline}; {performed} of {known} rewrites performed")
    for note in result.notes:
        out.print(note)
    table = Table(box=None, pad_edge=False)
    for column in ("", "tensor", "dtype", "relative", "largest", "bound", "verdict"):
        right = column in ("relative", "largest", "bound")
        table.add_column(column, justify="right" if right else "left")
    shown = sorted(wrong or result.comparisons, key=lambda c: -c.relative)[:12]
    for c in shown:
        numbers = (f"{c.relative:.1e}", f"{c.largest:.1e}", f"{c.bound:.1e}")
        verdict = "ok" if c.ok else "differs"
        table.add_row(c.kind, c.name, str(c.dtype).removeprefix("torch."), *numbers, verdict)
    out.print()
    out.print(table)
    rest = len(wrong or result.comparisons) - len(shown)
    if rest:
        out.print(f"{rest} more {'that differ' if wrong else 'that agree'}; --json lists all")


def _print_bisection(found: "Bisection", replay: str) -> None:
    out = console()
    if found.verification.ok and not found.culprits:
        out.print(f"nothing to find: the gradient is right with all {found.rewrites} rewrites")
        return
    worst = found.verification.worst
    if found.backend:
        needed = f", with {found.culprits[0]}" if found.culprits else ", without any rewrite"
        out.print(f"broken by backend {found.backend}", style="bold red")
        out.print(f"  {' and '.join(found.halves)}{needed}", soft_wrap=True)
        out.print(f"  worst: {worst.kind} {worst.name}, relative {worst.relative:.1e}")
        out.print("on the un-lowered graphs the gradient is right")
        out.print(f"\nreplay: {replay}", soft_wrap=True)
        return
    if not found.culprits:
        out.print("the gradient is wrong even without any rewrite: no pass is to blame")
        out.print(f"  worst: {worst.kind} {worst.name}, relative {worst.relative:.1e}")
        out.print("  Does the model give the same result twice with one seed?")
        return
    out.print(f"broken by pass {', '.join(found.passes)}", style="bold red")
    for culprit in found.culprits:
        out.print(f"  {culprit}", soft_wrap=True)
    out.print(f"  worst: {worst.kind} {worst.name}, relative {worst.relative:.1e}")
    if found.complete:
        out.print("without these rewrites the gradient is right")
    else:
        out.print("there are more; fix these first, or raise --most")
    out.print(
        f"{found.checks} checks on {found.rewrites} rewrites in {found.seconds:.1f} s, "
        f"{found.recaptured} of them on the whole model"
    )
    out.print(f"\nreplay: {replay}", soft_wrap=True)
