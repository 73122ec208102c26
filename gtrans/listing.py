"""Tables that look alike in a terminal and in a notebook, and objects that are shown by them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_STYLE = "font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.85em"


@dataclass(frozen=True)
class Listing:
    """A table.

    Attributes:
        columns: their titles; one that starts with ">" is aligned to the right.
        rows: the cells.
        title: written above it.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]] = field(default=())
    title: str = ""

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, title=self.title or None, title_justify="left")
        for column in self.columns:
            right = column.startswith(">")
            table.add_column(
                column.removeprefix(">"), justify="right" if right else "left", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def html(self) -> str:
        """The table for a notebook."""
        aligned = ["right" if c.startswith(">") else "left" for c in self.columns]

        def cells(tag: str, texts: Iterable[str]) -> str:
            return "".join(
                f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'
                for side, text in zip(aligned, texts, strict=True)
            )

        head = cells("th", (c.removeprefix(">") for c in self.columns))
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return (
            f'<table style="{_STYLE}">{title}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )


class Shown(ABC):
    """What prints as text, as rich tables and as HTML, and has a short `repr`."""

    @abstractmethod
    def shown(self) -> Sequence[str | Listing]:
        """Paragraphs and tables, from top to bottom."""

    @abstractmethod
    def headline(self) -> str:
        """One line that says what this is."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline()}>"

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        return Group(*(Text(part) if isinstance(part, str) else part for part in self.shown()))

    def _repr_html_(self) -> str:
        return "".join(
            f'<pre style="white-space: pre-wrap">{escape(part)}</pre>'
            if isinstance(part, str)
            else part.html()
            for part in self.shown()
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython prints where it has no HTML."""
        printer.text(repr(self) if cycle else str(self))
