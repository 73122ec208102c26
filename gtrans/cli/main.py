"""The `gtrans` command.

Exit codes: 0 fine, 1 a check failed, 2 bad input or usage, 3 something inside failed.
"""

import gc
import os
from typing import Annotated

import typer

from gtrans import __version__
from gtrans.cli import catalog, checks, debug, graphs, memory, reports
from gtrans.cli.pruning import PRUNE_EXAMPLES, prune

# Python looks for cyclic garbage after so many new objects, and torch after every compilation. A
# graph is many objects, none garbage: by default a command spends a fifth of its time looking.
_ALLOCATIONS = 200_000
_NO_GARBAGE = ("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

app = typer.Typer(
    name="gtrans",
    help="Rewrite the training step of a PyTorch model, look at it, and check its gradients.",
    epilog="\b\nMODEL is one of:\n"
    "  package.module:function   a function that returns (model, inputs)\n"
    "  file.py:function          the same in a file\n"
    "  hf:CONFIG                 a config of transformers, with random weights: hf:gpt2?n_layer=2\n"
    "\b\nExit codes: 0 fine, 1 a check failed, 2 bad input or usage, 3 something inside failed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes longer to load than the whole help takes to print
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gtrans {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


app.command("passes", epilog=catalog.PASSES_EXAMPLES)(catalog.passes)
app.command("prune", epilog=PRUNE_EXAMPLES)(prune)
app.command("show", epilog=graphs.SHOW_EXAMPLES)(graphs.show)
app.command("diff", epilog=graphs.DIFF_EXAMPLES)(graphs.diff)
app.command("explain", epilog=reports.EXPLAIN_EXAMPLES)(reports.explain)
app.command("saved", epilog=memory.SAVED_EXAMPLES)(memory.saved)
app.command("timeline", epilog=memory.TIMELINE_EXAMPLES)(memory.timeline)
app.command("why-peak", epilog=memory.WHY_PEAK_EXAMPLES)(memory.why_peak)
app.command("verify", epilog=checks.VERIFY_EXAMPLES)(checks.verify)
app.command("bisect", epilog=checks.BISECT_EXAMPLES)(checks.bisect)
app.command("run", cls=debug.RunCommand, epilog=debug.RUN_EXAMPLES)(debug.run)
app.command("reduce", epilog=debug.REDUCE_EXAMPLES)(debug.reduce)
app.command("repro", epilog=debug.REPRO_EXAMPLES)(debug.repro)
app.command("report", epilog=reports.REPORT_EXAMPLES)(reports.report)
app.command("bench", epilog=reports.BENCH_EXAMPLES)(reports.bench)
app.command("time", epilog=reports.TIME_EXAMPLES)(reports.time_passes)
app.command("doctor", epilog=catalog.DOCTOR_EXAMPLES)(catalog.doctor)


def main() -> None:
    """Entry point of the console script."""
    gc.set_threshold(_ALLOCATIONS, 20, 100)
    os.environ.setdefault(*_NO_GARBAGE)
    try:
        app()
    finally:
        gc.freeze()  # the process ends: nothing is left to look for
