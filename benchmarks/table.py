"""How benchmarks print: a table while it grows, and the figure on the last line."""

from collections.abc import Sequence


class Table:
    """Prints aligned rows as they come, so that a long benchmark shows its progress.

    Args:
        columns: titles; the first column is left-aligned, the others right-aligned.
        widths: characters per column.
    """

    def __init__(self, columns: Sequence[str], widths: Sequence[int]) -> None:
        self.widths = widths
        self.row(*columns)

    def row(self, *cells: object) -> None:
        """Prints one row."""
        first, *rest = [str(c) for c in cells]
        line = f"{first:<{self.widths[0]}}"
        line += "".join(f"{c:>{w}}" for c, w in zip(rest, self.widths[1:], strict=False))
        print(line, flush=True)


def verdict(ok: bool, figure: str) -> int:
    """Prints the figure on the last line; returns the exit code: 0 only where the target holds."""
    print(f"{'ok' if ok else 'MISSED'}: {figure}", flush=True)
    return 0 if ok else 1
