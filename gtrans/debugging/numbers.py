"""Numbers of rewrites as text: ``1-16,18``."""

from collections.abc import Collection

from gtrans.errors import OptionError


def format_numbers(numbers: Collection[int]) -> str:
    """Numbers with runs folded: ``1-16,18``; the inverse of `parse_numbers`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_numbers(text: str) -> frozenset[int]:
    """Reads ``1-16,18``; the empty text is the empty set.

    Raises:
        OptionError: the text is no list of positive numbers and ranges.
    """
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise OptionError(
                f"cannot read rewrite numbers {text!r} at {part!r}; write '18' or '1-16,18'"
            )
        low, high = int(first), int(last or first)
        if not 1 <= low <= high:
            raise OptionError(
                f"rewrite numbers start at 1 and ranges go upwards; {part!r} in {text!r} does not"
            )
        found.update(range(low, high + 1))
    return frozenset(found)
