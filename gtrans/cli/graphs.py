"""`gtrans show` and `gtrans diff`: the graphs of a model, and what a pass changes in them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtrans.cli.console import console, examples, print_json, remark
from gtrans.cli.options import Request, on_model
from gtrans.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from torch import fx

    from gtrans.ir.joint import JointGraph
    from gtrans.pipeline import Pipeline
    from gtrans.seeing.watch import Snapshot, Watcher

SHOW_EXAMPLES = examples(
    "gtrans show model.py:make",
    "gtrans show model.py:make --stage joint --before relu-mask",
    "gtrans show 'hf:gpt2?n_layer=2&n_embd=64&n_head=4' --svg gpt2.svg",
    "gtrans show model.py:make --region blocks.0 --svg block.svg",
)
DIFF_EXAMPLES = examples(
    "gtrans diff model.py:make --pass relu-mask",
    "gtrans diff model.py:make --pass 'relu-mask{min_numel=1}' --json",
)


class Stage(StrEnum):
    """Which graph of a model to show."""

    FORWARD = "forward"
    JOINT = "joint"
    FORWARD_HALF = "forward-half"
    BACKWARD_HALF = "backward-half"


@dataclass(frozen=True)
class View:
    """One graph at one point of the pipeline. `graph` is None where a model has no such graph."""

    index: int
    graph: "fx.Graph | None"
    kept: Sequence[str] = field(default=())


@on_model
def show(
    request: Request,
    stage: Annotated[
        Stage,
        typer.Option("--stage", help="forward is before autograd; halves are what a backend gets."),
    ] = Stage.JOINT,
    before: Annotated[
        str | None, typer.Option("--before", metavar="PASS", help="The graph before this pass.")
    ] = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="PASS", help="The graph after this pass.")
    ] = None,
    dot: Annotated[
        Path | None, typer.Option("--dot", metavar="FILE", help="Write it in the dot language.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write it as a picture.")
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            "--region",
            metavar="NAME",
            help="Only a module (h.0.mlp, h.*.mlp) or node, as forward, residual and backward.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the graphs of a model as code.

    Every line has its shape and the line of the model it comes from; | marks the forward, < the
    backward. By default it is the joint graph after all passes.
    """
    if before is not None and after is not None:
        raise OptionError("--before and --after exclude each other; give one")
    if stage is not Stage.JOINT and (dot or svg):
        raise OptionError("--dot and --svg draw the joint graph; leave --stage out")
    if region is not None and (dot or stage is not Stage.JOINT):
        raise OptionError("--region shows a part of the joint graph; leave --stage and --dot out")
    start = time.perf_counter()
    point = _point(request.pipeline, before or after, stage)
    watcher = _watched(request, request.pipeline)
    if region is not None:
        _show_region(request, _joints(watcher, point, before is not None), region, svg)
        return
    views = _views(watcher, stage, point, earlier=before is not None)
    files = _drawn(watcher, point, before is not None, request.model, dot, svg)
    seconds = time.perf_counter() - start
    if request.as_json:
        described = _described(request.model, stage, before, after)
        print_json({**described, **_content(views, files)})
        return
    for view in views:
        _print_view(view, len(views))
    for file in files:
        remark(f"wrote {file}")
    remark(
        f"captured in {seconds:.1f} s; what a pass changed: {request.command('diff')} --pass NAME"
    )


@on_model
def diff(
    request: Request,
    pass_text: Annotated[
        str,
        typer.Option(
            "--pass",
            metavar="PASS",
            help="The pass, with options if you like. One that is not in --passes runs alone.",
            show_default=False,
        ),
    ],
) -> None:
    """Print what one pass changes, as a diff."""
    from gtrans.pipeline import Pipeline

    pipeline, given = request.pipeline, Pipeline.parse(pass_text)
    if len(given.passes) != 1:
        raise OptionError(f"--pass takes one pass, got {pass_text!r}")
    names = {str(p) for p in pipeline.passes} | {p.name for p in pipeline.passes}
    name, text = given.passes[0].name, str(given.passes[0])
    watcher = _watched(request, pipeline if text in names else given)
    steps = [s for s in watcher.snapshots if s.step.name == name]
    changes = [_change(s) for s in steps]
    if request.as_json:
        print_json({"model": request.model, "pass": text, "graphs": changes})
        return
    for change in changes:
        _print_change(change, len(changes))


def _watched(request: Request, pipeline: "Pipeline") -> "Watcher":
    from gtrans.seeing.watch import watched

    loaded = request.loaded
    return watched(loaded.model, loaded.inputs, loaded.keyword_inputs, pipeline)


def _point(pipeline: "Pipeline", name: str | None, stage: Stage) -> str | None:
    """Checks that a pass runs on the graph of a stage.

    Raises:
        OptionError: it does not.
    """
    if name is None:
        return None
    from gtrans.ir.forward import ForwardGraph
    from gtrans.ir.joint import JointGraph
    from gtrans.plan.planner import Plan

    if stage in (Stage.FORWARD_HALF, Stage.BACKWARD_HALF):
        raise OptionError("the halves come after all passes; leave --before and --after out")
    kind = ForwardGraph if stage is Stage.FORWARD else JointGraph
    known = [p.name for p in pipeline.on(kind).passes]
    if kind is JointGraph and Plan.name not in known:
        known.append(Plan.name)  # capture adds it
    if name not in known:
        raise OptionError(
            f"no pass {name!r} runs on the {stage.value} graph in this pipeline"
            f"{did_you_mean(name, known)}"
        )
    return name


