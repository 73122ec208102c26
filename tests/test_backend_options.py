"""Modes and options of backends: validated at once, in force only while gtrans compiles."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.compiler.config as compiler_config
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.utils import fresh_cache

import gtrans
from gtrans.backends import inductor
from gtrans.backends.inductor import Inductor, cache_tag, settings_of
from gtrans.capture import Compiler
from gtrans.errors import OptionError
from gtrans.ir.half import Configurable, Half, Runnable
from gtrans.pipeline import Pipeline
from gtrans.registry import load_backend


class Small(nn.Module):
    """A layer whose backward reads the activation's input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.last(nn.functional.gelu(self.first(x)))
        return answer


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    for p in model.parameters():
        p.grad = None
    model(X).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def configuration() -> dict[str, Any]:
    return {
        **inductor_config.get_config_copy(),
        "tag": compiler_config.cache_key_tag,
        "forced": functorch_config.force_autograd_cache,
    }


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs what Inductor would compile with torch's kernels; notes how it was asked to."""
    asked: list[dict[str, Any]] = []

    def instead(module: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Runnable:
        asked.append({**how, **configuration()})
        half = Half(module, list(inputs), "backward" if how["is_backward"] else "forward")
        run: Runnable = load_backend("eager").compile(half)
        return run

    monkeypatch.setattr(inductor, "compile_fx_inner", instead)
    monkeypatch.setattr(Inductor, "unavailable", lambda self: None)
    return asked


# ------------------------------------------------------------------------------ in force, then not


def test_options_hold_while_both_halves_are_compiled_and_no_longer(
    compilations: list[dict[str, Any]],
) -> None:
    before = configuration()
    model = gtrans.optimize(small(), options={"max-autotune": True, "epilogue_fusion": False})
    assert configuration() == before

    for found, expected in zip(gradients(model), gradients(small()), strict=True):
        torch.testing.assert_close(found, expected)

    assert [c["is_backward"] for c in compilations] == [False, True]
    assert all(c["max_autotune"] and not c["epilogue_fusion"] for c in compilations)
    assert configuration() == before


def test_weights_keep_their_layout_on_a_cpu_unless_asked_otherwise(
    compilations: list[dict[str, Any]],
) -> None:
    gradients(gtrans.optimize(small()))
    gradients(gtrans.optimize(small(), options={"layout_optimization": True}))
    assert [c["layout_optimization"] for c in compilations] == [False, False, True, True]


def test_a_mode_is_a_set_of_options(compilations: list[dict[str, Any]]) -> None:
    before = configuration()
    gradients(gtrans.optimize(small(), mode="max-autotune"))

    for name, value in list_mode_options("max-autotune").items():
        assert [c[name] for c in compilations] == [value, value]
    assert configuration() == before


def test_options_through_torch_compile(compilations: list[dict[str, Any]]) -> None:
    options = {"passes": "none", "max_autotune": True}
    gradients(torch.compile(small(), backend="gtrans", options=options))  # type: ignore[arg-type]

    assert [c["max_autotune"] for c in compilations] == [True, True]
    assert "gtrans" in compilations[0]["tag"]
    assert "[plan]" in compilations[0]["tag"]


def test_a_mode_through_torch_compile(compilations: list[dict[str, Any]]) -> None:
    compiled: Any = torch.compile(small(), backend="gtrans", mode="max-autotune-no-cudagraphs")
    gradients(compiled)

    assert [c["coordinate_descent_tuning"] for c in compilations] == [True, True]


def test_halves_of_one_graph_share_what_cuda_graphs_need(
    compilations: list[dict[str, Any]],
) -> None:
    """If the forward cannot be a CUDA graph, its backward must not be one, and must know where."""
    gradients(gtrans.optimize(small(), mode="reduce-overhead"))
    forward, backward = compilations

    assert forward["cudagraphs"] is backward["cudagraphs"]
    assert forward["cudagraphs"].value is True
    assert forward["boxed_forward_device_index"] is backward["boxed_forward_device_index"]

    gradients(gtrans.optimize(small()))
    assert compilations[2]["cudagraphs"] is not forward["cudagraphs"]
    assert compilations[2]["cudagraphs"].value is False


def test_parameters_are_static_in_both_halves(compilations: list[dict[str, Any]]) -> None:
    gradients(gtrans.optimize(small()))
    forward, backward = compilations

    assert len(forward["static_input_idxs"]) == 4
    assert len(backward["static_input_idxs"]) == 1  # the last weight; the first has no reader


def test_dynamic_and_fullgraph_go_with_options(compilations: list[dict[str, Any]]) -> None:
    model = gtrans.optimize(
        small(), options={"max_autotune": True}, dynamic=True, fullgraph=True, on_error="raise"
    )
    for rows in (3, 5, 8):
        model(torch.randn(rows, 6)).sum().backward()

    assert len(gtrans.report(model).captured) == 1


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mode": "max-autotun"}, "unknown mode 'max-autotun' of backend 'inductor'; did you mean"),
        ({"options": {"max_autotun": True}}, "unknown options .*did you mean 'max_autotune'"),
        ({"options": {"@": True}}, r"unknown options \['@'\].*list_options\(\) has all"),
        ({"options": {"max_autotune": 1}}, "option 'max_autotune' .* takes bool, got 1"),
        ({"mode": "default", "options": {}}, "either a mode or options can be given, not both"),
        ({"backend": "eager", "mode": "max-autotune"}, "unknown mode 'max-autotune': backend 'eag"),
        (
            {"backend": "eager", "options": {"n": 1}},
            r"unknown options \['n'\]: backend 'eager' has neither modes nor options of its own",
        ),
    ],
)
def test_what_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        gtrans.optimize(small(), **asked)


