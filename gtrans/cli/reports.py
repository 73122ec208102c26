"""`gtrans explain` and `gtrans time`: what the passes do, and how long they take."""

import time
from typing import TYPE_CHECKING, Any

from gtrans.cli.console import (
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
    remark,
    reporting,
)

if TYPE_CHECKING:
    from gtrans.explanation import Explanation

EXPLAIN_EXAMPLES = examples(
    "gtrans explain model.py:make",
    "gtrans explain 'hf:gpt2?n_layer=2&n_embd=64&n_head=4' --skip relu-mask",
    "gtrans explain model.py:make --passes 'plan{price=1}' --json",
)
TIME_EXAMPLES = examples(
    "gtrans time model.py:make", "gtrans time 'hf:gpt2?n_embd=64&n_head=4' --passes plan"
)


def explain(
    model: ModelArgument,
    passes: PassesOption = "default",
    skip: SkipOption = None,
    plugin: PluginOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what each pass would do to a model.

    Prints what was matched and rewritten, why the rest was not, and what is kept for the backward.
    No training step is run.
    """
    with reporting(as_json):
        from gtrans.cli.models import session

        with session(plugin):
            explanation, seconds = _explained(model, passes, skip, seed)
            if as_json:
                print_json({"model": model, **explanation.to_dict()})
                return
            _print_explanation(explanation)
            remark(f"captured and rewritten in {seconds:.1f} s; check it: gtrans verify {model}")


def time_passes(
    model: ModelArgument,
    passes: PassesOption = "default",
    skip: SkipOption = None,
    plugin: PluginOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Time each pass, and all against tracing."""
    with reporting(as_json):
        from gtrans.cli.models import session

        with session(plugin):
            explanation, seconds = _explained(model, passes, skip, seed)
            value = _times(explanation, seconds)
            if as_json:
                print_json({"model": model, **value})
            else:
                _print_times(value)


def _explained(
    model: str, passes: str, skip: list[str] | None, seed: int
) -> "tuple[Explanation, float]":
    """The explanation of a MODEL text, and the seconds it took without building the model."""
    from gtrans.api import capture, require_trainable
    from gtrans.capture import Compiler
    from gtrans.cli.models import load
    from gtrans.explanation import Explanation

    pipeline = chosen(passes, skip)
    loaded = load(model, seed=seed)
    require_trainable(loaded.model)
    compiler = Compiler(pipeline, "eager", skip_failures=False)
    start = time.perf_counter()
    capture(loaded.model, compiler, loaded.inputs, loaded.keyword_inputs)
    seconds = time.perf_counter() - start
    return Explanation(compiler.pipeline, compiler.captured), seconds


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


def _print_explanation(explanation: "Explanation") -> None:
    from rich.table import Table

    from gtrans.ir.sizes import human

    out = console()
    before, after = explanation.saved_bytes_before, explanation.saved_bytes
    share = f" ({after / before - 1:+.0%})" if before else ""
    graphs = len(explanation.captured)
    breaks = f" ({graphs - 1} graph breaks)" if graphs > 1 else ""
    out.print(f"pipeline  {explanation.pipeline}", soft_wrap=True)
    out.print(f"contract  {explanation.contract}")
    out.print(f"graphs    {graphs}, {len(explanation.training)} with a backward{breaks}")
    out.print(f"saved     {human(before)} as autograd would -> {human(after)}{share}\n")
    table = Table(box=None, pad_edge=False)
    for column in ("graph", "pass", "matched", "rewrote", "why not, and what else"):
        table.add_column(column, justify="right" if column in ("matched", "rewrote") else "left")
    for index, step in explanation.steps():
        reasons = [f"{n} x {reason}" for reason, n in step.stats.skipped.items()]
        remarks = "\n".join([*reasons, *step.stats.notes])
        stats = step.stats
        table.add_row(str(index), step.text, str(stats.matched), str(stats.rewritten), remarks)
    out.print(table)
    kept = Table(box=None, pad_edge=False, title="kept for the backward", title_justify="left")
    for column in ("bytes", "values", "type", "operator", "made at", "read by"):
        right = column in ("bytes", "values")
        kept.add_column(column, justify="right" if right else "left", overflow="fold")
    rows = [r for r in explanation.saved if r.example.kind not in ("parameter", "buffer")]
    for row in rows:
        e = row.example
        readers = ", ".join(e.readers)
        kept.add_row(
            human(row.bytes), str(row.count), e.shape, e.operator, str(e.location), readers
        )
    out.print()
    out.print(kept)
