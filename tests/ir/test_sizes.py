"""Bytes and shapes, as numbers and as expressions."""

import pytest
import sympy
import torch

from gtrans.ir import sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_bytes_are_those_of_the_elements(dtype: torch.dtype) -> None:
    x = torch.empty(3, 5, dtype=dtype)
    assert sizes.tensor_bytes(x) == x.nbytes
    assert sizes.tensor_bytes((x, [x], 3, None)) == 2 * x.nbytes
    assert sizes.numel(x) == 15


def test_a_plain_shape_has_a_plain_expression() -> None:
    assert sizes.tensor_bytes_expression(torch.empty(3, 5)) == 60
    assert sizes.expression(7) == sympy.Integer(7)
    assert sizes.hint(7) == 7


def test_symbolic_sizes_have_expressions_and_hints() -> None:
    seen: list[torch.Tensor] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.extend(n.meta["example_value"] for n in module.graph.find_nodes(op="placeholder"))
        return module

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.ones(6, 3))
    (x,) = [v for v in seen if isinstance(v, torch.Tensor)]
    assert sizes.numel(x) == 18
    assert len(sizes.tensor_bytes_expression(x).free_symbols) == 2
    assert sizes.same_shape(x, x)
    assert not sizes.same_shape(x, x.t())
    assert sizes.shape_text(x).startswith("f32[s")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**42, "4.0 TiB")],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert sizes.human(count) == text


def test_types_are_readable() -> None:
    assert sizes.shape_text(torch.empty(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert sizes.shape_text((torch.empty(2), None)) == "(f32[2], )"
    assert sizes.shape_text(None) == ""
    assert sizes.shape_text(3) == "int 3"