def test_torch_compile_refuses_alike() -> None:
    for asked in ({"options": {"max_autotun": True}}, {"mode": "max-autotun"}):
        with pytest.raises(RuntimeError):
            torch.compile(small(), **asked)
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(small(), backend="gtrans", mode="default", options={"passes": "none"})


def test_every_mode_of_torch_is_accepted_and_the_default_changes_nothing() -> None:
    for mode in list_mode_options():
        assert settings_of(mode, None) == list_mode_options(mode)
    assert settings_of(None, None) == settings_of("default", None) == {}
    assert isinstance(load_backend("inductor", mode="default"), Configurable)
    assert not isinstance(load_backend("eager", mode="default"), Configurable)


# ------------------------------------------------------------------------------------------- caches


def test_the_tag_tells_pipelines_roles_and_visible_outputs_apart() -> None:
    module = fx.GraphModule({}, fx.Graph())
    tags = {
        cache_tag(Half(module, [], "forward", visible_outputs=[0], pipeline="plan")),
        cache_tag(Half(module, [], "forward", visible_outputs=[0, 1], pipeline="plan")),
        cache_tag(Half(module, [], "backward", visible_outputs=[0], pipeline="plan")),
        cache_tag(Half(module, [], "forward", visible_outputs=[0], pipeline="relu-mask,plan")),
    }
    assert len(tags) == 4
    assert all(gtrans.__version__ in tag for tag in tags)


def test_a_users_own_tag_is_kept(compilations: list[dict[str, Any]]) -> None:
    with compiler_config.patch(cache_key_tag="mine"):  # type: ignore[attr-defined]  # made by torch
        gradients(gtrans.optimize(small()))
    assert all(c["tag"].startswith("mine gtrans ") for c in compilations)


def test_autograd_s_cache_is_not_asked_even_if_it_is_forced(
    compilations: list[dict[str, Any]],
) -> None:
    """Its key is the graph before our passes: a hit would be a step made by another pipeline."""
    torch._dynamo.utils.counters.clear()
    compiler = Compiler(Pipeline.parse("none"), "inductor")
    with functorch_config.patch(force_autograd_cache=True):
        torch.compile(small(), backend=compiler)(X).sum().backward()
        assert functorch_config.force_autograd_cache
    assert not any(c["forced"] for c in compilations[:1])
    assert not any("autograd_cache" in key for key in torch._dynamo.utils.counters["aot_autograd"])


@pytest.mark.inductor
def test_two_pipelines_share_no_code_on_a_warm_disk_cache(tmp_path: Path) -> None:
    """Keeps GELU's output or computes it again: other halves, from one captured graph."""
    expected = gradients(small())

    def run(passes: str) -> tuple[int, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = gtrans.optimize(small(), passes=passes, on_error="raise")
        for gradient, right in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(gradient, right)
        found = torch._dynamo.utils.counters["inductor"]
        return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]

    with fresh_cache(dir=str(tmp_path)):
        assert run("plan") == (0, 2)
        assert run("plan{recompute=none}") == (0, 2)
        assert run("plan") == (2, 0)
        assert run("plan{recompute=none}") == (2, 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graphs_compute_the_same() -> None:
    plain = small().cuda()
    model = gtrans.optimize(copy.deepcopy(plain), mode="reduce-overhead", on_error="raise")
    torch._dynamo.utils.counters.clear()
    for step in range(5):  # warms up, records, then replays
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).cuda()
        for m in (plain, model):
            m.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            m(x).square().mean().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
