"""Memory budgets as people write them."""

import re
from dataclasses import dataclass

from gtrans.errors import OptionError

_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_TEXT = re.compile(r"\s*(?P<count>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Budget:
    """An upper bound of a step's peak memory: in bytes, or as a fraction of the plain peak.

    Exactly one of the two is set.
    """

    bytes: int | None = None
    fraction: float | None = None

    @staticmethod
    def parse(value: "str | int | float | Budget") -> "Budget":
        """Reads "6GiB", "500 MB", "40%", 0.4 (a fraction of the plain peak) or a number of bytes.

        Raises:
            OptionError: the value is none of these.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _of_number(value)
        match = _TEXT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise _unreadable(value)
        count, unit = float(match["count"]), match["unit"].upper()
        if unit == "%":
            return _of_fraction(count / 100, value)
        if unit == "":
            return _of_number(int(count) if count.is_integer() and count > 1 else count)
        if unit not in _UNITS:
            raise _unreadable(value)
        return Budget(bytes=int(count * _UNITS[unit]))

    def in_bytes(self, plain_peak: int) -> int:
        """The budget in bytes, given what the step peaks at without one."""
        if self.bytes is not None:
            return self.bytes
        assert self.fraction is not None
        return int(self.fraction * plain_peak)

    def __str__(self) -> str:
        if self.bytes is None:
            return f"{self.fraction:g}"
        for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if self.bytes % size == 0:
                return f"{self.bytes // size}{unit}"
        return f"{self.bytes}B"


def _of_number(value: int | float) -> Budget:
    if isinstance(value, int) and value > 1:
        return Budget(bytes=value)
    return _of_fraction(float(value), value)


def _of_fraction(fraction: float, given: object) -> Budget:
    if not 0 < fraction <= 1:
        raise _unreadable(given)
    return Budget(fraction=fraction)


def _unreadable(value: object) -> OptionError:
    return OptionError(
        f"cannot read the memory budget {value!r}; write bytes with a unit ('6GiB', '500MB'), "
        "a fraction of the plain peak between 0 and 1 (0.4, '40%'), or a whole number of bytes"
    )
