"""`gtrans prune`: what of a model can be erased, what that would leave, and a picture of it."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtrans.cli.console import console, examples, print_json, remark, reporting
from gtrans.cli.options import JsonOption, ModelArgument, SeedOption

if TYPE_CHECKING:
    from gtrans.rewrite.prune_plan import PrunePlan, Trade

PRUNE_EXAMPLES = examples(
    "gtrans prune model.py:make",
    "gtrans prune 'hf:bert?num_hidden_layers=2' --contract approximate",
    "gtrans prune model.py:make --svg classes.svg --multiple-of 8",
)


def prune(
    model: ModelArgument,
    contract: Annotated[
        str, typer.Option("--contract", metavar="NAME", help="exact or approximate.")
    ] = "exact",
    scope: Annotated[
        str, typer.Option("--scope", metavar="NAME", help="global, local or isomorphic.")
    ] = "global",
    multiple_of: Annotated[
        int, typer.Option("--multiple-of", metavar="N", help="Sizes stay multiples of N.")
    ] = 1,
    same_class: Annotated[
        bool,
        typer.Option("--same-class", help="Only what the model's own class can express."),
    ] = False,
    formulas: Annotated[
        bool, typer.Option("--formulas", help="Parameters and FLOPs in the sizes of the classes.")
    ] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw layers and classes.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what of a model can be erased, and what that would leave.

    Lists the classes of indices that go together with their contract, what keeps its size and why,
    and parameters and FLOPs at several sparsities, by the magnitude of the weights as they are.
    """
    with reporting(as_json):
        from gtrans.cli.models import load, session
        from gtrans.errors import PlanError
        from gtrans.pruning import prune as make_plan

        start = time.perf_counter()
        with session():
            loaded = load(model, seed=seed)
            plan = make_plan(
                loaded.model, *loaded.inputs, same_class=same_class, **loaded.keyword_inputs
            )
            options: dict[str, Any] = {
                "contract": contract,
                "scope": scope,
                "multiple_of": multiple_of,
            }
            trades: list[Trade] = []
            nothing = ""
            try:
                trades = plan.pareto(**options)
            except PlanError as error:  # the classes and reasons are the answer all the same
                nothing = str(error).splitlines()[0].rstrip(":")
            seconds = time.perf_counter() - start
            if svg is not None:
                from gtrans.seeing.draw_classes import picture

                svg.write_text(picture(plan.structure, model), encoding="utf-8")
            if as_json:
                print_json(_as_value(model, plan, trades, formulas))
            else:
                _print(plan, trades, formulas)
        if svg is not None:
            remark(f"wrote {svg}")
        if nothing:
            remark(nothing)
        remark(f"analysed in {seconds:.1f} s; in Python: gtrans.prune(model, *inputs)")


def _as_value(
    text: str, plan: "PrunePlan", trades: "list[Trade]", with_formulas: bool
) -> dict[str, Any]:
    value = {"model": text, **plan.to_dict(), "pareto": [asdict(t) for t in trades]}
    if with_formulas:
        found = plan.formulas()
        value["formulas"] = {
            "parameters": str(found.parameters),
            "flops": str(found.flops),
            "symbols": {str(s): text for s, text in found.meaning.items()},
        }
    return value


def _print(plan: "PrunePlan", trades: "list[Trade]", with_formulas: bool) -> None:
    from rich.table import Table

    from gtrans.ir.sizes import human

    out = console()
    out.print(str(plan), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("sparsity", "parameters", "", "FLOP", "", "bytes"):
        table.add_column(column, justify="right")
    for t in trades:
        table.add_row(
            f"{t.sparsity:.0%}",
            f"{t.parameters:,}",
            f"{t.parameters / max(1, plan.parameters):.1%}",
            f"{t.flops:,}",
            f"{t.flops / max(1, plan.flops):.1%}",
            human(t.bytes),
        )
    out.print()
    out.print(table)
    if with_formulas:
        out.print()
        out.print(str(plan.formulas()), soft_wrap=True)
