"""Lower a half with Inductor: Triton on CUDA, C++ on CPU.

The half is traced once more with Inductor's decompositions, under the fake mode of its inputs, and
handed to Inductor's inner compiler. Passes have seen it without decompositions until here.

Modes and options are Inductor's own, and hold only while a half is traced or compiled. Inductor's
cache on disk is keyed by the final graph, which is what passes made of it, and by all of Inductor's
configuration; which outputs the user's program sees is not in that key, so it goes into its tag.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, get_origin

import torch
import torch.compiler.config as compiler_config
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cudagraph_utils import BoxedDeviceIndex
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from gtrans import __version__
from gtrans.backends.frugal_fusion import FrugalFusion
from gtrans.errors import OptionError, did_you_mean
from gtrans.ir.half import Half, Runnable

# Under a memory budget. Inductor keeps the memory of a dead value for a later one of its size, past
# its own estimate of the peak if need be, which knows one half only; and its estimate is also what
# it reorders by, away from the order of the plan. See also `gtrans.backends.frugal_fusion`.
_FRUGAL = {"allow_buffer_reuse": False, "reorder_for_peak_memory": False}

# On a CPU. Inductor gives the weights of convolutions the layout with channels innermost, keeps
# these copies for the backward, and is no faster for it.
_ON_CPU = {"layout_optimization": False}


class Inductor:
    """The default lowering where a C++ compiler or Triton is at hand.

    Args:
        settings: Inductor's configuration while it compiles, by names such as "max_autotune".
    """

    name = "inductor"
    overwrites_saved = True
    # A kernel made of several operators holds the results of all of them at once: seen up to 5 %.
    slack = 0.08

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = dict(settings or {})

    def configured(self, mode: str | None, options: Mapping[str, Any] | None) -> "Inductor":
        """The same lowering with a mode or options of `torch.compile`.

        Raises:
            OptionError: a mode, option or value is unknown, or both a mode and options are given.
        """
        return Inductor({**self.settings, **settings_of(mode, options)})

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
        with self._settings(half):
            return replace(half, module=decomposed(half.with_tolerant_views(), half.inputs))

    def compile(self, half: Half) -> Runnable:
        """Compiles the decomposed half."""
        module = half.module
        output = module.graph.output_node()
        output.meta["user_visible_output_idxs"] = list(half.visible_outputs)
        # The backward is compiled at the first backward pass, when no fake mode is active any more.
        with self._settings(half), V.set_fake_mode(detect_fake_mode(half.inputs)):
            # A forward that cannot be a CUDA graph switches that off for its backward, too.
            cudagraphs = half.shared.setdefault(
                "cudagraphs", BoxedBool(inductor_config.triton.cudagraphs)
            )
            device = half.shared.setdefault("forward device", BoxedDeviceIndex(None))
            # Inductor lowers random operators only after these passes; torch runs them on the
            # joint graph, which here is still without decompositions.
            joint_graph_passes(module)
            compiled: Any = compile_fx_inner(
                module,
                half.inputs,
                static_input_idxs=tuple(half.static_inputs),
                is_backward=half.role == "backward",
                is_inference=half.role == "inference",
                cudagraphs=cudagraphs,
                boxed_forward_device_index=device,
            )
        return compiled  # type: ignore[no-any-return]  # an OutputCode, called with one list

    @contextmanager
    def _settings(self, half: Half) -> Iterator[None]:
        """Inductor's configuration while it works on a half, and the tag of its caches' keys."""
        tag = f"{compiler_config.cache_key_tag} {cache_tag(half)}".strip()
        tagged = compiler_config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]  # made by torch
        on_cpu = all(x.device.type == "cpu" for x in half.inputs if isinstance(x, torch.Tensor))
        defaults = {**(_ON_CPU if on_cpu else {}), **(_FRUGAL if half.frugal else {})}
        settings = {**defaults, **self.settings}
        fusion = V.set_choices_handler(FrugalFusion()) if half.frugal else nullcontext()
        with inductor_config.patch(settings), tagged, fusion:
            yield


def cache_tag(half: Half) -> str:
    """What the graph of a half does not say, for the keys under which its code is cached."""
    visible = ",".join(map(str, half.visible_outputs))
    return f"gtrans {__version__} [{half.pipeline}] {half.role} visible:{visible}"


def settings_of(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Inductor's configuration for a mode or options, with the rules of `torch.compile`.

    Raises:
        OptionError: a mode, option or value is unknown, or both a mode and options are given.
    """
    if mode is not None and options is not None:
        raise OptionError(
            f"either a mode or options can be given, not both: mode={mode!r}, options "
            f"{sorted(options)}; a mode is a set of options, which "
            f"torch._inductor.list_mode_options({mode!r}) lists"
        )
    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise OptionError(f"unknown mode {mode!r} of backend 'inductor'{did_you_mean(mode, modes)}")
    chosen = dict(modes[mode]) if mode is not None else dict(options or {})
    known = set(list_options())
    settings: dict[str, Any] = {}
    for key, value in chosen.items():
        name = key.replace("-", "_")
        if name not in known:
            near = did_you_mean(name, known)
            near = near if "did you mean" in near else "; torch._inductor.list_options() has all"
            raise OptionError(f"unknown options [{key!r}] of backend 'inductor'{near}")
        kind = inductor_config.get_type(name)  # type: ignore[attr-defined]  # made by torch
        if get_origin(kind) is None and not isinstance(value, kind):
            raise OptionError(
                f"option {key!r} of backend 'inductor' takes {_type_name(kind)}, got {value!r}"
            )
        settings[name] = value
    return settings


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)


def decomposed(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a graph again with Inductor's decompositions; source lines and metadata are kept."""

    def run(*arguments: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*arguments)

    with detect_fake_mode(inputs) or nullcontext():
        return make_fx(run, decomposition_table=select_decomp_table())(*inputs)
