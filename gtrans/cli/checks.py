"""`gtrans verify` and `gtrans bisect`: is the gradient right, and which rewrite broke it if not."""

import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtrans.cli.console import (
    CHECK_FAILED,
    JsonOption,
    ModelArgument,
    PassesOption,
    PluginOption,
    SeedOption,
    SkipOption,
    chosen,
    console,
    examples,
    print_json,
    progress_shown,
    remark,
    reporting,
)
from gtrans.errors import OptionError

if TYPE_CHECKING:
    from gtrans.bisect import Bisection
    from gtrans.pipeline import Gate
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


def verify(
    model: ModelArgument,
    passes: PassesOption = "default",
    skip: SkipOption = None,
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="eager checks the graph, inductor its code.")
    ] = "eager",
    only_rewrites: OnlyOption = None,
    bisect_limit: LimitOption = None,
    plugin: PluginOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare the gradients with the untouched model's.

    Outputs, gradients and buffers of one step are compared, in float64 and in the model's own
    dtype. The exit code is 1 where one differs by more than the contract of the passes admits.
    """
    with reporting(as_json):
        from gtrans.cli.models import load, session
        from gtrans.registry import load_backend
        from gtrans.verification import compare

        gate = _gate(only_rewrites, bisect_limit)
        with session(plugin):
            pipeline = chosen(passes, skip)
            load_backend(backend)
            loaded = load(model, seed=seed)
            start = time.perf_counter()
            result = compare(
                loaded.model,
                loaded.inputs,
                loaded.keyword_inputs,
                pipeline,
                backend=backend,
                seed=seed,
                gate=gate,
            )
            seconds = time.perf_counter() - start
        allowed = gate.allowed
        performed = [r for r in gate.seen if allowed is None or r.number in allowed]
        if as_json:
            value = {"model": model, "rewrites": [_rewrite(r) for r in performed]}
            print_json({**value, "seconds": seconds, **result.to_dict()})
        else:
            _print_verification(result, len(performed), len(gate.seen))
            again = _options(passes, skip, plugin, seed)
            advice = "" if result.ok else f"; find the rewrite: gtrans bisect {model}{again}"
            remark(f"compared in {seconds:.1f} s{advice}")
        if not result.ok:
            raise typer.Exit(CHECK_FAILED)


def bisect(
    model: ModelArgument,
    passes: PassesOption = "default",
    skip: SkipOption = None,
    plugin: PluginOption = None,
    seed: SeedOption = 0,
    most: Annotated[
        int, typer.Option("--most", metavar="N", help="Stop after so many culprits.")
    ] = 5,
    as_json: JsonOption = False,
) -> None:
    """Find the rewrites that break the gradient.

    First the pass is found, then the single rewrites within it, and the command that replays them.
    The exit code is 1 if there are any.
    """
    with reporting(as_json):
        from gtrans.cli.models import load, session

        with session(plugin):
            pipeline = chosen(passes, skip)
            loaded = load(model, seed=seed)
            found = _searched(loaded, pipeline, seed, most, as_json)
        replay = ""
        if found.culprits:
            options = _options(passes, skip, plugin, seed)
            replay = f"gtrans verify {shlex.quote(model)}{options} --only-rewrites {found.numbers}"
        if as_json:
            print_json({"model": model, **found.to_dict(), "replay": replay})
        else:
            _print_bisection(found, replay)
        if not found.verification.ok:
            raise typer.Exit(CHECK_FAILED)


def _gate(only: str | None, limit: int | None) -> "Gate":
    from gtrans.bisect import parse_numbers
    from gtrans.pipeline import Gate

    if only is not None and limit is not None:
        raise OptionError("--only-rewrites and --bisect-limit exclude each other; give one")
    if limit is not None:
        return Gate(range(1, limit + 1))
    if only is None:
        return Gate()
    return Gate(frozenset() if only.strip() == "none" else parse_numbers(only))


def _searched(loaded: Any, pipeline: Any, seed: int, most: int, as_json: bool) -> "Bisection":
    """Bisects, with a line of progress for people."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from gtrans.bisect import bisect as search

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = progress_shown(as_json)
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
            seed=seed,
            most=most,
            on_check=on_check,
        )


def _options(passes: str, skip: list[str] | None, plugin: list[str] | None, seed: int) -> str:
    """The options of this run that another command needs to do the same."""
    words: list[str] = []
    for text in plugin or ():
        words += ["--plugin", text]
    if passes != "default":
        words += ["--passes", passes]
    for name in skip or ():
        words += ["--skip", name]
    if seed:
        words += ["--seed", str(seed)]
    return "".join(" " + shlex.quote(word) for word in words)


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
