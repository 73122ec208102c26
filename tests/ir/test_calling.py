"""Models whose results are not all tensors are captured all the same."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.errors import CaptureError
from gtrans.ir.program import export_program

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Cache:
    """State that torch does not know."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Cached(nn.Module):
    """Returns what it computed for later calls beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, use_cache: bool | None = None) -> dict[str, Any]:
        hidden = self.up(x).relu()
        cache = None if use_cache is False else (hidden, Cache(hidden))
        return {"y": self.down(hidden), "past": cache, "name": "cached"}


def test_results_that_are_no_tensors_are_left_out_and_named() -> None:
    model = Cached()
    program = export_program(model, (X,), {"use_cache": True})
    assert program.left_out == ("['past'][1] (Cache)",)
    plan = gtrans.prune(model, X, use_cache=True)
    assert "not a tensor, not captured: ['past'][1] (Cache)" in str(plan)
    assert [f.reason for f in plan.frozen if f.size == 8] == ["output"]  # as past[0] is


def test_a_cache_nobody_asked_for_is_not_computed() -> None:
    model = Cached()
    plan = gtrans.prune(model, X)
    assert plan.structure.program.left_out == ()
    assert [c.size for c in plan.exact] == [8]
    for form in ("module", "graph"):
        slim = plan.erase({"up.weight[0]": torch.arange(8) < 4}, form=form)
        assert slim(X)["y"].shape == (3, 2)
        assert slim(X)["name"] == "cached"
    assert isinstance(model(X)["past"], tuple), "the model itself is as before"


def test_a_cache_that_was_asked_for_by_position_stays() -> None:
    plan = gtrans.prune(Cached(), X, True)
    assert plan.exact == []


def test_layers_that_only_dynamo_captures_may_return_a_cache_too() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            y, state = self.layer(x)
            return {"y": self.head(y), "state": Cache(state)}

    plan = gtrans.prune(Recurrent(), X[None])
    assert [c.size for c in plan.exact] == [6]


def test_a_forward_without_any_tensor_says_what_to_do() -> None:
    @dataclass
    class Result:
        y: torch.Tensor

    class Opaque(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return Result(super().forward(x))

    with pytest.raises(CaptureError, match=r"Opaque returns no tensor, but .*Result.*register_dat"):
        gtrans.prune(Opaque(4, 2), X)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_models_of_transformers_with_their_defaults(kind: str) -> None:
    import transformers as hf

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
        "llama": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
        "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24},
    }[kind]
    config: Any = hf.AutoConfig.for_model(
        kind, vocab_size=31, bos_token_id=1, eos_token_id=2, **small
    )
    if kind == "t5":
        model: nn.Module = hf.T5ForConditionalGeneration(config)
        inputs: dict[str, Any] = {
            k: torch.randint(31, (2, 5)) for k in ("input_ids", "decoder_input_ids")
        }
    else:
        model = hf.AutoModelForCausalLM.from_config(config)
        inputs = {"input_ids": torch.randint(31, (2, 5))}
    model.eval()
    assert model(**inputs).past_key_values is not None
    plan = gtrans.prune(model, **inputs)
    heads = {c.name: torch.arange(c.size) < c.size // 2 for c in plan.exact}
    slim = plan.erase(heads, form="module")
    assert slim(**inputs).past_key_values is not None, "the erased model still generates"
    made: Any = slim
    tokens = made.generate(inputs["input_ids"], max_new_tokens=3, min_new_tokens=3, use_cache=True)
    plain = made.generate(inputs["input_ids"], max_new_tokens=3, min_new_tokens=3, use_cache=False)
    assert torch.equal(tokens, plain)
