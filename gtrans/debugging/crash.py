"""When a pass fails, write down what it failed on: one file, and the command that replays it."""

import os
import re
import tempfile
import zlib
from pathlib import Path

from gtrans.debugging.case import Case, Failure, stand_ins, write
from gtrans.ir.program import Program
from gtrans.ir.tracing import outside_tracing
from gtrans.pipeline import Graph, Pipeline, Step

FOLDER_VARIABLE = "GTRANS_REPRO_DIR"


def folder() -> Path:
    """Where files are written: `GTRANS_REPRO_DIR`, or `gtrans-repros` among temporary files."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / "gtrans-repros"


def write_repro(step: Step, graph: Graph, passes: Pipeline) -> str:
    """Writes a case for a pass that failed; never fails itself.

    Args:
        step: what the pass did, with its error.
        graph: the graph that the pipeline started from.
        passes: the pipeline up to the pass that failed.

    Returns:
        A line for the message: the command that replays it, or why there is none.
    """
    if isinstance(graph, Program):
        return ""  # no graph of a training step
    error, _, _ = step.error.partition(":")
    text = f"raises {step.error.splitlines()[0]}"
    failure = Failure("raises", (step.name,), error=error, text=text)
    try:
        case = Case(graph, {}, passes, failure=failure, descriptions=stand_ins(graph))
        file = folder() / f"{re.sub(r'[^a-z0-9-]', '-', step.name)}-{_digest(case)}.py"
        # Constants of the graph are real tensors, also while torch traces.
        content = outside_tracing(lambda: write(case, f"{failure}, found in graph {step.graph}."))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    except Exception as reason:  # whatever it is, what the user must see is why the pass failed
        return f"\n  it could not be written down for a replay: {reason}"
    return f"\n  replay: gtrans repro {file}"


def _digest(case: Case) -> str:
    """Equal for the same failure on a graph of the same calls, so that files do not pile up."""
    calls = " ".join(f"{n.name}={n.target}" for n in case.graph.nodes)
    return f"{zlib.crc32(f'{case.pipeline} {case.failure} {calls}'.encode()):08x}"
