"""Run a half operator by operator with torch's own kernels: the reference backend.

Every value is freed right after its last use, so peaks measured here are those of the schedule.
"""

from torch.fx.graph import CodeGen, _BoxedCodeGen

from gtrans.ir.half import Half, Runnable, boxed


class Eager:
    """The reference lowering: no fusion, no rewriting, nothing to compile."""

    name = "eager"
    overwrites_saved = False
    slack = 0.0

    def unavailable(self) -> str | None:
        """Always available."""
        return None

    def prepare(self, half: Half) -> Half:
        """Nothing to prepare."""
        return half

    def compile(self, half: Half) -> Runnable:
        """Generates Python code that calls one operator after another and frees as it goes."""
        module = half.with_tolerant_views()
        codegen: CodeGen = _BoxedCodeGen()
        module.graph.set_codegen(codegen)
        module.recompile()
        return boxed(module.forward)
