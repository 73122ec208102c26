"""`gtrans saved`, `timeline` and `why-peak`: what is in memory, why, and from which line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gtrans.cli.console import console, examples, print_json, remark
from gtrans.cli.options import Request, on_model

if TYPE_CHECKING:
    from gtrans.explanation import Explanation

SAVED_EXAMPLES = examples(
    "gtrans saved model.py:make",
    "gtrans saved 'hf:gpt2?n_layer=2&n_embd=64&n_head=4' --each",
    "gtrans saved model.py:make --memory 40% --json",
)
TIMELINE_EXAMPLES = examples(
    "gtrans timeline model.py:make",
    "gtrans timeline model.py:make --memory 40% -o timeline.svg -o timeline.png",
)
WHY_PEAK_EXAMPLES = examples("gtrans why-peak model.py:make --memory 40%")


@on_model
def saved(
    request: Request,
    each: Annotated[
        bool, typer.Option("--each", help="One line a value; equal layers are not folded.")
    ] = False,
) -> None:
    """List what is kept for the backward, and why.

    Every value with its bytes, dtype, the line of the model that made it, why it is not computed
    again, and the operators of the backward that read it. Equal layers are one line.
    """
    from gtrans.explanation import unfolded
    from gtrans.seeing.listings import saved_listing

    explanation, seconds = request.explained()
    rows = unfolded(explanation.values) if each else explanation.saved
    if request.as_json:
        print_json(
            {
                "model": request.model,
                "pipeline": str(explanation.pipeline),
                "saved_bytes": explanation.saved_bytes,
                "saved_bytes_before": explanation.saved_bytes_before,
                "saved": [row.to_dict() for row in rows],
            }
        )
        return
    out = console()
    out.print(saved_listing(rows))
    out.print(_total(explanation))
    remark(f"captured in {seconds:.1f} s; what is alive at the peak: {request.command('why-peak')}")


@on_model
def timeline(
    request: Request,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write it as .svg, .png or .txt too."),
    ] = None,
) -> None:
    """Draw the memory of a step over its operators, before and after the passes.

    Marks forward, backward and the peak, and lists what is alive then with the lines that made it.
    Nothing is run: the allocator is simulated.
    """
    explanation, seconds = request.explained()
    drawn = explanation.timeline()
    files = [str(drawn.save(path)) for path in out or ()]
    if request.as_json:
        print_json({"model": request.model, "files": files, **drawn.to_dict()})
        return
    screen = console()
    screen.print(drawn.summary, style="bold")
    screen.print()
    screen.print(drawn.text(width=max(20, min(120, screen.width - 14))), soft_wrap=True)
    screen.print()
    screen.print(str(drawn.why), soft_wrap=True)
    for file in files:
        remark(f"wrote {file}")
    remark(f"captured and simulated in {seconds:.1f} s; what is kept: {request.command('saved')}")


@on_model
def why_peak(request: Request) -> None:
    """Say what is in memory when the step peaks, and which lines made it."""
    from gtrans.why_peak import why_peak

    explanation, seconds = request.explained()
    why = why_peak(explanation)
    if request.as_json:
        print_json({"model": request.model, **why.to_dict()})
        return
    console().print(str(why), soft_wrap=True)
    remark(f"captured in {seconds:.1f} s; over the whole step: {request.command('timeline')}")


def _total(explanation: "Explanation") -> str:
    from gtrans.ir.sizes import human

    kept, plain = explanation.saved_bytes, explanation.saved_bytes_before
    anyway = sum(r.count for r in explanation.saved if r.in_memory_anyway)
    share = f" ({kept / plain - 1:+.0%})" if plain else ""
    return (
        f"\n{human(kept)} in all, {human(plain)} as autograd would{share}; besides these, the "
        f"backward reads {anyway} parameters and buffers, which are in memory anyway"
    )
