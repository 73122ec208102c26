"""Values of a step as short literals: generated where that is enough, data where it is not.

    {"normal": (0.0, 1.0), "shape": (4, 8), "dtype": "float32"}
    {"integers": (0, 31), "shape": (4, 16), "dtype": "int64"}
    {"constant": 1.0, "shape": (8,), "dtype": "float32"}
    {"values": [1.0, 2.0], "shape": (2,), "dtype": "float32"}
    {"data": "eJxjY...", "shape": (4, 8), "dtype": "float32"}         zlib and base64 of the bytes

A generated value is not the one it stands for; whether a failure survives that is for the caller
to find out. Elements that are not finite are kept even then (`"at": {(0, 3): "nan"}`).
"""

import base64
import math
import zlib
from typing import Any

import torch

_FEW = 16


def describe(value: Any, *, exact: bool) -> Any:
    """A literal from which `make` makes a tensor like this one, or the same one.

    Args:
        value: a tensor, or a plain number, which is its own description.
        exact: describe this very tensor rather than one like it.
    """
    if not isinstance(value, torch.Tensor):
        return value
    plain = value.detach().cpu()
    form: dict[str, Any] = _same(plain) or (_data(plain) if exact else _like(plain))
    form |= {"shape": tuple(plain.shape), "dtype": str(plain.dtype).removeprefix("torch.")}
    if not plain.is_contiguous():
        form["stride"] = tuple(plain.stride())
    if value.device.type != "cpu":
        form["device"] = value.device.type
    if value.requires_grad:
        form["requires_grad"] = True
    return form


def make(description: Any, seed: int) -> Any:
    """The value of a description; generated ones follow from the seed."""
    if not isinstance(description, dict):
        return description
    shape, dtype = description["shape"], getattr(torch, description["dtype"])
    generator = torch.Generator().manual_seed(seed)
    match description:
        case {"constant": number}:
            value = torch.full(shape, _number(number), dtype=dtype)
        case {"values": numbers}:
            value = torch.tensor([_number(n) for n in numbers], dtype=dtype).reshape(shape)
        case {"data": text}:
            value = _from_bytes(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)
        case {"normal": (mean, deviation)}:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            value = (drawn * deviation + mean).to(dtype)
        case {"integers": (low, high)}:
            value = torch.randint(low, high + 1, shape, generator=generator).to(dtype)
        case _:
            raise ValueError(f"no description of a value: {description}")
    for index, number in description.get("at", {}).items():
        value[index] = float(number)
    if "stride" in description:
        value = torch.empty_strided(shape, description["stride"], dtype=dtype).copy_(value)
    return value.to(description.get("device", "cpu")).requires_grad_(
        description.get("requires_grad", False)
    )


def _same(value: torch.Tensor) -> dict[str, Any]:
    """An exact description that is short; empty where there is none."""
    if value.numel() == 0:
        return {"constant": 0}
    if value.dtype.is_complex:
        return {}
    first = value.flatten()[0]
    if bool((value == first).all()):
        return {"constant": _literal(first.item())}
    if value.numel() <= _FEW:
        return {"values": [_literal(v) for v in value.flatten().tolist()]}
    return {}


def _like(value: torch.Tensor) -> dict[str, Any]:
    if value.dtype.is_complex or (value.dtype.is_floating_point and value.dtype.itemsize == 1):
        return _data(value)
    if not value.dtype.is_floating_point:
        return {"integers": (int(value.min()), int(value.max()))}
    wide = value.double()
    finite = wide[wide.isfinite()]
    mean, deviation = (float(finite.mean()), float(finite.std(correction=0))) if len(finite) else (
        0.0, 1.0
    )  # fmt: skip
    form: dict[str, Any] = {"normal": (_rounded(mean), _rounded(deviation))}
    odd = (~wide.isfinite()).nonzero().tolist()
    if odd:
        form["at"] = {tuple(i): str(float(wide[tuple(i)])) for i in odd}
    return form


def _data(value: torch.Tensor) -> dict[str, Any]:
    raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"data": base64.b64encode(zlib.compress(raw, 9)).decode()}


def _from_bytes(raw: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)


def _literal(number: Any) -> Any:
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number


def _number(literal: Any) -> Any:
    return float(literal) if isinstance(literal, str) else literal


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")
