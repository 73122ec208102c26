"""Lower a half with Inductor: Triton on CUDA, C++ on CPU.

The half is traced once more with Inductor's decompositions, under the fake mode of its inputs, and
handed to Inductor's inner compiler. Passes have seen it without decompositions until here.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from gtrans.ir.half import Half, Runnable


class Inductor:
    """The default lowering where a C++ compiler or Triton is at hand."""

    name = "inductor"
    overwrites_saved = True

    def unavailable(self) -> str | None:
        """Says which compiler is missing."""
        if torch.cuda.is_available():
            return None
        compilers = inductor_config.cpp.cxx
        candidates = [compilers] if isinstance(compilers, str) else [c for c in compilers if c]
        if any(shutil.which(c) for c in candidates):
            return None
        return f"no C++ compiler found (looked for {', '.join(candidates)})"

    def prepare(self, half: Half) -> Half:
        """Traces the half again, with Inductor's decompositions."""
        return replace(half, module=decomposed(half.with_tolerant_views(), half.inputs))

    def compile(self, half: Half) -> Runnable:
        """Compiles the decomposed half."""
        module = half.module
        output = module.graph.output_node()
        output.meta["user_visible_output_idxs"] = list(half.visible_outputs)
        # The backward is compiled at the first backward pass, when no fake mode is active any more.
        with V.set_fake_mode(detect_fake_mode(half.inputs)):
            # Inductor lowers random operators only after these passes; torch runs them on the
            # joint graph, which here is still without decompositions.
            joint_graph_passes(module)
            compiled: Any = compile_fx_inner(
                module,
                half.inputs,
                static_input_idxs=tuple(half.static_inputs),
                is_backward=half.role == "backward",
                is_inference=half.role == "inference",
            )
        return compiled  # type: ignore[no-any-return]  # an OutputCode, called with one list


def decomposed(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a graph again with Inductor's decompositions; source lines and metadata are kept."""

    def run(*arguments: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*arguments)

    with detect_fake_mode(inputs) or nullcontext():
        return make_fx(run, decomposition_table=select_decomp_table())(*inputs)