def _views(watcher: "Watcher", stage: Stage, point: str | None, *, earlier: bool) -> list[View]:
    from gtrans.seeing.change import kept

    views = []
    for captured in watcher.captured:
        index = captured.index
        if stage is Stage.FORWARD:
            graph = watcher.forward_at(index, point, earlier=earlier)
            views.append(View(index, graph.graph))
        elif captured.rewritten is None:
            views.append(View(index, None))
        elif stage is Stage.JOINT:
            joint = watcher.joint_at(index, point, earlier=earlier)
            views.append(View(index, joint.graph, kept(joint)))
        else:
            from gtrans.capture import split

            forward, backward = split(captured.rewritten)
            half = forward if stage is Stage.FORWARD_HALF else backward
            views.append(View(index, half.graph))
    return views


def _described(model: str, stage: Stage, before: str | None, after: str | None) -> dict[str, Any]:
    return {"model": model, "stage": stage.value, "before": before, "after": after}


def _content(views: list[View], files: list[Path]) -> dict[str, Any]:
    from gtrans.ir.printer import to_code

    graphs = [
        {
            "index": v.index,
            "nodes": len(v.graph.nodes),
            "code": to_code(v.graph),
            "kept": list(v.kept),
        }
        for v in views
        if v.graph is not None
    ]
    return {"graphs": graphs, "files": [str(f) for f in files]}


def _print_view(view: View, count: int) -> None:
    from gtrans.ir.printer import to_code

    out = console()
    if count > 1:
        out.print(f"=== graph {view.index}", style="bold")
    if view.graph is None:
        out.print("no part of this graph needs a gradient: it has a forward only")
        return
    for line in to_code(view.graph).splitlines():
        style = "dim" if line.startswith("#") else "magenta" if line.startswith("<") else None
        out.print(line, style=style, soft_wrap=True)
    if view.kept:
        out.print(f"\n# kept for the backward: {len(view.kept)} values", style="bold")
        for line in view.kept:
            out.print(f"  {line}", soft_wrap=True)


def _drawn(
    watcher: "Watcher",
    point: str | None,
    earlier: bool,
    title: str,
    dot: Path | None,
    svg: Path | None,
) -> list[Path]:
    """Writes the joint graphs to files, numbered where there are several."""
    from gtrans.ir.printer import to_dot
    from gtrans.seeing.draw import to_svg

    written: list[Path] = []
    joints = _joints(watcher, point, earlier)
    for index, joint in joints.items():
        label = title if len(joints) == 1 else f"{title}, graph {index}"
        for path, text in ((dot, to_dot), (svg, to_svg)):
            if path is not None:
                file = path.with_stem(f"{path.stem}-{index}") if len(joints) > 1 else path
                written.append(_written(file, text(joint, title=label)))
    return written


def _joints(watcher: "Watcher", point: str | None, earlier: bool) -> "dict[int, JointGraph]":
    """The joint graphs at one point of the pipeline, by number."""
    drawable = [c.index for c in watcher.captured if c.rewritten is not None]
    return {index: watcher.joint_at(index, point, earlier=earlier) for index in drawable}


def _written(file: Path, text: str) -> Path:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {str(file)!r}: {error.strerror}") from error
    return file


def _show_region(
    request: Request, joints: "dict[int, JointGraph]", name: str, svg: Path | None
) -> None:
    """Prints and draws the optic of a region in the first graph that has it."""
    from gtrans.seeing.optic import first_optic, optic_svg

    optic = first_optic(joints.values(), name)
    files = [] if svg is None else [str(_written(svg, optic_svg(optic)))]
    if request.as_json:
        print_json({"model": request.model, **optic.to_dict(), "files": files})
        return
    console().print(str(optic), soft_wrap=True)
    for file in files:
        remark(f"wrote {file}")


def _change(snapshot: "Snapshot") -> dict[str, Any]:
    from gtrans.seeing.change import difference

    stats = snapshot.step.stats
    return {
        "index": snapshot.index,
        "matched": stats.matched,
        "rewritten": stats.rewritten,
        "skipped": dict(stats.skipped),
        "diff": difference(snapshot.step.text, snapshot.before, snapshot.after),
    }


def _print_change(change: dict[str, Any], count: int) -> None:
    out = console()
    where = f"graph {change['index']}: " if count > 1 else ""
    reasons = "".join(f"; skipped {n}: {reason}" for reason, n in change["skipped"].items())
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in change["diff"].splitlines():
        out.print(line, style=colours.get(line[:1]), soft_wrap=True)
    remark(f"{where}matched {change['matched']}, rewrote {change['rewritten']}{reasons}")
